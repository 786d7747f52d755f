from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import wraps
from types import TracebackType
from typing import ParamSpec, TypeVar

from django.db.transaction import Atomic
from django.db.utils import DEFAULT_DB_ALIAS

from tornjango import asyncdjango, green

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
        try:
            self._atomic = Atomic(*self._options)
            await asyncdjango.run(self._atomic.__enter__)
        except BaseException:
            await self._leave_scope()
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await asyncdjango.run(self._atomic.__exit__, exc_type, exc, traceback)
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
        outer = green.scope.get()
        self._own: green.Scope | None = None
        self._lock: green.TaskLock | None = None
        if outer is None or not outer.admits(task):
            self._own = green.Scope(task, outer)
            green.scope.set(self._own)
        elif outer.lock is not None:
            await outer.lock.__aenter__()
            self._lock = outer.lock

    async def _leave_scope(self) -> None:
        if self._own is not None:
            green.scope.set(self._own.outer)
            await self._own.end()
        elif self._lock is not None:
            await self._lock.__aexit__(None, None, None)
