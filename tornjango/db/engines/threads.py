"""Any database that Django has a backend for, over a pool of Django's own connections.

What blocks is done in threads, but not in those of the loop's executor: they may all be taken by sync code that waits
for the loop, and the loop for a statement; and a queue that is full would leave a transaction without its end. Each
connection has a thread of its own, as it runs one statement at a time anyway: there are as many as there are connections,
and none ever waits for anything but its database.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import warnings
from collections.abc import Callable, Coroutine
from functools import cache, partial
from typing import Any, TypeVar, cast

from django.db import connections
from django.db.utils import InterfaceError, OperationalError

from tornjango import green
from tornjango.conf import Config
from tornjango.db.compiler import Params, Row
from tornjango.db.engines import base, blocking
from tornjango.db.engines.aside import Thread, aside
from tornjango.db.engines.base import Engine, Result, Stream
from tornjango.db.engines.gate import Gate
from tornjango.db.engines.stream import CursorLease, CursorStream

logger = logging.getLogger("tornjango.db")

T = TypeVar("T")

#: How long a statement that was told to end is given before it is told once more, in seconds: it may not have begun by
#: the first time. Each time twice as long.
FIRST_PAUSE, LAST_PAUSE = 0.05, 5.0

#: Of sqlite3's limits (``SQLITE_LIMIT_...``), which are numbered from 0.
LIMITS = 12


class ThreadsEngine(Engine):
    """A pool of up to ``POOL_SIZE`` connections, opened as they are needed; of one, for a database in memory.

    They are set up as Django does it, receivers of ``connection_created`` included, and keep to ``CONN_MAX_AGE`` (where
    0 is no limit: there is no request for them to end with) and ``CONN_HEALTH_CHECKS``. When there is no connection,
    callers are told at once: OperationalError says why.

    A cancelled statement is cancelled on the server where the driver can do that: psycopg, sqlite3 and oracledb. Of any
    other it runs to its end in the background, and only then is the connection free.
    """

    name = "threads"

    def __init__(self, alias: str, config: Config) -> None:
        super().__init__(alias)
        self._gate = Gate(
            f"database {alias!r}",
            size=1 if _is_in_memory(self.wrapper) else config.POOL_SIZE,
            queue=config.POOL_QUEUE,
            timeout=config.POOL_TIMEOUT,
        )
        self._made: list[Connection] = []
        self._free: list[Connection] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def open(self) -> None:
        await self._alone(_nothing)

    async def execute(self, sql: str, params: Params = None) -> Result:
        return await self._alone(blocking.execute_alone, sql, params)

    async def begin(self) -> ThreadsLease:
        lease = ThreadsLease(self, await self._take())
        await lease.start(blocking.begin)
        return lease

    async def stream(self, sql: str, params: Params = None) -> Stream:
        """On PostgreSQL in a transaction, which its cursors need. Elsewhere without: on SQLite it may lock out others."""
        if self.wrapper.vendor == "postgresql":
            return await CursorStream.of_query(await self.begin(), sql, params)
        lease = ThreadsLease(self, await self._take())
        cursor = await lease.start(blocking.stream, sql, params)
        return ThreadsStream(lease, lease.keep(cursor), owns_lease=True)

    async def mogrify(self, sql: str, params: Params) -> bytes:
        return await self._alone(blocking.mogrify, sql, params)

    async def context(self) -> Any:
        return await self._alone(_context)

    async def close(self) -> None:
        """Statements that do not end within CANCEL_TIMEOUT are left to their threads, which close their connections."""
        if self._closed:
            return
        self._closed = True
        self._gate.close(InterfaceError)
        ends = {asyncio.create_task(connection.close()) for connection in self._made}
        if not ends:
            return
        _, late = await asyncio.wait(ends, timeout=base.CANCEL_TIMEOUT)
        for connection in self._made:
            connection.leave_behind()
        for task in late:
            task.cancel()
        await asyncio.gather(*ends - late)

    def status(self) -> dict[str, Any]:
        return {
            "engine": self.name,
            "size": self._gate.size,
            "in_use": self._gate.inside,
            "waiting": self._gate.waiting,
            "free": len(self._free),
        }

    # A connection for one caller

    async def _alone(self, fn: Callable[..., T], *args: Any) -> T:
        connection = await self._take()
        try:
            return await connection.call(fn, *args, fresh=True)
        finally:
            if connection.stopping:
                self.end(connection)
            else:
                self.release(connection)

    async def _take(self) -> Connection:
        self._check_loop()
        await self._gate.enter()
        try:
            if self._closed:
                # While it waited for its turn.
                raise InterfaceError(f"The pool of database {self.alias!r} is closed.")
            return self._free.pop() if self._free else self._make()
        except BaseException:
            self._gate.leave()
            raise

    def _make(self) -> Connection:
        connection = Connection(_wrapper(self.wrapper), self._learn)
        self._made.append(connection)
        return connection

    def release(self, connection: Connection) -> None:
        """When nothing runs on it, and no transaction is open."""
        if not connection.closed:
            self._free.append(connection)
        self._gate.leave()

    def end(self, connection: Connection, cursors: list[Any] | None = None) -> asyncio.Task[None]:
        """Closes the cursors, rolls back and releases, in the background, when what was cancelled has ended."""
        connection.hurry()
        return self.spawn(self._end(connection, cursors or []))

    async def _end(self, connection: Connection, cursors: list[Any]) -> None:
        try:
            await connection.settled()
            if not connection.closed:
                await connection.call(blocking.reset, cursors)
        finally:
            self.release(connection)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _check_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop not in (None, loop):
            raise RuntimeError(
                f"The pool of database {self.alias!r} belongs to another event loop: "
                "await pools.close() there, before it ends."
            )
        self._loop = loop

    def _learn(self, wrapper: Any) -> None:
        """What only a connection knows, for the wrapper that has none, and for those of green code."""
        if wrapper.vendor == "postgresql":
            self.wrapper.pg_version = wrapper.pg_version
        elif wrapper.vendor == "sqlite":
            getlimit = wrapper.connection.getlimit
            self.wrapper.limits = [getlimit(category) for category in range(LIMITS)]


class ThreadsLease(CursorLease):
    def __init__(self, engine: ThreadsEngine, connection: Connection) -> None:
        self._engine = engine
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._cursors: list[Any] = []
        self._ended = False
        #: A statement that was cancelled did not end in time.
        self._lost = False

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):
            self.abandon()
            message = f"A transaction on database {self._engine.alias!r} was never ended; it is rolled back."
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)

    async def start(self, fn: Callable[..., T], *args: Any) -> T:
        """The first call on the connection; when it fails, the lease has ended."""
        try:
            return await self._connection.call(fn, *args, fresh=True)
        except BaseException:
            self.abandon()
            raise

    @property
    def aborted(self) -> bool:
        return self._ended or self._lost or blocking.is_aborted(self._connection.wrapper)

    async def execute(self, sql: str, params: Params = None) -> Result:
        # Interrupted, SQLite would roll back the whole transaction, without the owner's knowing.
        spare = self._engine.wrapper.vendor == "sqlite" and not _only_reads(sql)
        return await self.call(blocking.execute_in_transaction, sql, params, spare=spare)

    async def stream(self, sql: str, params: Params = None) -> Stream:
        if self._engine.wrapper.vendor == "postgresql":
            return await super().stream(sql, params)
        cursor = await self.call(blocking.stream, sql, params)
        return ThreadsStream(self, self.keep(cursor), owns_lease=False)

    async def mogrify(self, sql: str, params: Params) -> bytes:
        return await self.call(blocking.mogrify, sql, params)

    async def context(self) -> Any:
        return await self.call(_context)

    async def commit(self) -> None:
        if self._connection.closed:
            raise self._closed()
        if self._ended:
            return
        self._ended = True
        task = self._engine.spawn(self._commit())
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_look_at)
            await green.finish(asyncio.wait({task}, timeout=base.CANCEL_TIMEOUT))
            raise

    async def rollback(self) -> None:
        if not self._ended:
            self._ended = True
            task = self._engine.end(self._connection, self._cursors)
            await green.finish(asyncio.wait({task}, timeout=base.CANCEL_TIMEOUT))

    def abandon(self) -> None:
        """May be called in any thread, for anything may be collected there."""
        if self._ended:
            return
        self._ended = True
        # Without its loop the connection has gone, too.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._engine.end, self._connection, self._cursors)

    async def call(self, fn: Callable[..., T], *args: Any, spare: bool = False) -> T:
        await self._check()
        return await self._connection.call(fn, *args, spare=spare)

    def keep(self, cursor: Any) -> Any:
        """A cursor that is open, to be closed with the transaction at the latest."""
        self._cursors.append(cursor)
        return cursor

    async def close_cursor(self, cursor: Any) -> None:
        if not self._ended and not self._connection.closed:
            self._cursors.remove(cursor)
            await self.call(blocking.close_cursors, [cursor])

    async def _commit(self) -> None:
        try:
            await self._settle()
            await self._connection.call(blocking.commit, self._cursors)
        except BaseException:
            self._engine.end(self._connection, self._cursors)
            raise
        self._engine.release(self._connection)

    async def _check(self) -> None:
        if self._connection.closed:
            raise self._closed()
        if self._ended:
            raise InterfaceError(f"The transaction on database {self._engine.alias!r} has ended.")
        await self._settle()

    async def _settle(self) -> None:
        """Returns when a statement that was cancelled has ended."""
        if not self._lost and not await self._connection.settled(base.CANCEL_TIMEOUT):
            self._lost = True
        if self._lost:
            raise OperationalError(
                f"A statement on database {self._engine.alias!r} was cancelled, and did not end within "
                f"{base.CANCEL_TIMEOUT:g} seconds: its transaction is given up. Begin again from its start."
            )

    def _closed(self) -> OperationalError:
        return OperationalError(
            f"The pool of database {self._engine.alias!r} was closed in a transaction, which is rolled back."
        )


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


class Connection:
    """One of Django's connections, and the thread in which everything is done to it: there it is ``connections[alias]``.

    One call at a time; ``learn`` is called in the thread when it has connected.
    """

    def __init__(self, wrapper: Any, learn: Callable[[Any], None]) -> None:
        self.wrapper = wrapper
        self.closed = False
        #: What ends the last call, which was cancelled.
        self.stopping: asyncio.Task[None] | None = None
        self._learn = learn
        self._running: asyncio.Future[Any] | None = None
        self._cancelled = False
        self._hurry: asyncio.Future[None] | None = None
        self._thread = Thread(f"tornjango-db-{wrapper.alias}")
        self._thread.call(partial(connections.__setitem__, wrapper.alias, wrapper))

    async def call(
        self, fn: Callable[..., T], *args: Any, fresh: bool = False, spare: bool = False
    ) -> T:
        """``fn(wrapper, *args)`` in the thread; if ``fresh``, on a connection that is as Django wants one.

        Cancelled, it raises at once, and what runs is stopped in the background; if it is to be ``spared``, after
        CANCEL_TIMEOUT, or when there is `hurry`.
        """
        self._cancelled, self.stopping = False, None
        running = self._running = self._thread.call(partial(self._do, fn, args, fresh))
        try:
            await asyncio.wait({running})
        except asyncio.CancelledError:
            self._cancelled = True
            self._hurry = running.get_loop().create_future() if spare else None
            self.stopping = asyncio.create_task(self._stop(running, self._hurry))
            raise
        self._running = None
        result: T = running.result()
        return result

    async def settled(self, within: float | None = None) -> bool:
        """Whether the last call has ended, if it was cancelled; waits for it that long."""
        if self.stopping is None:
            return True
        _, pending = await asyncio.wait({self.stopping}, timeout=within)
        return not pending

    def hurry(self) -> None:
        """What was spared is stopped now."""
        if self._hurry is not None and not self._hurry.done():
            self._hurry.set_result(None)

    async def close(self) -> None:
        self.closed = True
        if self._running is not None:
            await self._stop(self._running, None)
        await asyncio.wait({self._thread.call(partial(blocking.close, self.wrapper))})

    def leave_behind(self) -> None:
        """After `close`, though it may not have come to its end. Who waits for a call is told."""
        if self._running is not None and not self._running.done():
            self._running.set_exception(
                InterfaceError(f"The pool of database {self.wrapper.alias!r} is closed.")
            )
            _look_at(self._running)
            self._thread.call(partial(blocking.close, self.wrapper))
        self._thread.end()

    # In the thread

    def _do(self, fn: Callable[..., T], args: tuple[Any, ...], fresh: bool) -> T:
        if fresh:
            self._refresh()
        if self._cancelled:
            raise OperationalError("The statement was cancelled before it was sent.")
        return fn(self.wrapper, *args)

    def _refresh(self) -> None:
        wrapper = self.wrapper
        if _has_news(wrapper.connection) and not wrapper.is_usable():
            blocking.close(wrapper)
        wrapper.close_if_unusable_or_obsolete()
        if wrapper.connection is None:
            wrapper.ensure_connection()
            self._learn(wrapper)

    # A statement that is to end

    async def _stop(self, running: asyncio.Future[Any], hurry: asyncio.Future[None] | None) -> None:
        if hurry is not None:
            await asyncio.wait(
                {running, hurry},
                timeout=base.CANCEL_TIMEOUT,
                return_when=asyncio.FIRST_COMPLETED,
            )
        pause = FIRST_PAUSE
        while not running.done():
            await self._cancel()
            await asyncio.wait({running}, timeout=pause)
            pause = min(2 * pause, LAST_PAUSE)
        _look_at(running)

    async def _cancel(self) -> None:
        """Returns when the server has been told: later, it might hear of it in the middle of another statement."""
        try:
            cancel = _canceller(self.wrapper.connection)
            if cancel is not None:
                await aside(cancel)
        except self.wrapper.Database.Error as exc:
            logger.debug(
                "A statement on database %r could not be cancelled: %s", self.wrapper.alias, exc
            )


def _canceller(raw: Any) -> Callable[[], object] | None:
    """A function that ends what a connection runs; it blocks. None where the driver has none, or nothing can run yet."""
    if hasattr(raw, "pgconn_ptr"):
        # psycopg2 is optional.
        from tornjango.db.engines import cancel

        return cancel.prepare(raw)
    if hasattr(raw, "cancel_safe"):
        return partial(raw.cancel_safe, timeout=base.CANCEL_TIMEOUT)
    return getattr(raw, "interrupt", None) or getattr(raw, "cancel", None)


def _has_news(raw: Any) -> bool:
    """Whether a server has sent something unasked: most often, that it ended the connection."""
    if not hasattr(raw, "fileno") or getattr(raw, "closed", False):
        return False
    readable = select.poll()
    readable.register(raw.fileno(), select.POLLIN)
    return bool(readable.poll(0))


def _wrapper(plain: Any) -> Any:
    """A wrapper of Django's for a connection of the pool. Its log is kept by those who call the engine."""
    settings, backend = plain.settings_dict, cast(Any, type(plain))
    options = {key: value for key, value in settings["OPTIONS"].items() if key != "pool"}
    wrapper = _class(backend)(
        {
            **settings,
            "AUTOCOMMIT": True,
            "CONN_MAX_AGE": settings["CONN_MAX_AGE"] or None,
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


def _is_in_memory(wrapper: Any) -> bool:
    """Another connection would find another database; or, where they share one, its tables locked."""
    return wrapper.vendor == "sqlite" and bool(wrapper.is_in_memory_db())


def _only_reads(sql: str) -> bool:
    return sql.lstrip()[:6].upper() == "SELECT"


def _fetch(wrapper: Any, cursor: Any, size: int) -> list[Row]:
    return list(cursor.fetchmany(size))


def _context(wrapper: Any) -> Any:
    """psycopg's, which knows how to adapt values for it."""
    return wrapper.connection if hasattr(wrapper.connection, "adapters") else None


def _nothing(wrapper: Any) -> None:
    pass


def _look_at(future: asyncio.Future[Any]) -> None:
    """Nobody waits for it: asyncio need not report its error."""
    if not future.cancelled():
        future.exception()
