"""A connection of Django's own, for a lease and a pool: it blocks, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from django.db import connections
from django.db.utils import OperationalError

from tornjango.db.compiler import Params
from tornjango.db.engines import base, blocking, lease
from tornjango.db.engines.aside import Thread, aside
from tornjango.db.engines.base import Result

logger = logging.getLogger("tornjango.db")

T = TypeVar("T")

#: How long a statement that was told to end is given before it is told once more, in seconds: it may not have begun by
#: the first time. Each time twice as long.
FIRST_PAUSE, LAST_PAUSE = 0.05, 5.0


class Connection(lease.Connection):
    """One of Django's connections, and the thread in which everything is done to it: there it is ``connections[alias]``.

    On PostgreSQL it is always in autocommit, and transactions are begun and ended by statements. Elsewhere that is left
    to Django, which knows how each driver does it.

    One call at a time. ``learn`` is called in the thread when it has connected.
    """

    def __init__(self, wrapper: Any, learn: Callable[[Any], None]) -> None:
        self.wrapper = wrapper
        #: Those that are open, to be closed with the transaction at the latest.
        self.cursors: list[Any] = []
        #: Done when it is closed, after `leave`.
        self.gone: asyncio.Future[None] | None = None
        #: Its statement did not end in time, and runs on.
        self.given_up = False
        self._farewell = ""
        self._learn = learn
        self._postgres = wrapper.vendor == "postgresql"
        self._cancelled = False
        self._hurry: asyncio.Future[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._thread = Thread(f"tornjango-db-{wrapper.alias}")
        self._thread.call(partial(connections.__setitem__, wrapper.alias, wrapper))

    async def open(self) -> None:
        await self._thread.call(self._open)

    @property
    def context(self) -> Any:
        """psycopg's, which knows how to adapt values for it."""
        raw = self.wrapper.connection
        return raw if hasattr(raw, "adapters") else None

    @property
    def farewell(self) -> str:
        return self._farewell

    @property
    def lost(self) -> bool:
        return self.given_up or self.gone is not None or blocking.is_closed(self.wrapper)

    @property
    def in_transaction(self) -> bool:
        if self._postgres:
            return blocking.in_transaction(self.wrapper)
        return not self.wrapper.autocommit

    @property
    def in_error(self) -> bool:
        return blocking.transaction_status(self.wrapper) == blocking.IN_ERROR

    @property
    def in_doubt(self) -> bool:
        """Whether only the server can say if it is good: the settings want it asked, or there was an error.

        Of PostgreSQL's a driver knows it after an error.
        """
        errors = self.wrapper.errors_occurred and not self._postgres
        return bool(errors or self.wrapper.health_check_enabled)

    def is_alive(self) -> bool:
        close_at = self.wrapper.close_at
        aged = close_at is not None and time.monotonic() >= close_at
        return not (self.lost or aged or _has_news(self.wrapper.connection))

    def is_idle(self) -> bool:
        return not self.lost and not self.in_transaction

    # Calls

    def call(self, fn: Callable[..., T], *args: Any, spare: bool = False) -> asyncio.Future[T]:
        """``fn(wrapper, *args)`` in the thread, as a statement of this connection.

        One to be ``spared`` is stopped only after CANCEL_TIMEOUT, or when there is `hurry`.
        """
        if self.gone is not None:
            raise self._lost()
        self._cancelled, self._stopping = False, None
        self._hurry = asyncio.get_running_loop().create_future() if spare else None
        call: asyncio.Future[T] = self._thread.call(partial(self._do, fn, args))
        self.statement = call
        return call

    def start(self, sql: str, params: Params) -> asyncio.Future[Any]:
        if self._postgres or not self.in_transaction:
            return self.call(blocking.execute, sql, params)
        # Interrupted, SQLite would roll back the whole transaction, without the owner's knowing.
        spare = self.wrapper.vendor == "sqlite" and not _only_reads(sql)
        return self.call(blocking.execute_in_transaction, sql, params, spare=spare)

    async def result(self, outcome: Any) -> Result:
        result: Result = outcome
        return result

    def begin(self, wrapper: Any) -> asyncio.Future[Any]:
        return super().begin(wrapper) if self._postgres else self.call(blocking.begin)

    def commit(self) -> asyncio.Future[Any]:
        return super().commit() if self._postgres else self.call(blocking.commit, self._taken())

    async def roll_back(self) -> None:
        if self._postgres:
            await super().roll_back()
        else:
            await asyncio.shield(self.call(blocking.reset, self._taken()))

    async def mogrify(self, sql: str, params: Params) -> bytes:
        # It asks no server: one that is not waited for to its end is no statement to be stopped.
        work = partial(self._do, blocking.mogrify, (sql, params))
        return await asyncio.shield(self._thread.call(work))

    def keep(self, cursor: Any) -> Any:
        self.cursors.append(cursor)
        return cursor

    def _taken(self) -> list[Any]:
        cursors, self.cursors = self.cursors, []
        return cursors

    # In the thread

    def _open(self) -> None:
        self.wrapper.ensure_connection()
        self._learn(self.wrapper)

    def _do(self, fn: Callable[..., T], args: tuple[Any, ...]) -> T:
        if self.gone is not None:
            # Django would connect anew.
            raise self._lost()
        if self._cancelled:
            raise OperationalError("The statement was cancelled before it was sent.")
        return fn(self.wrapper, *args)

    def _close(self) -> None:
        """Its engine finds it as long as this is to be done."""
        blocking.close(self.wrapper)

    # Its ends

    async def stop(self, statement: asyncio.Future[Any]) -> None:
        self._cancelled = True
        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_task(self._stop(statement))
        # There may be several who want it stopped; the server is told for all of them.
        await asyncio.shield(self._stopping)

    def hurry(self) -> None:
        if self._hurry is not None and not self._hurry.done():
            self._hurry.set_result(None)

    def discard(self) -> None:
        """Where the driver cannot be kept from waiting, the connection is only given up until the statement has ended."""
        statement = self.statement
        if statement is not None and not statement.done():
            self.given_up = not self._cut()
            statement.set_exception(self._lost())
            _look_at(statement)
        if not self.given_up:
            self.leave()

    def leave(self) -> None:
        """Closes it, and ends its thread, as soon as that has done what it does."""
        if self.gone is None:
            self.gone = self._thread.call(self._close)
            self._thread.end()

    async def recover(self) -> None:
        """Returns when it is as good as new after it was given up, or closed."""
        await self._thread.call(partial(blocking.reset, self.wrapper, self._taken()))
        self.given_up, self._farewell = False, ""

    async def _stop(self, statement: asyncio.Future[Any]) -> None:
        if self._hurry is not None:
            await _wait({statement, self._hurry}, base.CANCEL_TIMEOUT)
        try:
            async with asyncio.timeout(base.CANCEL_TIMEOUT):
                await self._tell_until_done(statement)
        except TimeoutError:
            self._farewell = f"A statement that was cancelled did not end within {base.CANCEL_TIMEOUT:g} seconds."
            self.discard()
        _look_at(statement)

    async def _tell_until_done(self, statement: asyncio.Future[Any]) -> None:
        pause = FIRST_PAUSE
        while not statement.done():
            await self._tell()
            await _wait({statement}, pause)
            pause = min(2 * pause, LAST_PAUSE)

    async def _tell(self) -> None:
        """Returns when the server has been told: later, it might hear of it in the middle of another statement."""
        try:
            cancel = _canceller(self.wrapper.connection)
            if cancel is not None:
                await aside(cancel)
        except self.wrapper.Database.Error as exc:
            logger.debug(
                "A statement on database %r could not be cancelled: %s", self.wrapper.alias, exc
            )

    def _cut(self) -> bool:
        """Has the driver see that the server has gone, though it has not: False where it waits otherwise than psycopg."""
        if not self._postgres:
            return False
        raw = self.wrapper.connection
        # It may have closed its socket at this moment: then it waits no more.
        with (
            contextlib.suppress(OSError, self.wrapper.Database.Error),
            socket.socket(fileno=os.dup(raw.fileno())) as it,
        ):
            it.shutdown(socket.SHUT_RDWR)
        return True

    def _lost(self) -> OperationalError:
        return OperationalError(
            f"The connection to database {self.wrapper.alias!r} was given up. {self._farewell}".rstrip()
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
    if not hasattr(raw, "fileno"):
        return False
    readable = select.poll()
    readable.register(raw.fileno(), select.POLLIN)
    return bool(readable.poll(0))


def _only_reads(sql: str) -> bool:
    return sql.lstrip()[:6].upper() == "SELECT"


async def _wait(futures: set[asyncio.Future[Any]], limit: float) -> None:
    """Until one of them is done."""
    await asyncio.wait(futures, timeout=limit, return_when=asyncio.FIRST_COMPLETED)


def _look_at(future: asyncio.Future[Any]) -> None:
    """Nobody waits for it: asyncio need not report its error."""
    if future.done() and not future.cancelled():
        future.exception()
