from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tornado.iostream import StreamClosedError

from tests.serving import reached
from tornjango.pipes import AHEAD, Pipe


class Written:
    """Takes what is written, as fast as its gate lets it."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def __call__(self, chunk: bytes) -> None:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.chunks.append(chunk)


async def in_thread(fn: Callable[[Pipe], Any], write: Callable[[bytes], Awaitable[None]]) -> Any:
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as pool:
        return await loop.run_in_executor(pool, fn, Pipe(loop, write))


@pytest.mark.gen_test
async def test_parts_are_written_in_order_and_all_of_them() -> None:
    written = Written()

    def feed(pipe: Pipe) -> None:
        for number in range(20_000):
            pipe.put(b"%d," % number)
        pipe.flush()

    await in_thread(feed, written)
    assert b"".join(written.chunks) == b"".join(b"%d," % number for number in range(20_000))


@pytest.mark.gen_test
async def test_a_part_does_not_wait_for_the_next() -> None:
    written, came = Written(), threading.Event()

    async def write(chunk: bytes) -> None:
        await written(chunk)
        came.set()

    def feed(pipe: Pipe) -> bool:
        for part in (b"one", b"two"):
            came.clear()
            pipe.put(part)
            assert came.wait(5)
        return True

    assert await in_thread(feed, write)
    assert written.chunks == [b"one", b"two"]


@pytest.mark.gen_test
async def test_a_thread_waits_for_a_writer_that_is_slow() -> None:
    written, count, full = Written(), [0], threading.Event()
    written.gate.clear()

    def feed(pipe: Pipe) -> None:
        for _ in range(100):
            pipe.put(bytes(AHEAD // 4))
            count[0] += 1
            if count[0] == 4:
                full.set()
        pipe.flush()

    feeding = asyncio.create_task(in_thread(feed, written))
    await reached(full)
    await asyncio.sleep(0.05)
    assert count[0] == 4
    written.gate.set()
    await feeding
    assert sum(map(len, written.chunks)) == 25 * AHEAD


@pytest.mark.parametrize("error", [ValueError("no"), StreamClosedError()])
@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.gen_test
async def test_what_writing_raises_is_raised_in_the_thread(error: Exception, waits: bool) -> None:
    written = Written()
    written.error = error

    def feed(pipe: Pipe) -> None:
        pipe.put(bytes(AHEAD if waits else 1))
        with pytest.raises(type(error)):
            pipe.put(b"more") if waits else pipe.flush()
        with pytest.raises(type(error)):
            pipe.put(b"and more")

    await in_thread(feed, written)


@pytest.mark.gen_test
async def test_nothing_put_in_is_nothing_written() -> None:
    written = Written()
    await in_thread(lambda pipe: pipe.flush(), written)
    assert written.chunks == []
