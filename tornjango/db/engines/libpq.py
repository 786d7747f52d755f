"""A connection of libpq's on the event loop, by psycopg's `pq`: statements go in as bytes, results come out as they are.

Its socket is watched as long as it is open: registering it for each statement would cost more than the statement. So
what comes while nothing runs (a notification, the server's good-bye) is read when it comes.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from typing import Any, TypeAlias

from psycopg import OperationalError, ProgrammingError, pq
from psycopg.pq.abc import PGcancelConn, PGconn, PGresult

from tornjango.db.engines.aside import aside
from tornjango.db.engines.readiness import ready

# As numbers: looking up an enum's member costs more than comparing.
READING = int(pq.PollingStatus.READING)
WRITING = int(pq.PollingStatus.WRITING)
POLL_OK = int(pq.PollingStatus.OK)
BAD = int(pq.ConnStatus.BAD)
COPYING = frozenset({pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH})
FATAL_ERROR = int(pq.ExecStatus.FATAL_ERROR)

# As psycopg's cursors say it.
COPY_REFUSED = "COPY cannot be used with this method; use copy() instead"
SEVERITY = pq.DiagnosticField.SEVERITY_NONLOCALIZED

# From libpq 17 on there is a way to cancel that does not block.
CANCEL_ON_LOOP = hasattr(pq.PGconn, "cancel_conn") and pq.version() >= 170000

#: Hands a statement to libpq.
Send: TypeAlias = Callable[[], None]
#: Makes something of a statement's results, or raises.
Check: TypeAlias = Callable[[list[PGresult]], Any]


class Link:
    """One connection, one statement at a time. Errors are psycopg's."""

    def __init__(self, pgconn: PGconn) -> None:
        self.pgconn = pgconn
        #: Whether it is closed, by whomever.
        self.lost = False
        #: Called with each notification of a channel that the connection listens to.
        self.on_notify: Callable[[Any], object] = _nobody
        #: Called when the connection is lost.
        self.on_lost: Callable[[], object] = _nothing
        self._loop = asyncio.get_running_loop()
        self._fd = pgconn.socket
        self._future: asyncio.Future[Any] | None = None
        self._check: Check = _unchecked
        self._ended: asyncio.Future[None] | None = None
        self._results: list[PGresult] = []
        self._steps: list[Send] = []
        self._unsent = False
        #: What the server said when it ended the connection, while nothing ran.
        self.farewell = ""
        self._readable = select.poll()
        self._readable.register(self._fd, select.POLLIN)
        pgconn.nonblocking = 1
        pgconn.notice_handler = self._notice
        self._loop.add_reader(self._fd, self._on_readable)

    @classmethod
    async def open(cls, conninfo: str) -> Link:
        """Raises OperationalError with libpq's own words. Looks up host names by blocking: give it addresses."""
        pgconn = pq.PGconn.connect_start(conninfo.encode())
        try:
            if pgconn.status == BAD or not await _polled(pgconn.connect_poll, pgconn):
                raise OperationalError(pgconn.get_error_message())
            return cls(pgconn)
        except BaseException:
            pgconn.finish()
            raise

    @property
    def running(self) -> bool:
        return self._future is not None

    def start(self, check: Check, *steps: Send) -> asyncio.Future[Any]:
        """Sends a statement in one or more steps, each when the one before has succeeded.

        The future gets what ``check`` makes of the results of the last step that was sent, errors of the server among
        them; or an OperationalError, when the connection is lost. It may be cancelled: the statement runs on.
        """
        if self.lost:
            raise OperationalError("the connection is closed")
        first, *self._steps = steps
        self._send(first)
        self._check = check
        self._future = self._loop.create_future()
        return self._future

    async def stop(self) -> None:
        """Has the server end the statement that runs; returns when it has ended."""
        self._steps.clear()
        if self.running:
            await self._tell_to_cancel()
            await self._end()

    def is_alive(self) -> bool:
        """Whether it can be used, as far as can be told without asking the server; for one that runs nothing."""
        if self.lost or not self._readable.poll(0):
            return not self.lost
        self._on_readable()
        # What is there still is the socket's end.
        return not self.lost and not self._readable.poll(0)

    def close(self) -> None:
        """At once. A statement that is under way fails with an OperationalError."""
        self._lose(OperationalError("The connection was given up."))

    def _send(self, step: Send) -> None:
        try:
            step()
            self._flush()
        except OperationalError as exc:
            if self.pgconn.status == BAD:
                self._lose(exc)
            raise

    def _flush(self) -> None:
        unsent = bool(self.pgconn.flush())
        if unsent != self._unsent:
            self._unsent = unsent
            if unsent:
                self._loop.add_writer(self._fd, self._on_writable)
            else:
                self._loop.remove_writer(self._fd)

    def _on_writable(self) -> None:
        try:
            self._flush()
        except OperationalError as exc:
            self._lose(exc)

    def _on_readable(self) -> None:
        try:
            self.pgconn.consume_input()
            if self._unsent:
                self._flush()
            if self._future is not None:
                self._read_results()
            self._read_notifications()
        except OperationalError as exc:
            self._lose(exc)
        if self.farewell:
            self._lose(OperationalError(self.farewell))

    def _read_results(self) -> None:
        pgconn = self.pgconn
        while not pgconn.is_busy():
            result = pgconn.get_result()
            if result is None:
                self._next_step()
                return
            self._results.append(result)
            if result.status in COPYING:
                # There is no other way out that is short: the other side waits for data, or has any amount of it.
                self._lose(ProgrammingError(COPY_REFUSED))
                return

    def _next_step(self) -> None:
        results, self._results = self._results, []
        if self._steps and not _failed(results):
            self._send(self._steps.pop(0))
            return
        self._finish(results)
        if self.pgconn.status == BAD:
            self._lose(OperationalError("the connection is closed"))

    def _finish(self, outcome: list[PGresult] | Exception) -> None:
        future, self._future = self._future, None
        if future is not None and not future.done():
            self._settle(future, outcome)
        if self._ended is not None:
            self._ended.set_result(None)
            self._ended = None

    def _settle(self, future: asyncio.Future[Any], outcome: list[PGresult] | Exception) -> None:
        try:
            if isinstance(outcome, Exception):
                raise outcome
            future.set_result(self._check(outcome))
        except Exception as exc:  # noqa: BLE001 - it is raised where the statement is waited for
            future.set_exception(exc)
            # Looked at, for it may be that nobody waits.
            future.exception()

    def _read_notifications(self) -> None:
        # libpq would keep them for ever.
        while not self.lost and (notification := self.pgconn.notifies()) is not None:
            self.on_notify(notification)

    def _notice(self, notice: PGresult) -> None:
        if ends_connection(notice):
            # The server says why it ends the connection; the socket's end may come later.
            self.farewell = notice.get_error_message()

    def _lose(self, exc: Exception) -> None:
        if self.lost:
            return
        self.lost = True
        # libpq may have closed the socket, whose number may be another one's soon.
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self.pgconn.notice_handler = None
        self.pgconn.finish()
        results, self._results = self._results, []
        # What the server said is better than that its socket was closed after it.
        self._finish(results if _failed(results) else exc)
        self.on_lost()

    async def _tell_to_cancel(self) -> None:
        if not CANCEL_ON_LOOP:
            await aside(self.pgconn.get_cancel().cancel)
            return
        cancel = self.pgconn.cancel_conn()
        try:
            cancel.start()
            if not await _polled(cancel.poll, cancel):
                raise OperationalError(f"cancellation failed: {cancel.get_error_message()}")
        finally:
            cancel.finish()

    async def _end(self) -> None:
        if self.running:
            self._ended = self._ended or self._loop.create_future()
            await asyncio.shield(self._ended)


async def _polled(poll: Callable[[], int], owner: PGconn | PGcancelConn) -> bool:
    """Whether what was started succeeds. libpq takes a new socket for each address and each try at encryption."""
    while (status := poll()) in (READING, WRITING):
        await ready(owner.socket, write=status == WRITING)
    return status == POLL_OK


def ends_connection(result: PGresult) -> bool:
    """Whether it is what the server says before it ends a connection."""
    return result.error_field(SEVERITY) in (b"FATAL", b"PANIC")


def _failed(results: list[PGresult]) -> bool:
    return any(result.status == FATAL_ERROR for result in results)


def _unchecked(results: list[PGresult]) -> list[PGresult]:
    return results


def _nobody(notification: Any) -> None: ...


def _nothing() -> None: ...
