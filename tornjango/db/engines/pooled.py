from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from django.db.utils import InterfaceError

from tornjango.conf import Config
from tornjango.db.compiler import Params
from tornjango.db.engines import base
from tornjango.db.engines.base import Engine, Result, Stream, left_open
from tornjango.db.engines.gate import Gate
from tornjango.db.engines.lease import Connection, PoolLease
from tornjango.db.engines.stream import CursorStream

C = TypeVar("C", bound=Connection)


class PooledEngine(Engine, Generic[C]):
    """A pool of up to ``POOL_SIZE`` connections, opened as they are needed.

    When the server goes away, callers wait for it within ``POOL_TIMEOUT``; on a pool that never could connect they are
    told at once. ``OperationalError`` says why there is no connection, ``Overloaded`` that others hold them all.
    """

    #: What `begin` gives.
    lease: type[PoolLease] = PoolLease

    def __init__(self, alias: str, config: Config) -> None:
        super().__init__(alias)
        self._gate = Gate(
            f"database {alias!r}",
            size=self._size(config),
            queue=config.POOL_QUEUE,
            timeout=config.POOL_TIMEOUT,
        )
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
            lease = await self.lease.begin(
                self.wrapper, connection, partial(self._release, connection)
            )
        self._leases.add(lease)
        return lease

    async def stream(self, sql: str, params: Params = None) -> Stream:
        return await CursorStream.of_query(await self.begin(), sql, params)

    async def mogrify(self, sql: str, params: Params) -> bytes:
        with self.wrapper.wrap_database_errors:
            connection = await self._acquire()
            try:
                return await connection.mogrify(sql, params)
            finally:
                self._release(connection)

    async def context(self) -> Any:
        with self.wrapper.wrap_database_errors:
            connection = await self._acquire()
            self._release(connection)
            return connection.context

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._gate.close(InterfaceError)
        await self._stop_connecting()
        await self._end_statements()
        self._close_idle()

    def status(self) -> dict[str, Any]:
        return {
            "engine": self.name,
            "size": self._gate.size,
            "in_use": self._gate.inside,
            "waiting": self._gate.waiting,
            **self._counts(),
        }

    # The connections, which the engine of a driver keeps

    def _size(self, config: Config) -> int:
        return config.POOL_SIZE

    @abstractmethod
    async def _acquire(self) -> C:
        """A connection that is alive, once the gate let the caller in; it is given to `_release`."""

    @abstractmethod
    def _release(self, connection: C) -> None:
        """Takes it back, and lets go of the gate. A connection in a transaction is discarded."""

    @abstractmethod
    def _busy(self) -> Iterable[C]: ...

    @abstractmethod
    async def _stop_connecting(self) -> None: ...

    @abstractmethod
    def _close_idle(self) -> None: ...

    @abstractmethod
    def _counts(self) -> dict[str, int]: ...

    # A statement on one of them

    async def _run(self, connection: C, sql: str, params: Params) -> Result:
        with self._held(connection):
            outcome = await connection.outcome(connection.start(sql, params))
            if connection.in_transaction:
                raise left_open(sql, self.alias)
            return await connection.result(outcome)

    @contextmanager
    def _held(self, connection: C) -> Iterator[None]:
        """Releases it at the end; where its user is cancelled, when the statement has ended."""
        try:
            yield
        except asyncio.CancelledError:
            self._abandon(connection)
            raise
        except BaseException:
            self._release(connection)
            raise
        self._release(connection)

    def _abandon(self, connection: C) -> None:
        statement = connection.statement
        assert statement is not None
        drain = asyncio.get_running_loop().create_task(self._drain(connection, statement))
        self._drains.add(drain)
        drain.add_done_callback(self._drains.discard)

    async def _drain(self, connection: C, statement: asyncio.Future[Any]) -> None:
        """Ends a statement that nobody waits for. Only then is the connection free, or else given up."""
        try:
            await connection.stop(statement)
        finally:
            self._release(connection)

    async def _end_statements(self) -> None:
        for held in list(self._leases):
            held.revoke(
                f"The pool of database {self.alias!r} was closed in a transaction, which was rolled back."
            )
        running = list(self._busy())
        try:
            async with asyncio.timeout(base.CANCEL_TIMEOUT):
                await asyncio.gather(*(it.stop(it.statement) for it in running if it.statement))
                await self._gate.emptied()
        except TimeoutError:
            for connection in self._busy():
                connection.discard()
            await self._gate.emptied()
