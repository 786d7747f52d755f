from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable

import pytest

from tornjango.comet.waiters import Waiter, Waiters

FAR = 60.0


@pytest.fixture
def waiters() -> Waiters:
    return Waiters()


def _deadline(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def _turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def _park(
    waiters: Waiters, *channels: str, done: Callable[[], None] = lambda: None
) -> asyncio.Task[None]:
    async def park() -> None:
        with waiters.registered(channels) as waiter:
            await waiter.wait(_deadline(FAR))
        done()

    return asyncio.create_task(park())


@pytest.mark.gen_test
async def test_notice_wakes_the_readers_of_its_channel_only(waiters: Waiters) -> None:
    one, both, other = _park(waiters, "a"), _park(waiters, "b", "a"), _park(waiters, "b")
    await _turns()
    waiters.notify(["a"])
    await asyncio.gather(one, both)
    assert not other.done()
    assert waiters.count() == 1
    waiters.notify(["b"])
    await other
    assert waiters.count() == 0


@pytest.mark.gen_test
async def test_notice_before_waiting_is_remembered_once(waiters: Waiters) -> None:
    with waiters.registered(["a"]) as waiter:
        waiters.notify(["a"])
        await _turns()
        await waiter.wait(_deadline(FAR))
        started = asyncio.get_running_loop().time()
        await waiter.wait(_deadline(0.02))
        assert asyncio.get_running_loop().time() - started >= 0.01


@pytest.mark.gen_test
async def test_wait_ends_at_its_deadline(waiters: Waiters) -> None:
    with waiters.registered(["a"]) as waiter:
        await asyncio.wait_for(waiter.wait(_deadline(0.001)), FAR)


@pytest.mark.gen_test
async def test_cancelled_reader_is_forgotten_with_its_timer(waiters: Waiters) -> None:
    parked = _park(waiters, "a")
    await _turns()
    parked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await parked
    assert waiters.count() == 0
    waiters.notify(["a"])
    await _turns()


@pytest.mark.gen_test
async def test_reader_cancelled_in_the_turn_that_wakes_it_harms_nobody(waiters: Waiters) -> None:
    first, second = _park(waiters, "a"), _park(waiters, "a")
    await _turns()
    waiters.notify(["a"])
    first.cancel()
    await second
    with pytest.raises(asyncio.CancelledError):
        await first


@pytest.mark.gen_test
async def test_parked_readers_hold_one_future_each_and_no_task(waiters: Waiters) -> None:
    parked = [_park(waiters, "a") for _ in range(100)]
    before = len(asyncio.all_tasks())
    await _turns()
    assert len(asyncio.all_tasks()) == before
    waiters.notify(["a"])
    await asyncio.gather(*parked)


@pytest.mark.gen_test
async def test_many_are_woken_in_order_and_others_have_their_turn_between(waiters: Waiters) -> None:
    order: list[int | str] = []
    parked = [
        _park(waiters, "crowd", done=lambda n=n: order.append(n))  # type: ignore[misc]
        for n in range(1000)
    ]
    single = _park(waiters, "single", done=lambda: order.append("single"))
    await _turns()
    waiters.notify(["crowd"])
    await _turns(2)
    waiters.notify(["single"])
    # The single one is queued behind the crowd, but the loop is not held up: this very line runs in the meantime.
    assert len(order) < 1000
    await asyncio.gather(single, *parked)
    assert [entry for entry in order if entry != "single"] == list(range(1000))


@pytest.mark.gen_test
async def test_a_crowd_that_is_being_woken_holds_up_no_other_channel(waiters: Waiters) -> None:
    woken: list[str] = []
    crowd = [_park(waiters, "a", done=lambda: woken.append("a")) for _ in range(1000)]
    other = _park(waiters, "b", done=lambda: woken.append("b"))
    await _turns()
    waiters.notify(["a"])
    await _turns()
    waiters.notify(["b"])
    await asyncio.gather(other, *crowd)
    assert len(woken) == 1001
    assert woken.index("b") < 500


@pytest.mark.gen_test
async def test_burst_from_a_thread_wakes_once(waiters: Waiters) -> None:
    wakes = 0

    async def count() -> None:
        nonlocal wakes
        with waiters.registered(["a"]) as waiter:
            await waiter.wait(_deadline(FAR))
            wakes += 1
            await waiter.wait(_deadline(0.02))

    counting = asyncio.create_task(count())
    await _turns()

    def burst() -> None:
        for _ in range(1000):
            waiters.notify(["a"])

    thread = threading.Thread(target=burst)
    thread.start()
    thread.join()
    await counting
    assert wakes == 1


@pytest.mark.gen_test
async def test_drain_wakes_everyone_and_spreads_their_return(waiters: Waiters) -> None:
    assert (waiters.draining, waiters.retry()) == (False, 0)
    parked = [_park(waiters, "a", f"{n}") for n in range(700)]
    await _turns()
    assert waiters.drain() == 700
    await asyncio.gather(*parked)
    assert waiters.draining
    retries = [waiters.retry() for _ in range(200)]
    assert min(retries) >= 200
    assert max(retries) <= 1400
    assert len(set(retries)) > 20


@pytest.mark.gen_test
async def test_drain_of_nobody_still_spreads_those_who_come(waiters: Waiters) -> None:
    assert waiters.drain() == 0
    assert 200 <= waiters.retry() <= 1000


def test_drain_outside_a_loop_is_an_error(waiters: Waiters) -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        waiters.drain()


def test_drain_is_of_one_loop(waiters: Waiters) -> None:
    async def drain() -> None:
        waiters.drain()

    async def draining() -> bool:
        return waiters.draining

    asyncio.run(drain())
    assert not asyncio.run(draining())


def test_notice_reaches_readers_on_several_loops(waiters: Waiters) -> None:
    parked, woken = threading.Barrier(3), threading.Barrier(3)

    async def park() -> None:
        with waiters.registered(["a"]) as waiter:
            await asyncio.to_thread(parked.wait, FAR)
            await waiter.wait(_deadline(FAR))

    def loop() -> None:
        asyncio.run(park())
        woken.wait(FAR)

    threads = [threading.Thread(target=loop) for _ in range(2)]
    for thread in threads:
        thread.start()
    parked.wait(FAR)
    waiters.notify(["a"])
    woken.wait(FAR)
    for thread in threads:
        thread.join()


def test_loop_closed_under_its_readers_is_forgotten(waiters: Waiters) -> None:
    loop = asyncio.new_event_loop()

    async def register() -> None:
        context.__enter__()

    context = waiters.registered(["a"])
    loop.run_until_complete(register())
    loop.close()
    assert waiters.count() == 1
    waiters.notify(["a"])
    assert waiters.count() == 0


def test_loop_that_ended_is_not_kept_alive(waiters: Waiters) -> None:
    async def park() -> weakref.ref[asyncio.AbstractEventLoop]:
        with waiters.registered(["a"]):
            return weakref.ref(asyncio.get_running_loop())

    ended = asyncio.run(park())
    gc.collect()
    assert ended() is None


@pytest.mark.gen_test
async def test_no_reference_cycle_is_left_of_a_parked_reader(waiters: Waiters) -> None:
    gc.collect()
    others = _waiters()  # of tests before this one
    parked = _park(waiters, "a")
    await _turns()
    gc.disable()
    try:
        waiters.notify(["a"])
        await parked
        del parked
        await _turns()
        left = _waiters()
    finally:
        gc.enable()
    assert left <= others


def _waiters() -> set[Waiter]:
    # Not isinstance(): lazy objects would look for what they stand for.
    return {thing for thing in gc.get_objects() if type(thing) is Waiter}


# Clients, and channels that change


class Client:
    def __init__(self, client: str | None, transport: str = "poll") -> None:
        self.client = client
        self.transport = transport
        self.superseded = 0

    def supersede(self) -> None:
        self.superseded += 1


@pytest.mark.gen_test
async def test_newer_reader_of_a_client_supersedes_the_older_on_any_transport(
    waiters: Waiters,
) -> None:
    older, newer, other, nameless = Client("a"), Client("a", "sse"), Client("b"), Client(None)
    with waiters.known(other), waiters.known(nameless), waiters.known(Client(None)):
        with waiters.known(older):
            with waiters.known(newer):
                assert older.superseded == 1
            with waiters.known(newest := Client("a", "socket")):
                assert (older.superseded, newer.superseded) == (1, 0)
        assert newest.superseded == other.superseded == nameless.superseded == 0


@pytest.mark.gen_test
async def test_older_reader_that_leaves_late_does_not_make_the_newer_unknown(
    waiters: Waiters,
) -> None:
    older, newer = Client("a"), Client("a")
    first, second = waiters.known(older), waiters.known(newer)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with waiters.known(Client("a")):
        assert newer.superseded == 1
    second.__exit__(None, None, None)


@pytest.mark.gen_test
async def test_readers_are_counted_by_transport(waiters: Waiters) -> None:
    with waiters.known(Client(None, "poll")), waiters.known(Client("a", "sse")):
        with waiters.known(Client("b", "sse")):
            assert waiters.transports() == {"poll": 1, "sse": 2}
        assert waiters.transports()["sse"] == 1


@pytest.mark.gen_test
async def test_changed_waiter_hears_of_its_new_channels_only(waiters: Waiters) -> None:
    with waiters.registered(["a"]) as waiter, waiters.registered(["c"]) as witness:
        waiters.change(waiter, ["b"])
        waiting = asyncio.create_task(waiter.wait(_deadline(FAR)))
        waiters.notify(["a", "c"])
        await witness.wait(_deadline(FAR))
        assert not waiting.done()
        waiters.notify(["b"])
        await waiting
        assert waiters.count() == 2
    assert waiters.count() == 0


@pytest.mark.gen_test
async def test_notice_that_is_on_its_way_when_channels_change_wakes_or_is_not_needed(
    waiters: Waiters,
) -> None:
    """Whoever changes its channels reads afterwards."""
    with waiters.registered(["a"]) as waiter, waiters.registered(["a"]) as witness:
        waiters.notify(["a"])
        waiters.change(waiter, [])
        waiter.wake()
        await witness.wait(_deadline(FAR))
        await waiter.wait(_deadline(FAR))


@pytest.mark.gen_test
async def test_reader_without_channels_hears_of_a_drain(waiters: Waiters) -> None:
    parked = _park(waiters)
    await _turns()
    assert waiters.count() == 1
    assert waiters.drain() == 1
    await parked


@pytest.mark.gen_test
async def test_notice_to_all_wakes_all(waiters: Waiters) -> None:
    parked = [_park(waiters, "a"), _park(waiters, "b", "c")]
    await _turns()
    waiters.notify(None)
    await asyncio.gather(*parked)
