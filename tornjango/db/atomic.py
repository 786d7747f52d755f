from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from functools import wraps
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast

from asgiref.sync import async_to_sync, iscoroutinefunction
from django.db import connections
from django.db.transaction import Atomic
from django.db.utils import DEFAULT_DB_ALIAS

from tornjango import green

P = ParamSpec("P")
T = TypeVar("T")


class atomic:
    """``async with db.atomic():`` Django's ``transaction.atomic`` for async code; ``@db.atomic()`` for ``async def``.

    Inside, everything that the task does with the database is in the transaction: ``db.fetch`` and its like, Django's
    ``a``-prefixed methods, green code. It holds one connection, from its first statement on. Nested, it is a savepoint,
    unless ``savepoint`` is False. ``transaction.on_commit`` takes sync and async functions; they run after the commit,
    before the block is left. An exception rolls back, a cancellation too; one that comes in the middle of the commit is
    raised after it.

    The transaction is the task's own. Other tasks that are started inside the block (``gather``, ``create_task``) get a
    TransactionManagementError when they use the database while it is open.
    """

    def __init__(
        self, using: str | None = None, savepoint: bool = True, durable: bool = False
    ) -> None:
        """Raises RuntimeError, when entered, if it is ``durable`` and inside another one."""
        self._options = (using or DEFAULT_DB_ALIAS, savepoint, durable)

    async def __aenter__(self) -> None:
        await self._enter_scope()
        self._atomic, self._entered = Atomic(*self._options), False
        self._loan: _Loan | None = None
        try:
            await green.run(self._begin)
            if not green.is_served() and _here(self._wrapper.alias) is not self._wrapper:
                self._loan = _Loan(self._wrapper)
        except BaseException as exc:
            try:
                if self._entered:
                    # Cancelled, but a savepoint was made to its end.
                    await green.run(self._atomic.__exit__, type(exc), exc, exc.__traceback__)
            finally:
                await self._leave_scope()
            raise

    def _begin(self) -> None:
        self._atomic.__enter__()
        self._entered = True
        self._wrapper = connections[self._options[0]]

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._loan is not None:
            self._loan.end()
        try:
            await green.run(self._atomic.__exit__, exc_type, exc, traceback)
        finally:
            await self._leave_scope()

    def __call__(self, fn: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        @wraps(fn)
        async def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            async with type(self)(*self._options):
                return await fn(*args, **kwargs)

        return wrapper

    async def _enter_scope(self) -> None:
        task = asyncio.current_task()
        outer = green.current()
        self._own: green.Scope | None = None
        self._turn: AbstractAsyncContextManager[bool] | None = None
        if outer is not None and outer.admits(task):
            if outer.lock is None:
                return
            turn = outer.turn()
            if await turn.__aenter__():
                self._turn = turn
                return
            await turn.__aexit__(None, None, None)
        self._own = green.Scope(task, outer)
        green.enter(self._own)

    async def _leave_scope(self) -> None:
        if self._own is not None:
            try:
                self._own.end()
            finally:
                green.leave(self._own)
        elif self._turn is not None:
            await self._turn.__aexit__(None, None, None)


class _Loan:
    """In a process that tornjango does not serve: the connection of the thread that queries, for code on the loop.

    That may ask it about its transaction, and give it hooks for the commit; Django keeps it from the rest.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._before = _here(wrapper.alias)
        connections[wrapper.alias] = cast(Any, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)

    def on_commit(self, func: Callable[[], Any], robust: bool = False) -> None:
        if iscoroutinefunction(func):
            func = async_to_sync(func)
        self._wrapper.on_commit(func, robust)

    def end(self) -> None:
        alias = self._wrapper.alias
        if self._before is None:
            del connections[alias]
        else:
            connections[alias] = self._before


def _here(alias: str) -> Any:
    """The connection that this thread has been given; None if it has none."""
    return getattr(connections._connections, alias, None)  # type: ignore[attr-defined]


class shared_atomic:
    """Transactions for a piece of work that starts tasks of its own, a request: these are in them too.

    They take turns, statement by statement, or for the length of an ``async with db.atomic()`` of theirs. At the end
    whoever is in the middle of something is waited for; what is still to come from them is no more in the transactions.
    Where they are rolled back, after an error or when cancelled, whoever is in the middle of something is cancelled.
    """

    def __init__(self, aliases: Iterable[str]) -> None:
        self._aliases = aliases

    async def __aenter__(self) -> None:
        self._scope = green.Scope(asyncio.current_task(), green.current())
        self._atomics = AsyncExitStack()
        green.enter(self._scope)
        try:
            for alias in self._aliases:
                await self._atomics.enter_async_context(atomic(alias))
        except BaseException as exc:
            await self._end(type(exc), exc, exc.__traceback__)
            raise
        self._scope.lock = green.TaskLock()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._scope.lock is not None
        cancelled = await self._wait_for(self._scope.lock, failed=exc is not None)
        try:
            if cancelled is not None and exc is None:
                await self._end(type(cancelled), cancelled, cancelled.__traceback__)
            else:
                await self._end(exc_type, exc, traceback)
        finally:
            await self._scope.lock.__aexit__()
        if cancelled is not None:
            raise cancelled

    async def _wait_for(
        self, lock: green.TaskLock, *, failed: bool
    ) -> asyncio.CancelledError | None:
        cancelled = None
        while True:
            try:
                await asyncio.sleep(0)  # tasks that were just started go first
                if failed:
                    lock.cancel_others()
                await lock.__aenter__()
            except asyncio.CancelledError as exc:
                cancelled, failed = exc, True
            else:
                return cancelled

    async def _end(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commits or rolls back each of them, and leaves the scope."""
        try:
            async with self._scope.turn() if self._scope.lock else nullcontext():
                await self._atomics.__aexit__(exc_type, exc, traceback)
        finally:
            try:
                self._scope.end()
            finally:
                green.leave(self._scope)
