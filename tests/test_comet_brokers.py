from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tornjango.comet.brokers.base import Broker
from tornjango.comet.brokers.memory import MemoryBroker
from tornjango.comet.log import Channel, Limits, Position, Reading

ROOM = Channel("room", Limits(history=10_000, ttl=60, max_bytes=10**6))
HALL = Channel("hall", Limits(history=2, ttl=60, max_bytes=10**6))

BROKERS: dict[str, Callable[[Callable[[str], None]], Broker]] = {
    "memory": lambda notify: MemoryBroker(notify, max_channels=100),
}


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest, notices: list[str]) -> Broker:
    return BROKERS[request.param](notices.append)


async def _read(broker: Broker, *channels: Channel, since: dict[str, Position]) -> Reading:
    asked = {channel: since[channel.name] for channel in channels}
    return await broker.read(asked, count=10_000, size=10**9)


def _bodies(reading: Reading) -> list[bytes]:
    return [message.body for message in reading.messages]


@pytest.mark.gen_test
async def test_message_is_read_after_its_notice_and_only_by_those_who_came_before(
    broker: Broker, notices: list[str]
) -> None:
    before = broker.ends([ROOM])
    broker.publish(ROOM, b"1")
    assert notices == ["room"]
    assert _bodies(await _read(broker, ROOM, since=before)) == [b"1"]
    assert not (await _read(broker, ROOM, since=broker.ends([ROOM]))).has_news


@pytest.mark.gen_test
async def test_channels_do_not_mix(broker: Broker) -> None:
    since = broker.ends([ROOM, HALL])
    broker.publish(HALL, b"1")
    assert not (await _read(broker, ROOM, since=since)).has_news
    assert _bodies(await _read(broker, ROOM, HALL, since=since)) == [b"1"]


@pytest.mark.gen_test
async def test_trimmed_messages_are_told_as_a_gap(broker: Broker) -> None:
    since = broker.ends([HALL])
    for _ in range(3):
        broker.publish(HALL, b"x")
    reading = await _read(broker, HALL, since=since)
    assert (reading.gaps, reading.messages) == (["hall"], [])


@pytest.mark.gen_test
async def test_cursor_from_before_a_restart_is_told_as_a_gap(broker: Broker) -> None:
    broker.publish(ROOM, b"1")
    again = BROKERS[broker.name](lambda name: None)
    again.publish(ROOM, b"2")
    assert (await _read(again, ROOM, since=broker.ends([ROOM]))).gaps == ["room"]


@pytest.mark.gen_test
async def test_threads_publishing_at_once_keep_each_their_order_and_lose_nothing(
    broker: Broker, notices: list[str]
) -> None:
    since = broker.ends([ROOM])
    start = threading.Barrier(4)

    def publish(name: int) -> None:
        start.wait(10)
        for n in range(250):
            broker.publish(ROOM, b"%d %d" % (name, n))

    threads = [threading.Thread(target=publish, args=[name]) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reading = await _read(broker, ROOM, since=since)
    assert len(notices) == 1000
    for name in range(4):
        mine = [body for body in _bodies(reading) if body.startswith(b"%d " % name)]
        assert mine == [b"%d %d" % (name, n) for n in range(250)]
    offsets = [message.offset for message in reading.messages]
    assert offsets == sorted(set(offsets))


def test_status_counts_what_is_kept(broker: Broker) -> None:
    for _ in range(3):
        broker.publish(HALL, b"four")
    assert broker.status() == {"channels": 1, "messages": 2, "bytes": 8, "published": 3}
