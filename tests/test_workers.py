from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.signals import request_finished, request_started
from django.db import connection, transaction
from greenlet import getcurrent

from tests.serving import until
from tornjango.exceptions import Overloaded
from tornjango.workers import PER_REQUEST, Workers


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers(threads=2, queue=1)
    yield workers
    workers.close()


def name() -> str:
    return threading.current_thread().name


@pytest.mark.gen_test
async def test_sync_to_async_goes_to_the_pool_after_enter(workers: Workers) -> None:
    workers.enter()
    assert (await sync_to_async(name)()).startswith("tornjango-worker")
    assert (await asyncio.create_task(sync_to_async(name)())).startswith("tornjango-worker")


@pytest.mark.gen_test
async def test_async_code_called_from_a_worker_comes_back_to_its_thread(workers: Workers) -> None:
    """A sync middleware around a sync view: one thread for both, or a small pool would wait for itself."""
    workers.enter()

    def outer() -> tuple[str, str]:
        return name(), async_to_sync(sync_to_async(name))()

    for _ in range(3):
        pairs = await asyncio.gather(*(sync_to_async(outer)() for _ in range(2)))
        assert all(one == two for one, two in pairs)


@pytest.mark.gen_test
async def test_a_full_queue_is_an_error_at_once_and_passes(workers: Workers) -> None:
    workers.enter()
    go = threading.Event()
    calls = [asyncio.ensure_future(sync_to_async(go.wait)(10)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="All 2 worker threads are busy and 1 calls wait"):
        await sync_to_async(name)()
    go.set()
    assert await asyncio.gather(*calls) == [True] * 3
    assert await sync_to_async(name)()


@pytest.mark.gen_test
async def test_a_cancelled_call_leaves_its_place_in_the_queue(workers: Workers) -> None:
    workers.enter()
    go = threading.Event()
    busy = [asyncio.ensure_future(sync_to_async(go.wait)(10)) for _ in range(2)]
    waiting = asyncio.ensure_future(sync_to_async(name)())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    go.set()
    await asyncio.gather(*busy)
    again = [sync_to_async(name)() for _ in range(3)]
    assert len(await asyncio.gather(*again)) == 3


@pytest.mark.gen_test
async def test_connections_are_closed_on_the_thread_that_opened_them(workers: Workers) -> None:
    workers.enter()

    def opens() -> Any:
        with connection.cursor() as cursor:
            cursor.execute("select pg_backend_pid()")
            return cursor.fetchone()[0], connection.connection

    _, driver_connection = await sync_to_async(opens)()
    # CONN_MAX_AGE is 0; the call's future is done before the thread has tidied up after it.
    await sync_to_async(name)()
    await sync_to_async(name)()
    assert driver_connection.closed


@pytest.mark.gen_test
async def test_an_abandoned_transaction_is_rolled_back_and_reported(
    workers: Workers, error_log: list[Any]
) -> None:
    workers.enter()

    def begins() -> None:
        transaction.atomic().__enter__()
        with connection.cursor() as cursor:
            cursor.execute("select 1")

    def is_clean() -> bool:
        return not connection.in_atomic_block and not connection.savepoint_ids

    await sync_to_async(begins)()
    for _ in range(4):
        assert await sync_to_async(is_clean)()
    assert "left a transaction open on database 'default'" in error_log.pop().getMessage()


def test_what_django_does_per_request_is_taken_over_and_given_back() -> None:
    def connected() -> list[bool]:
        receivers = {signal: signal._live_receivers(None)[0] for signal in signals}
        return [receiver in receivers[signal] for signal, receiver in PER_REQUEST]

    signals: Any = (request_started, request_finished)
    assert all(connected())
    first, second = Workers(1, 1), Workers(1, 1)
    assert not any(connected())
    second.close()
    first.close()
    first.close()
    assert all(connected())


@pytest.mark.gen_test
async def test_a_thread_that_ends_leaves_no_greenlet_behind(workers: Workers) -> None:
    """Whoever finds one searches everything that the process holds, on the loop's thread, for who may still need it."""
    workers.enter()
    found = await sync_to_async(lambda: weakref.ref(getcurrent().parent))()
    assert found() is not None
    workers.close()
    # What is left of a thread is cleared away by the main thread, between two steps.
    await until(lambda: found() is None)
