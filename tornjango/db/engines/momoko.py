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
from functools import partial
from typing import Any
from weakref import WeakSet

import momoko
import psycopg2
from django.db.transaction import TransactionManagementError
from django.db.utils import InterfaceError
from psycopg2 import extensions
from tornado.ioloop import IOLoop

from tornjango.conf import Config
from tornjango.db.compiler import Params, Row
from tornjango.db.engines import base, cancel, lease
from tornjango.db.engines.aside import aside
from tornjango.db.engines.backoff import Backoff
from tornjango.db.engines.base import Engine, Result
from tornjango.db.engines.gate import Gate
from tornjango.db.engines.lease import PoolLease
from tornjango.db.engines.momoko_session import MomokoSession
from tornjango.db.engines.session import EXTENSION_TYPES
from tornjango.db.engines.stream import CursorStream

# Rows made of what the server sent before other tasks get their turn: a few milliseconds.
SLICE = 1000

# What a pool counts before it has connections.
NOTHING = {"free": 0, "connecting": 0, "dead": 0}


class _NoParams(tuple[Any, ...]):
    """Empty parameters that momoko takes for parameters."""

    def __bool__(self) -> bool:
        return True


NO_PARAMS = _NoParams()


class MomokoEngine(Engine):
    """A pool of up to ``POOL_SIZE`` connections, opened as they are needed.

    When the server goes away, callers wait for it within ``POOL_TIMEOUT``; on a pool that never could connect they are
    told at once. ``OperationalError`` says why there is no connection, ``Overloaded`` that others hold them all.
    """

    name = "momoko"

    def __init__(self, alias: str, config: Config) -> None:
        super().__init__(alias)
        self._session = MomokoSession(self.wrapper)
        self._gate = Gate(
            f"database {alias!r}",
            size=config.POOL_SIZE,
            queue=config.POOL_QUEUE,
            timeout=config.POOL_TIMEOUT,
        )
        self._made_pool: Pool | None = None
        self._leases: WeakSet[PoolLease] = WeakSet()
        self._drains: set[asyncio.Task[None]] = set()
        self._closed = False

    async def open(self) -> None:
        with self.wrapper.wrap_database_errors:
            self._release(await self._acquire())

    async def execute(self, sql: str, params: Params = None) -> Result:
        with self.wrapper.wrap_database_errors:
            return await self._run(await self._acquire(), sql, params)

    async def begin(self) -> PoolLease:
        with self.wrapper.wrap_database_errors:
            connection = await self._acquire()
            lease = await PoolLease.begin(
                self.wrapper, connection, partial(self._release, connection)
            )
        self._leases.add(lease)
        return lease

    async def stream(self, sql: str, params: Params = None) -> CursorStream:
        return await CursorStream.of_query(await self.begin(), sql, params)

    async def mogrify(self, sql: str, params: Params) -> bytes:
        with self.wrapper.wrap_database_errors:
            connection = await self._acquire()
            try:
                return connection.mogrify(sql, params)
            finally:
                self._release(connection)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._gate.close(InterfaceError)
        if self._made_pool is not None:
            await self._made_pool.stop_connecting()
            await self._end_statements(self._made_pool)
            self._made_pool.close()

    def status(self) -> dict[str, Any]:
        return {
            "engine": self.name,
            "size": self._gate.size,
            "in_use": self._gate.inside,
            "waiting": self._gate.waiting,
            **(self._made_pool.counts() if self._made_pool else NOTHING),
        }

    # A connection for one caller

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
        """A connection that is alive; it is given to `_release`, or to `_abandon`."""
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

    # A statement on it

    async def _run(self, connection: Connection, sql: str, params: Params) -> Result:
        statement = None
        try:
            statement = connection.start(sql, params)
            outcome = await asyncio.shield(statement)
            self._refuse_transaction(connection, sql)
            result = await connection.result(outcome)
        except asyncio.CancelledError:
            assert statement is not None
            self._abandon(connection, statement)
            raise
        except BaseException:
            self._release(connection)
            raise
        self._release(connection)
        return result

    def _refuse_transaction(self, connection: Connection, sql: str) -> None:
        if connection.in_transaction:
            raise TransactionManagementError(
                f"{sql[:80]!r} left a transaction open on database {self.alias!r}; it is rolled back. "
                "A connection is held for one statement: for more, use db.atomic(), or transaction.atomic() in sync code."
            )

    def _abandon(self, connection: Connection, statement: asyncio.Future[Any]) -> None:
        drain = self._pool.loop.create_task(self._drain(connection, statement))
        self._drains.add(drain)
        drain.add_done_callback(self._drains.discard)

    async def _drain(self, connection: Connection, statement: asyncio.Future[Any]) -> None:
        """Ends a statement that nobody waits for. Only then is the connection free, or else given up."""
        try:
            await connection.stop(statement)
        finally:
            self._release(connection)

    async def _end_statements(self, pool: Pool) -> None:
        for held in list(self._leases):
            held.revoke(
                f"The pool of database {self.alias!r} was closed in a transaction, which was rolled back."
            )
        running = list(pool.conns.busy)
        try:
            async with asyncio.timeout(base.CANCEL_TIMEOUT):
                await asyncio.gather(*(it.stop(it.statement) for it in running if it.statement))
                await self._gate.emptied()
        except TimeoutError:
            for connection in list(pool.conns.busy):
                connection.discard()
            await self._gate.emptied()


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
        if self.conns.all_dead and not self.conns.dead:
            # momoko wants its connect() called first, which opens connections before they are needed.
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

    async def _connected(self, connection: Connection) -> Connection:
        """Raises errors of psycopg2 only: momoko expects no others, and tells nobody what they were."""
        try:
            await self.backoff.wait()
            async with asyncio.timeout(self.session.connect_timeout):
                await connection.establish()
        except (Exception, asyncio.CancelledError) as exc:
            connection.discard()
            self.backoff.failed()
            self._last_error = self._as_django_knows_it(exc)
            raise psycopg2.OperationalError(str(exc)) from exc
        self.backoff.succeeded()
        self.connected_before = True
        self._last_error = None
        return connection

    def _as_django_knows_it(self, exc: BaseException) -> BaseException:
        reason = str(exc)
        if isinstance(exc, TimeoutError):
            reason = f"The server did not answer in {self.session.connect_timeout:g} seconds."
        elif not isinstance(exc, (OSError, psycopg2.OperationalError)):
            return exc
        alias = self.session.wrapper.alias
        return psycopg2.OperationalError(f"Cannot connect to database {alias!r}: {reason}")

    def _take_back(self, future: asyncio.Future[Connection]) -> None:
        """For a `getconn` that nobody waits for any more."""
        if future.exception() is None:
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
    #: The one that runs, or ran last.
    statement: asyncio.Future[Any] | None = None

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

    def mogrify(self, sql: str, params: Params) -> bytes:
        sent: bytes = self.connection.cursor().mogrify(sql, params)
        return sent

    def is_alive(self) -> bool:
        """An idle connection has nothing to read, save that the server ended it."""
        return not self.closed and not self._readable.poll(0)

    async def _open(self, params: dict[str, Any]) -> None:
        connection = self.connection = psycopg2.connect(**params, async_=True)
        while (state := connection.poll()) != extensions.POLL_OK:
            # libpq takes a new socket for each address and each try at encryption.
            await _ready(connection.fileno(), write=state == extensions.POLL_WRITE)
        self.fileno = connection.fileno()
        self.server_version = connection.server_version
        self._readable = select.poll()
        self._readable.register(self.fileno, select.POLLIN)


async def _ready(fd: int, *, write: bool) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    add = loop.add_writer if write else loop.add_reader
    remove = loop.remove_writer if write else loop.remove_reader
    add(fd, _set, future)
    try:
        await future
    finally:
        remove(fd)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
