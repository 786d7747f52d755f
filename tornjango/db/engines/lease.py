from __future__ import annotations

import asyncio
import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Self, TypeVar

from django.db.utils import Error, InterfaceError, OperationalError

from tornjango import green
from tornjango.db.compiler import Params
from tornjango.db.engines import base
from tornjango.db.engines.base import Result
from tornjango.db.engines.stream import CursorLease

T = TypeVar("T")

_background: set[asyncio.Task[None]] = set()


class Connection(ABC):
    """A driver's connection, as a lease uses it. Errors are the driver's, or Django's. What is not overridden is PostgreSQL's."""

    #: The one that runs, or ran last.
    statement: asyncio.Future[Any] | None = None

    @property
    def context(self) -> Any:
        """As of `base.Engine.context`."""
        return None

    @property
    def farewell(self) -> str:
        """Why it was lost, if that was said while it was idle."""
        return ""

    @property
    @abstractmethod
    def lost(self) -> bool:
        """Whether it is known to be closed, by whomever."""

    @property
    @abstractmethod
    def in_transaction(self) -> bool: ...

    @property
    @abstractmethod
    def in_error(self) -> bool:
        """Whether its transaction was aborted by an error."""

    @abstractmethod
    def start(self, sql: str, params: Params) -> asyncio.Future[Any]:
        """Sends a statement. The future is done when the statement has ended; whoever waits must not cancel it."""

    def begin(self, wrapper: Any) -> asyncio.Future[Any]:
        """A transaction, as `start` does it."""
        return self.start(begin_sql(wrapper), None)

    def commit(self) -> asyncio.Future[Any]:
        return self.start("COMMIT", None)

    async def roll_back(self) -> None:
        """When no statement runs."""
        if self.in_transaction:
            await asyncio.shield(self.start("ROLLBACK", None))

    def hurry(self) -> None:  # noqa: B027
        """The transaction is to be rolled back: a statement need not be spared for its sake."""

    def outcome(self, statement: asyncio.Future[Any]) -> Awaitable[Any]:
        """The statement's, for who may be cancelled while he waits."""
        return asyncio.shield(statement)

    @abstractmethod
    async def result(self, outcome: Any) -> Result:
        """What a statement gave, from what its future did."""

    @abstractmethod
    async def stop(self, statement: asyncio.Future[Any]) -> None:
        """Has the server end the statement; returns when it has ended.

        Raises nothing: where that takes more than CANCEL_TIMEOUT, or the server cannot be told, it discards.
        """

    @abstractmethod
    def discard(self) -> None:
        """Closes at once. A statement that is under way fails with an OperationalError."""

    @abstractmethod
    async def mogrify(self, sql: str, params: Params) -> bytes: ...


class PoolLease(CursorLease):
    """A lease of a pool's connection, whatever the driver.

    ``release`` is called once, when the transaction has ended or the connection is lost, and not before its last
    statement has ended.
    """

    def __init__(self, wrapper: Any, connection: Connection, release: Callable[[], None]) -> None:
        self._wrapper = wrapper
        self._connection = connection
        self._release = release
        self._loop = asyncio.get_running_loop()
        self._statement: asyncio.Future[Any] | None = None
        #: Ends the last statement, which was cancelled.
        self._stopping: asyncio.Task[None] | None = None
        self._ended = False
        self._revoked: str | None = None

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):
            message = f"A transaction on database {self._wrapper.alias!r} was never ended; it is rolled back."
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)
            self.abandon()

    @classmethod
    async def begin(cls, wrapper: Any, connection: Connection, release: Callable[[], None]) -> Self:
        """Raises, once it is released, what keeps the transaction from beginning."""
        lease = cls(wrapper, connection, release)
        try:
            with wrapper.wrap_database_errors:
                await lease._wait(connection.begin(wrapper))
        except BaseException:
            lease.abandon()
            raise
        return lease

    @property
    def aborted(self) -> bool:
        return self._ended or self._connection.lost or self._connection.in_error

    async def execute(self, sql: str, params: Params = None) -> Result:
        with self._wrapper.wrap_database_errors:
            await self._settle()
            self._check()
            if not self._connection.in_transaction:
                # A statement of the owner's ended it. The next one begins another, as Django's drivers do.
                await self._wait(self._connection.begin(self._wrapper))
            return await self._run(sql, params)

    async def mogrify(self, sql: str, params: Params) -> bytes:
        with self._wrapper.wrap_database_errors:
            self._check()
            return await self._connection.mogrify(sql, params)

    async def context(self) -> Any:
        self._check()
        return self._connection.context

    async def commit(self) -> None:
        if self._revoked:
            raise OperationalError(self._revoked)
        if self._ended:
            return
        self._ended = True
        task = self._loop.create_task(self._commit())
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            await self._finish_soon(task)
            raise

    async def rollback(self) -> None:
        if not self._ended:
            self._ended = True
            await green.finish(self._roll_back())

    def abandon(self) -> None:
        """May be called in any thread, for anything may be collected there."""
        if self._ended:
            return
        self._ended = True
        # Without its loop the connection has gone, too.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._spawn, self._roll_back)

    def revoke(self, reason: str) -> None:
        """Rolls back, in the background, while the owner thinks that it holds it: he gets an OperationalError."""
        if not self._ended:
            self._revoked = reason
            self.abandon()

    def _check(self) -> None:
        if self._revoked:
            raise OperationalError(self._revoked)
        if self._ended:
            raise InterfaceError(f"The transaction on database {self._wrapper.alias!r} has ended.")
        if self._connection.lost:
            raise self._lost()

    def _lost(self) -> OperationalError:
        return OperationalError(
            f"The connection to database {self._wrapper.alias!r} was lost in a transaction, and with it all that was "
            f"done there. Begin again from its start. {self._connection.farewell}".rstrip()
        )

    async def _settle(self) -> None:
        """Returns when a statement that was cancelled has ended."""
        while self._stopping is not None and not self._stopping.done():
            await asyncio.shield(self._stopping)

    async def _run(self, sql: str, params: Params) -> Result:
        outcome = await self._wait(self._connection.start(sql, params))
        return await self._connection.result(outcome)

    async def _wait(self, statement: asyncio.Future[T]) -> T:
        """Cancelled, it has the statement stopped in the background."""
        self._statement = statement
        try:
            return await asyncio.shield(statement)
        except asyncio.CancelledError:
            self._stopping = self._spawn(lambda: self._connection.stop(statement))
            raise

    async def _commit(self) -> None:
        try:
            await self._settle()
            if self._connection.lost:
                raise self._lost()
            await self._send_commit()
        finally:
            self._release()

    async def _send_commit(self) -> None:
        try:
            with self._wrapper.wrap_database_errors:
                self._statement = self._connection.commit()
                await asyncio.shield(self._statement)
        except Error as exc:
            if not self._connection.lost:
                raise
            raise OperationalError(
                f"The connection to database {self._wrapper.alias!r} was lost during COMMIT: whether the transaction "
                "was committed is unknown. Look for what it wrote before it is done again."
            ) from exc

    async def _finish_soon(self, task: asyncio.Task[None]) -> None:
        limit = self._loop.call_later(base.CANCEL_TIMEOUT, self._connection.discard)
        try:
            await green.finish(asyncio.wait({task}))
        finally:
            limit.cancel()
            # Looked at, so that asyncio does not report it: the caller was cancelled.
            if task.done() and not task.cancelled():
                task.exception()

    async def _roll_back(self) -> None:
        connection = self._connection
        try:
            async with asyncio.timeout(base.CANCEL_TIMEOUT):
                with self._wrapper.wrap_database_errors:
                    connection.hurry()
                    await self._settle()
                    if self._statement is not None and not self._statement.done():
                        await connection.stop(self._statement)
                    if not connection.lost:
                        await connection.roll_back()
        except (TimeoutError, Error):
            # The server rolls back what a lost connection has begun.
            connection.discard()
        finally:
            self._release()

    def _spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        task = self._loop.create_task(work())
        _background.add(task)
        task.add_done_callback(_background.discard)
        return task


def begin_sql(wrapper: Any) -> str:
    """With the isolation level that the settings say: Django has one for transactions only, not for autocommit."""
    # There is no such module without a driver for PostgreSQL.
    from django.db.backends.postgresql.psycopg_any import IsolationLevel

    level = wrapper.settings_dict["OPTIONS"].get("isolation_level")
    if level is None:
        return "BEGIN"
    return f"BEGIN ISOLATION LEVEL {IsolationLevel(level).name.replace('_', ' ')}"
