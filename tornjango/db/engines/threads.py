"""Any database that Django has a backend for, over a pool of Django's own connections.

What blocks is done in threads, but not in those of the loop's executor: they may all be taken by sync code that waits
for the loop, and the loop for a statement; and a queue that is full would leave a transaction without its end. Each
connection has a thread of its own, as it runs one statement at a time anyway: there are as many as there are connections,
and none ever waits for anything but its database.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, TypeVar, cast
from weakref import WeakSet

from django.db.utils import InterfaceError, OperationalError

from tornjango.conf import Config
from tornjango.db.compiler import Params, Row
from tornjango.db.engines import base, blocking
from tornjango.db.engines.base import Result, Stream
from tornjango.db.engines.lease import PoolLease
from tornjango.db.engines.pool import Pool
from tornjango.db.engines.pooled import PooledEngine
from tornjango.db.engines.threaded import Connection

T = TypeVar("T")

#: Of sqlite3's limits (``SQLITE_LIMIT_...``), which are numbered from 0.
LIMITS = 12

#: In seconds: libpq takes no less.
SHORTEST_CONNECT_TIMEOUT = 2


class ThreadsLease(PoolLease):
    _connection: Connection

    async def stream(self, sql: str, params: Params = None) -> Stream:
        if self._wrapper.vendor == "postgresql":
            return await super().stream(sql, params)
        return await self.open_stream(sql, params, owns_lease=False)

    async def open_stream(self, sql: str, params: Params, *, owns_lease: bool) -> ThreadsStream:
        cursor = await self.call(blocking.stream, sql, params)
        return ThreadsStream(self, self._connection.keep(cursor), owns_lease=owns_lease)

    async def call(self, fn: Callable[..., T], *args: Any) -> T:
        """Errors and a cancellation as of `execute`."""
        await self._settle()
        self._check()
        return await self._wait(self._connection.call(fn, *args))

    async def close_cursor(self, cursor: Any) -> None:
        if cursor in self._connection.cursors and not self._ended:
            self._connection.cursors.remove(cursor)
            await self.call(blocking.close_cursors, [cursor])


class ThreadsStream(Stream):
    """A cursor of the driver's, which keeps as many rows in memory as that does."""

    def __init__(self, lease: ThreadsLease, cursor: Any, *, owns_lease: bool) -> None:
        self.description = cursor.description
        self._lease = lease
        self._cursor = cursor
        self._owns_lease = owns_lease
        self._closed = False

    async def fetch(self, size: int) -> list[Row]:
        return await self._lease.call(_fetch, self._cursor, size)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._owns_lease:
            await self._lease.rollback()
        else:
            await self._lease.close_cursor(self._cursor)

    def abandon(self) -> None:
        """A cursor in somebody's transaction is left to end with that."""
        if not self._closed and self._owns_lease:
            self._lease.abandon()
        self._closed = True


class ThreadsEngine(PooledEngine[Connection]):
    """A pool of Django's connections; of one, for a database in memory.

    They are set up as Django does it, receivers of ``connection_created`` included, and keep to ``CONN_MAX_AGE`` (where
    0 is no limit: there is no request for them to end with) and ``CONN_HEALTH_CHECKS``.

    A cancelled statement is cancelled on the server where the driver can do that: psycopg2, psycopg, sqlite3 and oracledb. Of
    any other it runs to its end in the background, and only then is the connection free.
    """

    name = "threads"
    lease = ThreadsLease

    def __init__(self, alias: str, config: Config) -> None:
        super().__init__(alias, config)
        self._made_pool: Pool[Connection] | None = None
        #: Those that connected and whose threads have not ended.
        self._made: WeakSet[Connection] = WeakSet()
        self._recoveries: set[asyncio.Task[None]] = set()

    async def execute(self, sql: str, params: Params = None) -> Result:
        return await self._alone(blocking.execute_alone, sql, params)

    async def mogrify(self, sql: str, params: Params) -> bytes:
        return await self._alone(blocking.mogrify, sql, params)

    async def stream(self, sql: str, params: Params = None) -> Stream:
        """On PostgreSQL in a transaction, which its cursors need. Elsewhere without: on SQLite it may lock out others."""
        if self.wrapper.vendor == "postgresql":
            return await super().stream(sql, params)
        connection = await self._acquire()
        lease = ThreadsLease(self.wrapper, connection, partial(self._release, connection))
        self._leases.add(lease)
        try:
            return await lease.open_stream(sql, params, owns_lease=True)
        except BaseException:
            lease.abandon()
            raise

    async def close(self) -> None:
        """Statements that do not end within CANCEL_TIMEOUT are left to their threads, which close their connections."""
        await super().close()
        going = {it.gone for it in self._made if it.gone and not it.given_up}
        if going:
            await asyncio.wait(going, timeout=base.CANCEL_TIMEOUT)

    async def _alone(self, fn: Callable[..., T], *args: Any) -> T:
        connection = await self._acquire()
        with self._held(connection):
            return await asyncio.shield(connection.call(fn, *args))

    # Its connections

    def _size(self, config: Config) -> int:
        return 1 if _is_in_memory(self.wrapper) else config.POOL_SIZE

    @property
    def _pool(self) -> Pool[Connection]:
        if self._made_pool is None:
            self._made_pool = Pool(self._gate, self._connect)
        return self._made_pool

    async def _acquire(self) -> Connection:
        while True:
            connection = await self._pool.acquire()
            if not connection.in_doubt or await self._is_usable(connection):
                return connection
            connection.discard()
            self._release(connection)

    async def _is_usable(self, connection: Connection) -> bool:
        try:
            return await asyncio.shield(connection.call(_is_usable))
        except asyncio.CancelledError:
            self._abandon(connection)
            raise
        except BaseException:
            self._release(connection)
            raise

    def _release(self, connection: Connection) -> None:
        if connection.given_up and not self._closed:
            # Its place in the pool is free when the statement has ended: the database has it until then.
            recovery = asyncio.get_running_loop().create_task(connection.recover())
            self._recoveries.add(recovery)
            recovery.add_done_callback(partial(self._recovered, connection))
        else:
            self._take_back(connection)

    def _recovered(self, connection: Connection, recovery: asyncio.Task[None]) -> None:
        self._recoveries.discard(recovery)
        self._take_back(connection)

    def _take_back(self, connection: Connection) -> None:
        if connection.given_up:
            # The pool is closed, and does not wait for it.
            connection.leave()
        self._pool.release(connection)

    def _busy(self) -> Iterable[Connection]:
        return self._made_pool.busy if self._made_pool else ()

    async def _stop_connecting(self) -> None:
        if self._made_pool:
            await self._made_pool.close(InterfaceError)
        recoveries = list(self._recoveries)
        for recovery in recoveries:
            recovery.cancel()
        await asyncio.gather(*recoveries, return_exceptions=True)

    def _close_idle(self) -> None:
        """They were closed when the pool was, or when they were released."""

    def _counts(self) -> dict[str, int]:
        return self._made_pool.counts() if self._made_pool else {"free": 0, "connecting": 0}

    async def _connect(self) -> Connection:
        limit = _connect_timeout(self.wrapper)
        connection = Connection(_wrapper(self.wrapper), self._learn)
        try:
            async with asyncio.timeout(limit):
                await connection.open()
        except BaseException as exc:
            connection.leave()
            if isinstance(exc, TimeoutError):
                raise self._failed(f"The server did not answer in {limit:g} seconds.") from None
            if isinstance(exc, OperationalError):
                raise self._failed(exc) from exc.__cause__
            raise
        self._made.add(connection)
        return connection

    def _failed(self, reason: object) -> OperationalError:
        return OperationalError(f"Cannot connect to database {self.alias!r}: {reason}")

    def _learn(self, wrapper: Any) -> None:
        """What only a connection knows, for the wrapper that has none, and for those of green code."""
        if wrapper.vendor == "postgresql":
            self.wrapper.pg_version = wrapper.pg_version
        elif wrapper.vendor == "sqlite":
            getlimit = wrapper.connection.getlimit
            self.wrapper.limits = [getlimit(category) for category in range(LIMITS)]


def _wrapper(plain: Any) -> Any:
    """A wrapper of Django's for a connection of the pool. Its log is kept by those who call the engine."""
    settings, backend = plain.settings_dict, cast(Any, type(plain))
    options = {key: value for key, value in settings["OPTIONS"].items() if key != "pool"}
    if plain.vendor == "postgresql":
        # A thread that connects cannot be stopped.
        limit = max(SHORTEST_CONNECT_TIMEOUT, math.ceil(_connect_timeout(plain)))
        options.setdefault("connect_timeout", limit)
    wrapper = _class(backend)(
        {
            **settings,
            "AUTOCOMMIT": True,
            "CONN_MAX_AGE": None if _is_in_memory(plain) else settings["CONN_MAX_AGE"] or None,
            "OPTIONS": options,
        },
        plain.alias,
    )
    # Made here, used in its thread.
    wrapper.inc_thread_sharing()
    return wrapper


@cache
def _class(base: Any) -> Any:
    # Receivers of connection_created may ask for the class that Django knows.
    known = property(lambda self: base)
    return type(base.__name__, (base,), {"queries_logged": False, "__class__": known})


def _connect_timeout(wrapper: Any) -> float:
    return float(wrapper.settings_dict["OPTIONS"].get("connect_timeout") or base.CONNECT_TIMEOUT)


def _is_in_memory(wrapper: Any) -> bool:
    """Another connection would find another database; or, where they share one, its tables locked."""
    return wrapper.vendor == "sqlite" and bool(wrapper.is_in_memory_db())


def _is_usable(wrapper: Any) -> bool:
    usable: bool = wrapper.is_usable()
    if usable:
        wrapper.errors_occurred = False
        wrapper.health_check_done = True
    return usable


def _fetch(wrapper: Any, cursor: Any, size: int) -> list[Row]:
    return list(cursor.fetchmany(size))
