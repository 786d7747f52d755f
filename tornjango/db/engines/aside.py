from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial
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
