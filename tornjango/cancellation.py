"""When a request is cancelled: as soon as its client leaves, but not while a worker thread is busy with it.

asyncio would let go of the thread, which goes on all the same: with a request that is closed by then, to a response that
nobody closes. So the thread gets to its end, or to where it waits for async code, and the request is cancelled there. What
waits in the queue for a thread has not begun, and is not begun any more. And what has answered is not cancelled either.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import traceback
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, TypeVar

from asgiref.sync import sync_to_async

T = TypeVar("T")

AsyncFunction = Callable[..., Coroutine[Any, Any, Any]]


class Cancellation:
    """Calls ``cancel`` on the loop, at most once; nothing after ``settle``."""

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

    def settle(self) -> None:
        """There is a response, and somebody who is going to close it."""
        self._cancel = None

    def begin(self) -> None:
        """For a thread; raises ``CancelledError`` if it need not begin."""
        with self._lock:
            if self._requested:
                raise asyncio.CancelledError
            self._busy += 1

    def go_on(self) -> None:
        with self._lock:
            self._busy += 1

    def end(self) -> None:
        """On the loop: what the thread did is known there."""
        with self._lock:
            self._busy -= 1
            now = self._requested and not self._busy
        if now:
            self._loop.call_soon(self._now)

    def _now(self) -> None:
        if self._cancel is not None:
            self._cancel()


#: That of the request which the running code is for.
current: contextvars.ContextVar[Cancellation | None] = contextvars.ContextVar(
    "tornjango.cancellation", default=None
)


def settle() -> None:
    cancellation = current.get()
    if cancellation is not None:
        cancellation.settle()


_CANCELLED = object()


class _Errand:
    """One call in a worker thread."""

    def __init__(self, fn: Callable[..., Any], cancellation: Cancellation) -> None:
        self.fn = fn
        self.cancellation = cancellation
        self.begun = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            self.cancellation.begin()
            self.begun = True
            return self.fn(*args, **kwargs)
        except asyncio.CancelledError as exc:
            # Its frames hold the future that it is the outcome of. And raised here, it would be the error of another,
            # which asgiref may have forgotten by then.
            traceback.clear_frames(exc.__traceback__)
            return _CANCELLED

    def end(self) -> None:
        if self.begun:
            self.cancellation.end()


def in_thread(fn: Callable[..., Any]) -> AsyncFunction:
    """``fn`` as ``sync_to_async`` makes it, but its request is not cancelled while it runs."""
    plain = sync_to_async(fn)

    @wraps(fn, updated=())
    async def call(*args: Any, **kwargs: Any) -> Any:
        cancellation = current.get()
        if cancellation is None:
            return await plain(*args, **kwargs)
        errand = _Errand(fn, cancellation)
        try:
            result = await sync_to_async(errand)(*args, **kwargs)
        finally:
            errand.end()
        if result is _CANCELLED:
            raise asyncio.CancelledError
        return result

    if hasattr(fn, "__self__"):
        call.__self__ = fn.__self__  # type: ignore[attr-defined]
    return call


def from_thread(fn: AsyncFunction) -> AsyncFunction:
    """Async code for which a thread of `in_thread` waits: it may be cancelled."""

    @wraps(fn)
    async def call(*args: Any, **kwargs: Any) -> Any:
        cancellation = current.get()
        if cancellation is None:
            return await fn(*args, **kwargs)
        cancellation.end()
        try:
            return await fn(*args, **kwargs)
        finally:
            cancellation.go_on()

    return call
