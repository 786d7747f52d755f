from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from asgiref.sync import sync_to_async
from django.db import connections, transaction
from django.db.transaction import TransactionManagementError
from django.db.utils import Error, InterfaceError

from tornjango import green
from tornjango.conf import get_config
from tornjango.db.compiler import Params, Row
from tornjango.db.engines import blocking
from tornjango.db.engines.base import Engine, Lease, Result, Stream
from tornjango.db.engines.gate import Gate

T = TypeVar("T")

_background: set[asyncio.Task[Any]] = set()


class PlainEngine(Engine):
    """Django's own connection of the caller, in a process that tornjango does not serve: a test, a shell, a command.

    A transaction that is open there is met, and a transaction begun in it is a savepoint. There is but the one connection:
    statements of other tasks that come meanwhile are in the transaction, too, and their own transactions wait for its
    end. A statement that was cancelled runs to its end in its thread, and what comes after it waits.
    """

    name = "plain"

    def __init__(self, alias: str) -> None:
        super().__init__(alias)
        self._turns: WeakKeyDictionary[asyncio.AbstractEventLoop, Turns] = WeakKeyDictionary()

    async def execute(self, sql: str, params: Params = None) -> Result:
        await self._turns_here().settle()
        return await self.call(blocking.execute_alone, sql, params)

    async def begin(self) -> PlainLease:
        """Nested, in the task that has begun the one before."""
        lease = PlainLease(self, self._turns_here())
        await lease.enter()
        return lease

    async def stream(self, sql: str, params: Params = None) -> PlainStream:
        """In no transaction but that which is open, if one is."""
        await self._turns_here().settle()
        return await PlainStream.open(self, sql, params)

    async def mogrify(self, sql: str, params: Params) -> bytes:
        return await self.call(blocking.mogrify, sql, params)

    def status(self) -> dict[str, Any]:
        return {"engine": self.name}

    async def call(self, fn: Callable[..., T], *args: Any) -> T:
        """``fn(wrapper, *args)`` in the thread of the caller's connection."""

        def on_connection() -> T:
            return fn(connections[self.alias], *args)

        return await sync_to_async(on_connection)()

    def _turns_here(self) -> Turns:
        loop = asyncio.get_running_loop()
        if loop not in self._turns:
            self._turns[loop] = Turns(self.alias)
        return self._turns[loop]


class Turns:
    """The transactions of an event loop: nested ones, the innermost last, of one task at a time."""

    def __init__(self, alias: str) -> None:
        config = get_config()
        self.gate = Gate(
            f"database {alias!r}", size=1, queue=config.POOL_QUEUE, timeout=config.POOL_TIMEOUT
        )
        self.leases: list[PlainLease] = []

    async def enter(self, lease: PlainLease) -> None:
        await self.settle()
        if not self.leases or self.leases[-1].task is not lease.task:
            await self.gate.enter()
        self.leases.append(lease)

    async def settle(self) -> None:
        """Returns when those that were abandoned are rolled back: what comes next is not to be in them."""
        while self.leases and self.leases[-1].ended:
            await self.leases[-1].left()

    def leave(self, lease: PlainLease) -> None:
        self.leases.remove(lease)
        if not self.leases:
            self.gate.leave()

    def inside(self, lease: PlainLease) -> list[PlainLease]:
        """Those nested in a lease, the innermost first."""
        return self.leases[: self.leases.index(lease) : -1]


class PlainLease(Lease):
    def __init__(self, engine: PlainEngine, turns: Turns) -> None:
        self.task = asyncio.current_task()
        self._engine = engine
        self._turns = turns
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._atomic = transaction.Atomic(engine.alias, savepoint=True, durable=False)
        self._cursors: list[Any] = []
        self._leaving: asyncio.Task[None] | None = None
        self.ended = False

    async def enter(self) -> None:
        """Called once. Cancelled, or when it fails, the lease has ended."""
        await self._turns.enter(self)
        entering = asyncio.ensure_future(self._engine.call(self._enter))
        try:
            await green.finish(entering)
        except BaseException:
            self.ended = True
            if entering.exception() is None:
                await self._leave(commit=False)
            else:
                self._turns.leave(self)
            raise

    async def execute(self, sql: str, params: Params = None) -> Result:
        await self._check()
        return await self._engine.call(blocking.execute_in_transaction, sql, params)

    async def stream(self, sql: str, params: Params = None) -> PlainStream:
        await self._check()
        return await PlainStream.open(self._engine, sql, params, self._cursors)

    async def mogrify(self, sql: str, params: Params) -> bytes:
        await self._check()
        return await self._engine.call(blocking.mogrify, sql, params)

    async def commit(self) -> None:
        """Raises TransactionManagementError while one that is nested in it is open."""
        if self.ended:
            return
        if self._turns.inside(self):
            raise TransactionManagementError(
                f"Transactions on database {self._engine.alias!r} are nested here (see PlainEngine): "
                "end the inner one first."
            )
        await self._end(commit=True)

    async def rollback(self) -> None:
        """Those nested in it are rolled back as well."""
        if not self.ended:
            await self._end(commit=False)

    def abandon(self) -> None:
        if self.ended:
            return
        self.ended = True
        # A loop that is closed leaves the transaction to whoever closes the connection.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._start_leaving, False, context=self._context)

    async def left(self) -> None:
        """Returns when it is rolled back, unless it had another end under way."""
        await asyncio.wait({self._start_leaving(False)})

    async def _end(self, *, commit: bool) -> None:
        self.ended = True
        await green.finish(self._start_leaving(commit))

    def _start_leaving(self, commit: bool) -> asyncio.Task[None]:
        if self._leaving is None:
            self._leaving = _spawn(self._leave(commit=commit))
        return self._leaving

    async def _leave(self, *, commit: bool) -> None:
        for lease in self._turns.inside(self):
            lease.ended = True
            await lease.left()
        try:
            await self._engine.call(self._exit, commit)
        finally:
            self._turns.leave(self)

    async def _check(self) -> None:
        if self.ended:
            raise InterfaceError(f"The transaction on database {self._engine.alias!r} has ended.")
        await self._turns.settle()

    # In the thread

    def _enter(self, wrapper: Any) -> None:
        self._atomic.__enter__()

    def _exit(self, wrapper: Any, commit: bool) -> None:
        blocking.close_cursors(wrapper, self._cursors)
        try:
            if commit:
                blocking.check_transaction(wrapper)
        except Error:
            self._roll_back()
            raise
        if commit:
            self._atomic.__exit__(None, None, None)
        else:
            self._roll_back()

    def _roll_back(self) -> None:
        transaction.set_rollback(True, using=self._engine.alias)
        self._atomic.__exit__(None, None, None)


class PlainStream(Stream):
    """A cursor of Django's, as its ``iterator()`` uses."""

    def __init__(self, engine: PlainEngine, cursor: Any) -> None:
        self._engine = engine
        self.description = cursor.description
        self._cursor = cursor
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._closed = False

    @classmethod
    async def open(
        cls, engine: PlainEngine, sql: str, params: Params, cursors: list[Any] | None = None
    ) -> PlainStream:
        """``cursors`` is where a lease keeps those that it closes when it ends."""
        opening = asyncio.ensure_future(engine.call(blocking.stream, sql, params))
        try:
            cursor = await green.finish(opening)
        except asyncio.CancelledError:
            if not opening.cancelled() and opening.exception() is None:
                await engine.call(blocking.close_cursors, [opening.result()])
            raise
        if cursors is not None:
            cursors.append(cursor)
        return cls(engine, cursor)

    async def fetch(self, size: int) -> list[Row]:
        rows = await self._engine.call(_fetch, self._cursor, size)
        self.description = self._cursor.description
        return rows

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await self._engine.call(blocking.close_cursors, [self._cursor])

    def abandon(self) -> None:
        # Without the loop, the cursor is closed when it is collected.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._start_closing, context=self._context)

    def _start_closing(self) -> None:
        _spawn(self.close())


def _fetch(wrapper: Any, cursor: Any, size: int) -> list[Row]:
    return list(cursor.fetchmany(size))


def _spawn(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = asyncio.get_running_loop().create_task(work)
    _background.add(task)
    task.add_done_callback(_background.discard)
    return task
