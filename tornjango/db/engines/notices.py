"""PostgreSQL's notifications, over one connection for all who listen to a database in this process.

The connection is opened for the first listener and closed after the last one. When it is lost it is made anew, and
every listener is told that it may have missed some: the server keeps nothing for who is not there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import NamedTuple, Self
from weakref import WeakSet

from django.db.utils import Error, InterfaceError, OperationalError

from tornjango.db.engines.backoff import Backoff

logger = logging.getLogger("tornjango.db")

#: Notices that wait for one listener; the server limits each to 8000 bytes.
QUEUE = 1000

#: Seconds of silence after which the server is asked whether it is there, and those it has for the answer.
SILENCE = 30.0
ANSWER = 10.0

#: PostgreSQL's NAMEDATALEN, less one: LISTEN would cut a longer name off.
NAME_BYTES = 63


class Notice(NamedTuple):
    """A notification, or, with a ``payload`` of None, word that some on its channel may have been missed.

    That comes when the connection had been lost and listens again, and when the listener was too slow by more than
    QUEUE: a reader reads the state anew, then, that it was to be told of.
    """

    channel: str
    payload: str | None
    #: Of the server's process that sent it.
    pid: int | None = None


class NoticeConnection(ABC):
    """A driver's connection, as notifications need it. Raises the errors of ``django.db.utils``."""

    @abstractmethod
    async def execute(self, sql: str) -> None: ...

    @abstractmethod
    def watch(self, news: Callable[[], object]) -> None:
        """Has ``news`` called whenever there may be something to `drain`, until `unwatch`."""

    @abstractmethod
    def unwatch(self) -> None: ...

    @abstractmethod
    def drain(self) -> list[Notice]:
        """What has come by now. Raises OperationalError when the connection is lost."""

    @abstractmethod
    def close(self) -> None: ...


class Listener:
    """What comes on some channels: an asynchronous iterator, for one task.

    Iterating opens it, if need be. A cancellation loses nothing. It is closed when it is forgotten, too.
    """

    def __init__(self, notices: Notices, channels: frozenset[str]) -> None:
        self.channels = channels
        self._notices = notices
        self._queue: deque[Notice] = deque()
        #: Channels of which some were left out since the queue has been full.
        self._gaps: set[str] = set()
        self._news = asyncio.Event()
        #: Done when the server listens; none before `open`.
        self._listening: asyncio.Future[None] | None = None
        self._end: Exception | None = None

    async def open(self) -> None:
        """Returns when the server listens: from now on nothing is missed unsaid. Opening twice is harmless.

        Raises OperationalError when the server cannot be reached, and may be called again then. Once open, a listener
        waits for a server that went away.
        """
        if self._end is not None:
            raise InterfaceError("The listener is closed.")
        if self._listening is None:
            self._listening = self._notices.add(self)
        await asyncio.shield(self._listening)

    async def aclose(self) -> None:
        """Whoever iterates comes to the end at once. Closing twice is harmless."""
        self._queue.clear()
        self.end(StopAsyncIteration())

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Notice:
        while not self._queue:
            if self._end is not None:
                raise self._end
            await self.open()
            if not self._queue and self._end is None:
                self._news.clear()
                await self._news.wait()
        return self._queue.popleft()

    def __del__(self) -> None:
        if getattr(self, "_listening", None) is not None and self._end is None:
            self._notices.forgotten()

    # For Notices

    @property
    def is_open(self) -> bool:
        return self._listening is not None and self._listening.done()

    def opened(self) -> None:
        if self._listening is not None and not self._listening.done():
            self._listening.set_result(None)

    def failed(self, exc: Exception) -> None:
        """It could not be opened, or was closed before it was."""
        future, self._listening = self._listening, None
        if future is not None and not future.done():
            future.set_exception(exc)
            # Looked at, for the caller may have been cancelled.
            future.exception()

    def put(self, notice: Notice) -> None:
        if len(self._queue) < QUEUE:
            self._gaps.clear()
            self._queue.append(notice)
        elif notice.channel not in self._gaps:
            self._gaps.add(notice.channel)
            self._queue.append(Notice(notice.channel, None))
        self._news.set()

    def end(self, how: Exception) -> None:
        if self._end is None:
            self._end = how
            self._notices.remove(self)
            self.failed(InterfaceError("The listener was closed."))
            self._news.set()


class Notices:
    """The notifications of one database. ``connect`` gives a connection, or raises errors of ``django.db.utils``."""

    def __init__(self, alias: str, connect: Callable[[], Awaitable[NoticeConnection]]) -> None:
        self.alias = alias
        self._connect = connect
        self._listeners: dict[str, WeakSet[Listener]] = {}
        self._backoff = Backoff()
        #: There is something to read, or somebody came or went.
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def listen(self, *channels: str) -> Listener:
        """Raises ValueError for a name that is none of PostgreSQL's."""
        if not channels:
            raise ValueError("listen() wants the name of a channel, or several.")
        for channel in channels:
            if not channel or "\0" in channel or len(channel.encode()) > NAME_BYTES:
                raise ValueError(
                    f"{channel!r} is no channel of PostgreSQL's: its name has 1 to {NAME_BYTES} bytes."
                )
        return Listener(self, frozenset(channels))

    @property
    def count(self) -> int:
        """How many listen."""
        return len(self._all())

    async def close(self) -> None:
        """Whoever listens gets an InterfaceError. Closing twice is harmless."""
        self._closed = True
        for listener in self._all():
            listener.end(self._closed_error())
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    # For Listener

    def add(self, listener: Listener) -> asyncio.Future[None]:
        """A future that is done when the server listens for it."""
        if self._closed:
            raise self._closed_error()
        self._loop = asyncio.get_running_loop()
        for channel in listener.channels:
            self._listeners.setdefault(channel, WeakSet()).add(listener)
        self._wake.set()
        if self._task is None:
            self._task = self._loop.create_task(self._run())
        return self._loop.create_future()

    def remove(self, listener: Listener) -> None:
        for channel in listener.channels:
            self._listeners.get(channel, WeakSet()).discard(listener)
        self._wake.set()

    def forgotten(self) -> None:
        """A listener was collected, in whichever thread; when its loop is closed, everything is."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._wake.set)

    def _closed_error(self) -> Exception:
        return InterfaceError(f"The pool of database {self.alias!r} is closed.")

    def _all(self) -> set[Listener]:
        return {listener for listeners in self._listeners.values() for listener in listeners}

    def _wanted(self) -> set[str]:
        self._listeners = {channel: them for channel, them in self._listeners.items() if them}
        return set(self._listeners)

    # The connection

    async def _run(self) -> None:
        """Follows the server, and does not give up while somebody listens."""
        try:
            while self._wanted():
                await self._backoff.wait()
                try:
                    await self._follow()
                except Exception as exc:  # noqa: BLE001 - who listens relies on it
                    self._interrupted(exc)
        finally:
            self._task = None

    async def _follow(self) -> None:
        connection = await self._connect()
        try:
            missed = {listener for listener in self._all() if listener.is_open}
            listening: set[str] = set()
            while wanted := self._wanted():
                self._wake.clear()
                await self._listen(connection, listening, wanted)
                self._tell(missed)
                self._deliver(connection.drain())
                await self._pause(connection)
        finally:
            connection.close()

    async def _listen(
        self, connection: NoticeConnection, listening: set[str], wanted: set[str]
    ) -> None:
        for channel in listening - wanted:
            await self._execute(connection, f"UNLISTEN {_quoted(channel)}")
            listening.discard(channel)
        for channel in wanted - listening:
            await self._execute(connection, f"LISTEN {_quoted(channel)}")
            listening.add(channel)
        self._backoff.succeeded()
        for listener in self._all():
            if listener.channels <= listening:
                listener.opened()

    def _tell(self, missed: set[Listener]) -> None:
        while missed:
            listener = missed.pop()
            for channel in listener.channels:
                listener.put(Notice(channel, None))

    def _deliver(self, notices: list[Notice]) -> None:
        for notice in notices:
            for listener in self._listeners.get(notice.channel, ()):
                listener.put(notice)

    async def _pause(self, connection: NoticeConnection) -> None:
        """Returns when there is something to do. A connection that is silent may be a dead one."""
        connection.watch(self._wake.set)
        try:
            async with asyncio.timeout(SILENCE):
                await self._wake.wait()
            return
        except TimeoutError:
            pass
        finally:
            connection.unwatch()
        await self._execute(connection, "SELECT 1")

    async def _execute(self, connection: NoticeConnection, sql: str) -> None:
        try:
            async with asyncio.timeout(ANSWER):
                await connection.execute(sql)
        except TimeoutError:
            raise OperationalError(f"The server did not answer in {ANSWER:g} seconds.") from None

    def _interrupted(self, exc: Exception) -> None:
        self._backoff.failed()
        listeners = self._all()
        if not isinstance(exc, Error):
            logger.error("Listening to database %r failed", self.alias, exc_info=exc)
        elif any(listener.is_open for listener in listeners):
            logger.warning(
                "Notifications of database %r are interrupted; connecting again: %s",
                self.alias,
                exc,
            )
        for listener in listeners:
            if not listener.is_open:
                self.remove(listener)
                error = OperationalError(f"Cannot listen to database {self.alias!r}: {exc}")
                error.__cause__ = exc
                listener.failed(error)


def _quoted(channel: str) -> str:
    return '"' + channel.replace('"', '""') + '"'
