from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


async def aside(fn: Callable[[], T]) -> T:
    """``fn()`` in a thread of its own: for what a driver does by blocking, and only for that.

    Not in one of the workers: they may all be waiting for what happens here, and one that hangs on a frozen server
    would be lost to them. Nor does a process wait for this thread when it ends. Cancelled, it leaves ``fn`` to run on.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    threading.Thread(target=_run, args=(fn, loop, future), name="tornjango-db", daemon=True).start()
    return await future


class Thread:
    """A thread that makes one call after the other, in the order they came. It ends with `end`, after the last of them.

    Like those of `aside` it does not keep the process from ending.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=_make, args=(self._calls,), name=name, daemon=True).start()

    def call(self, fn: Callable[[], T]) -> asyncio.Future[T]:
        """The future is of the running loop; cancelled, or set, it does not keep ``fn`` from running."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._calls.put(partial(_run, fn, loop, future))
        return future

    def end(self) -> None:
        self._calls.put(None)


def _make(calls: SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        # What it made is not kept until the next one comes.
        del call


def _run(fn: Callable[[], T], loop: asyncio.AbstractEventLoop, future: asyncio.Future[T]) -> None:
    try:
        settle = partial(_settle, future, future.set_result, fn())
    except BaseException as exc:  # noqa: BLE001 - it is raised where it is awaited
        settle = partial(_settle, future, future.set_exception, exc)
    # The loop may be closed by now: then nobody waits.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(settle)


def _settle(future: asyncio.Future[Any], settle: Callable[[Any], None], outcome: Any) -> None:
    if not future.done():
        settle(outcome)
