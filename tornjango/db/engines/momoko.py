"""PostgreSQL over momoko's pool of asynchronous psycopg2 connections.

momoko 2.2.5.1 is used as it was published, in 2018; what is wrong with it is made up for here and nowhere else:

- A cancelled caller loses its connection: momoko's futures are never left to a caller who may be cancelled.
- Its queue has neither bound nor deadline: a Gate stands before it, so that it holds no more than its connections.
- ``Pool.execute`` sends a statement again when a connection broke: statements go to a connection, once.
- Its way to cancel would be psycopg2's, which stops the whole process until the server has heard: see cancel.py.
- It notices neither a connection that died idle, nor a server that is frozen, and reconnects without backing off.
- Its ``connect`` resolves names on the loop, loses a socket that libpq replaced, and never gives up.
- ``setsession`` hides its failures, and a connection opened by a DSN alone is not set up as Django's are.
- ``execute(sql, ())`` counts as no parameters, which leaves ``%%`` as it is.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable, Iterable
from typing import Any

import momoko
import psycopg2
from django.db.utils import InterfaceError
from psycopg2 import extensions
from tornado.ioloop import IOLoop

from tornjango.conf import Config
from tornjango.db.compiler import Params, Row
from tornjango.db.engines import base, cancel, lease
from tornjango.db.engines.aside import aside
from tornjango.db.engines.backoff import Backoff
from tornjango.db.engines.base import Result
from tornjango.db.engines.momoko_session import MomokoSession
from tornjango.db.engines.notices import Notice, NoticeConnection
from tornjango.db.engines.postgres import PostgresEngine
from tornjango.db.engines.readiness import ready
from tornjango.db.engines.session import EXTENSION_TYPES

# Rows made of what the server sent before other tasks get their turn: a few milliseconds.
SLICE = 1000

# What a pool counts before it has connections.
NOTHING = {"free": 0, "connecting": 0, "dead": 0}


class _NoParams(tuple[Any, ...]):
    """Empty parameters that momoko takes for parameters."""

    def __bool__(self) -> bool:
        return True


NO_PARAMS = _NoParams()


class MomokoEngine(PostgresEngine["Connection"]):
    name = "momoko"

    def __init__(self, alias: str, config: Config) -> None:
        super().__init__(alias, config)
        self._session = MomokoSession(self.wrapper)
        self._made_pool: Pool | None = None

    @property
    def _pool(self) -> Pool:
        if self._made_pool is None:
            self._made_pool = Pool(self._session, self._gate.size)
        elif self._made_pool.loop is not asyncio.get_running_loop():
            raise RuntimeError(
                f"The pool of database {self.alias!r} belongs to another event loop: "
                "await pools.close() there, before it ends."
            )
        return self._made_pool

    async def _acquire(self) -> Connection:
        pool = self._pool
        deadline = pool.loop.time() + self._gate.timeout
        await self._gate.enter()
        try:
            while not (connection := await self._getconn(pool, deadline)).is_alive():
                connection.discard()
                pool.putconn(connection)
            return connection
        except BaseException:
            self._gate.leave()
            raise

    async def _getconn(self, pool: Pool, deadline: float) -> Connection:
        while True:
            try:
                return await pool.get(deadline)
            except psycopg2.Error:
                # Every attempt to connect that momoko had under way has failed; the next one backs off first.
                if self._closed:
                    raise InterfaceError(
                        f"The pool of database {self.alias!r} is closed."
                    ) from None
                if not pool.connected_before or pool.loop.time() >= deadline:
                    raise pool.failure() from None

    def _release(self, connection: Connection) -> None:
        if connection.lost or connection.in_transaction:
            connection.discard()
        self._pool.putconn(connection)
        self._gate.leave()

    def _busy(self) -> Iterable[Connection]:
        return list(self._made_pool.conns.busy) if self._made_pool else ()

    async def _stop_connecting(self) -> None:
        if self._made_pool:
            await self._made_pool.stop_connecting()

    def _close_idle(self) -> None:
        if self._made_pool:
            self._made_pool.close()

    def _counts(self) -> dict[str, int]:
        return self._made_pool.counts() if self._made_pool else NOTHING

    async def _connect_for_notices(self) -> NoticeConnection:
        connection = Connection(self._pool)
        with self.wrapper.wrap_database_errors:
            await self._pool.establish(connection)
        return _NoticeConnection(self.wrapper, connection)


class Pool(momoko.Pool):  # type: ignore[misc]
    """momoko's pool, of connections that are Django's. It does not close itself: see `MomokoEngine.close`."""

    def __init__(self, session: MomokoSession, size: int) -> None:
        super().__init__("", size=1, max_size=size, reconnect_interval=0, ioloop=IOLoop.current())
        self.loop = asyncio.get_running_loop()
        self.session = session
        self.backoff = Backoff()
        self.connected_before = False
        self._last_error: BaseException | None = None
        self._connecting: set[asyncio.Task[Any]] = set()

    async def get(self, deadline: float) -> Connection:
        """Raises psycopg2's errors when there is none, or none until the deadline."""
        if self.conns.all_dead:
            # Else momoko has the caller wait beside its queue, where another one takes the connection from under him;
            # and on a new pool it wants its connect() called, which opens connections before they are needed.
            if self.conns.dead:
                self._reanimate()
            else:
                self._new_connection()
        future: asyncio.Future[Connection] = self.getconn(ping=False)
        if future.done():
            return future.result()
        try:
            # Not `wait_for`, which would cancel momoko's future.
            await asyncio.wait({future}, timeout=max(deadline - self.loop.time(), 0))
        except asyncio.CancelledError:
            future.add_done_callback(self._take_back)
            raise
        if not future.done():
            future.add_done_callback(self._take_back)
            raise psycopg2.OperationalError("No connection in time")
        return future.result()

    def counts(self) -> dict[str, int]:
        conns = self.conns
        return {"free": len(conns.free), "connecting": len(conns.pending), "dead": len(conns.dead)}

    async def stop_connecting(self) -> None:
        tasks = list(self._connecting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def start_connecting(self, connection: Connection) -> asyncio.Task[Connection]:
        task = self.loop.create_task(self._connected(connection))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        return task

    def failure(self) -> BaseException:
        """Why there is no connection; a new exception each time, for each caller adds its own traceback."""
        if self._last_error is None:
            return psycopg2.OperationalError("The server did not take a connection in time.")
        return type(self._last_error)(*self._last_error.args)

    async def establish(self, connection: Connection) -> None:
        """Raises what keeps the connection from being made, which is closed then."""
        try:
            async with asyncio.timeout(self.session.connect_timeout):
                await connection.establish()
        except (OSError, psycopg2.OperationalError) as exc:
            connection.discard()
            raise self._named(exc) from exc
        except BaseException:
            connection.discard()
            raise

    async def _connected(self, connection: Connection) -> Connection:
        """Raises errors of psycopg2 only: momoko expects no others, and tells nobody what they were."""
        try:
            await self.backoff.wait()
            await self.establish(connection)
        except (Exception, asyncio.CancelledError) as exc:
            self.backoff.failed()
            self._last_error = exc
            raise psycopg2.OperationalError(str(exc)) from exc
        self.backoff.succeeded()
        self.connected_before = True
        self._last_error = None
        return connection

    def _named(self, exc: Exception) -> psycopg2.OperationalError:
        alias, reason = self.session.wrapper.alias, str(exc)
        if isinstance(exc, TimeoutError):
            reason = f"The server did not answer in {self.session.connect_timeout:g} seconds."
        return psycopg2.OperationalError(f"Cannot connect to database {alias!r}: {reason}")

    def _take_back(self, future: asyncio.Future[Connection]) -> None:
        """For a `getconn` that nobody waits for any more."""
        if future.exception() is None and not self.closed:  # closing takes all of them
            self.putconn(future.result())

    def _new_connection(self) -> Any:
        return self._connect_one(Connection(self))

    def _connect_one(self, conn: Connection) -> Any:
        future = super()._connect_one(conn)
        future.add_done_callback(self._revive)
        return future

    def _revive(self, future: object) -> None:
        """When one of several attempts has failed, momoko leaves its waiter to the others."""
        if self.conns.waiting_queue and self.conns.dead and not self.closed:
            self._reanimate()


class Connection(momoko.Connection, lease.Connection):  # type: ignore[misc]
    """momoko's connection, with a psycopg2 connection that is replaced after `discard`."""

    connection: Any

    def __init__(self, pool: Pool) -> None:
        super().__init__("", ioloop=pool.ioloop)
        self.pool = pool
        self.connection = None
        self.fileno = -1

    def connect(self) -> asyncio.Task[Connection]:
        return self.pool.start_connecting(self)

    async def establish(self) -> None:
        """Connects, and makes it what Django makes of its own."""
        session = self.pool.session
        await self._open(await aside(session.parameters))
        session.adopt(self.connection)
        timezone = self.connection.get_parameter_status("TimeZone")
        for sql, params in session.statements(timezone):
            await asyncio.shield(self.execute(sql, params))
        if session.wants_extension_types:
            cursor = await asyncio.shield(self.execute(EXTENSION_TYPES))
            session.register_types(self.connection, cursor.fetchall())

    @property
    def lost(self) -> bool:
        closed: bool = self.closed
        return closed

    @property
    def in_transaction(self) -> bool:
        status: int = self.connection.get_transaction_status()
        return status != extensions.TRANSACTION_STATUS_IDLE

    @property
    def in_error(self) -> bool:
        status: int = self.connection.get_transaction_status()
        return status == extensions.TRANSACTION_STATUS_INERROR

    def start(self, sql: str, params: Params) -> asyncio.Future[Any]:
        no_params = params is not None and not params
        self.statement = self.execute(sql, NO_PARAMS if no_params else params)
        return self.statement

    async def result(self, outcome: Any) -> Result:
        cursor = outcome
        if cursor.description is None:
            return Result([], None, cursor.rowcount, cursor.query)
        rows: list[Row] = cursor.fetchmany(SLICE)
        while len(rows) < cursor.rowcount:
            await asyncio.sleep(0)
            rows += cursor.fetchmany(SLICE)
        return Result(rows, cursor.description, cursor.rowcount, cursor.query)

    async def stop(self, statement: asyncio.Future[Any]) -> None:
        try:
            async with asyncio.timeout(base.CANCEL_TIMEOUT):
                if not statement.done():
                    await aside(cancel.prepare(self.connection))
                    await asyncio.wait({statement})
        except (TimeoutError, psycopg2.Error):
            self.discard()
        # Its end is looked at, so that asyncio does not report it.
        statement.exception()

    def discard(self) -> None:
        if not self.closed:
            self.ioloop.remove_handler(self.fileno)
            self.close()
        # The number may be another connection's by the time this one is made anew.
        self.fileno = -1
        if self.statement is not None and not self.statement.done():
            self.statement.set_exception(psycopg2.OperationalError("The connection was given up."))
            # Looked at, for it may be that nobody waits.
            self.statement.exception()

    async def mogrify(self, sql: str, params: Params) -> bytes:
        sent: bytes = self.connection.cursor().mogrify(sql, params)
        return sent

    def is_alive(self) -> bool:
        """An idle connection has nothing to read, save that the server ended it."""
        return not self.closed and not self._readable.poll(0)

    async def _open(self, params: dict[str, Any]) -> None:
        connection = self.connection = psycopg2.connect(**params, async_=True)
        while (state := connection.poll()) != extensions.POLL_OK:
            # libpq takes a new socket for each address and each try at encryption.
            await ready(connection.fileno(), write=state == extensions.POLL_WRITE)
        self.fileno = connection.fileno()
        self.server_version = connection.server_version
        self._readable = select.poll()
        self._readable.register(self.fileno, select.POLLIN)


class _NoticeConnection(NoticeConnection):
    def __init__(self, wrapper: Any, connection: Connection) -> None:
        self._wrapper = wrapper
        self._connection = connection

    async def execute(self, sql: str) -> None:
        with self._wrapper.wrap_database_errors:
            await asyncio.shield(self._connection.start(sql, None))

    def watch(self, news: Callable[[], object]) -> None:
        asyncio.get_running_loop().add_reader(self._connection.fileno, news)

    def unwatch(self) -> None:
        asyncio.get_running_loop().remove_reader(self._connection.fileno)

    def drain(self) -> list[Notice]:
        raw = self._connection.connection
        with self._wrapper.wrap_database_errors:
            raw.poll()
        found, raw.notifies[:] = list(raw.notifies), []
        return [Notice(it.channel, it.payload, it.pid) for it in found]

    def close(self) -> None:
        self._connection.discard()
