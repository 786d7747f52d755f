from __future__ import annotations

import asyncio
import threading

import pytest

from tornjango.db.engines.aside import aside


@pytest.mark.gen_test
async def test_the_result_and_the_error_come_back() -> None:
    assert await aside(threading.current_thread) is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        await aside(lambda: 1 // 0)


@pytest.mark.gen_test
async def test_cancelled_it_leaves_the_thread_to_run_on() -> None:
    go, done = threading.Event(), threading.Event()

    def work() -> None:
        go.wait(5)
        done.set()

    task = asyncio.create_task(aside(work))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    assert done.wait(5)


def test_a_loop_that_has_ended_is_not_told() -> None:
    go = threading.Event()
    threads: list[threading.Thread] = []

    def work() -> None:
        threads.append(threading.current_thread())
        go.wait(5)

    async def leave() -> None:
        task = asyncio.ensure_future(aside(work))
        while not threads:  # noqa: ASYNC110 - for a thread to start
            await asyncio.sleep(0)
        task.cancel()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    go.set()
    threads[0].join(5)
    assert not threads[0].is_alive()
