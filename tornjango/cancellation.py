"""When a request is cancelled: as soon as its client leaves, but not while a worker thread is busy with it.

asyncio would let go of the thread, which goes on all the same: with a request that is closed by then, to a response that
nobody closes. So the thread gets to its end, or to where it waits for async code, and the request is cancelled there. What
waits in the queue for a thread has not begun, and is not begun any more.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

T = TypeVar("T")


class Cancellation:
    """Calls ``cancel`` on the loop, at most once; ``drop`` lets go of it."""

    __slots__ = ("_busy", "_cancel", "_lock", "_loop", "_requested")

    def __init__(self, cancel: Callable[[], object]) -> None:
        self._cancel: Callable[[], object] | None = cancel
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._busy = 0
        self._requested = False

    def request(self) -> None:
        """Cancels on the loop's next turn, or when no thread is busy any more; harmless a second time."""
        with self._lock:
            now = not (self._busy or self._requested)
            self._requested = True
        if now:
            # Not before its first step: a task that is cancelled then does not run at all.
            self._loop.call_soon(self._now)

    def drop(self) -> None:
        self._cancel = None

    def begin(self, again: bool = False) -> None:
        """A thread begins, or goes on ``again``; raises ``CancelledError`` if it need not begin."""
        with self._lock:
            if self._requested and not again:
                raise asyncio.CancelledError
            self._busy += 1

    def end(self) -> None:
        with self._lock:
            self._busy -= 1
            now = self._requested and not self._busy
        if now:
            self._loop.call_soon_threadsafe(self._now)

    def _now(self) -> None:
        if self._cancel is not None:
            self._cancel()


#: That of the request which the running code is for.
current: contextvars.ContextVar[Cancellation | None] = contextvars.ContextVar(
    "tornjango.cancellation", default=None
)


def uncut(fn: Callable[..., T]) -> Callable[..., T]:
    """Sync code for a worker thread, whose request is not cancelled while it runs."""

    @wraps(fn, updated=())
    def run(*args: Any, **kwargs: Any) -> T:
        cancellation = current.get()
        if cancellation is None:
            return fn(*args, **kwargs)
        cancellation.begin()
        try:
            return fn(*args, **kwargs)
        finally:
            cancellation.end()

    return run


@contextmanager
def waiting() -> Iterator[None]:
    """Inside, a thread that `uncut` keeps busy waits for async code, which may be cancelled."""
    cancellation = current.get()
    if cancellation is None:
        yield
        return
    cancellation.end()
    try:
        yield
    finally:
        cancellation.begin(again=True)
