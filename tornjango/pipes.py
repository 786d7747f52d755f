"""Bytes on their way from a worker thread to the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

from tornado.iostream import StreamClosedError

#: What may wait for the loop before the thread is made to wait, in bytes; and one part more.
AHEAD = 128 * 1024


class Pipe:
    """Writes on the loop, in order and at once, what a thread puts in; what has come meanwhile goes together.

    The loop is woken once for all of that: a wait for each part would cost more than most parts do.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, write: Callable[[bytes], Awaitable[None]]
    ) -> None:
        """``write`` is awaited on ``loop``; when it raises ``StreamClosedError`` nobody takes any more."""
        self._loop = loop
        self._write = write
        self._changed = threading.Condition()
        # All below by whoever holds that.
        self._parts: list[bytes] = []
        #: Bytes that were put in, and are not written.
        self._waiting = 0
        self._is_writing = False
        self._is_over = False
        self._error: Exception | None = None

    # In the thread

    def put(self, part: bytes) -> None:
        """Waits while there is too much; raises ``StreamClosedError`` when nobody takes it, or what writing raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting < AHEAD or self._is_over)
            self._check()
            self._parts.append(part)
            self._waiting += len(part)
            if self._is_writing:
                return
            self._is_writing = True
        self._loop.call_soon_threadsafe(self._begin)

    def flush(self) -> None:
        """Returns when all is written; raises as `put`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_writing or self._is_over)
            self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._is_over:
            raise StreamClosedError

    # On the loop

    def _begin(self) -> None:
        self._task = self._loop.create_task(self._write_all())

    async def _write_all(self) -> None:
        try:
            while parts := self._take():
                await self._write(parts)
                self._wrote(len(parts))
        except StreamClosedError:
            self._end(None)
        except Exception as exc:  # noqa: BLE001  the thread raises it
            self._end(exc)
        except BaseException:
            self._end(None)
            raise

    def _take(self) -> bytes:
        with self._changed:
            parts, self._parts = self._parts, []
            if not self._waiting:
                self._is_writing = False
                self._changed.notify()
            return b"".join(parts)

    def _wrote(self, count: int) -> None:
        with self._changed:
            self._waiting -= count
            self._changed.notify()

    def _end(self, error: Exception | None) -> None:
        with self._changed:
            self._error, self._is_over = error, True
            self._changed.notify()
