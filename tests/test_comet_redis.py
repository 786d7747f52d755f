"""What is Redis' own about its broker; what every broker promises is in test_comet_brokers.py."""

from __future__ import annotations

import logging
import secrets
import socket
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.comet_brokers import (
    ROOM,
    Follower,
    append,
    body,
    draft,
    insist,
    persevere,
)
from tests.comet_processes import cursor_of, data, publish, reader_at, started
from tests.comet_processes import draft as draft_to
from tests.comet_redis import HEAD, LASTS, PREFIX, TAIL
from tests.redis_server import PROGRAM, REASON, Redis, version
from tests.serving import until
from tornjango.comet.brokers import redis as broker_module
from tornjango.comet.brokers.redis import RedisBroker
from tornjango.comet.log import Channel, Limits, Position
from tornjango.exceptions import BrokerUnavailable, ConfigurationError

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=REASON)

needs_redis_7 = pytest.mark.skipif(
    PROGRAM is not None and version() < 7, reason="needs options of Redis 7"
)

HALF_DAY = 12 * 3600


def log_of(channel: Channel) -> str:
    return f"{{{PREFIX}}}:log:{channel.name}"


def hall(number: int = 1, **limits: float) -> Channel:
    bounds: dict[str, Any] = {"history": 1000, "ttl": 600, "max_bytes": 10**7, **limits}
    return Channel(f"hall:{number}", Limits(**bounds))


@pytest.fixture(scope="module")
def _server() -> Iterator[Redis]:
    with Redis() as server:
        yield server


@pytest.fixture
def server(_server: Redis) -> Redis:
    """One that has nothing, and the settings it was started with."""
    _server.start()
    _server.client.flushall()
    _server.client.config_set("maxmemory", 0)
    _server.client.config_set("maxmemory-policy", "noeviction")
    return _server


Make = Callable[[], RedisBroker]
Follow = Callable[..., Follower]


@pytest.fixture
def make(server: Redis) -> Iterator[Make]:
    brokers: list[RedisBroker] = []

    def make() -> RedisBroker:
        brokers.append(RedisBroker(server.url, PREFIX))
        return brokers[-1]

    yield make
    for broker in brokers:
        broker.close()


@pytest.fixture
def broker(make: Make) -> RedisBroker:
    return make()


@pytest.fixture
def follow(make: Make) -> Iterator[Follow]:
    followers: list[Follower] = []

    def follow(broker: RedisBroker | None = None, end: Position | None = None) -> Follower:
        followers.append(Follower(broker or make(), end))
        return followers[-1]

    yield follow
    for follower in followers:
        follower.stopped = True
    for follower in followers:
        follower.stop()


# Redis loses something, or all


def test_killed_server_that_has_its_data_goes_on_under_the_same_epoch(
    server: Redis, broker: RedisBroker, follow: Follow
) -> None:
    follower = follow()
    before = append(broker, draft("before"))
    follower.until_data("before")
    server.kill()
    follower.until_away()
    server.start()
    after = insist(broker, draft("after"), known=before)
    assert after == Position(before.epoch, before.offset + 1)
    follower.until_data("before", "after")
    assert len(follower.begins) == 1
    assert len(broker.backlog(ROOM).messages) == 2


def test_restart_without_data_is_a_new_epoch_for_who_follows_before_anybody_publishes(
    server: Redis, broker: RedisBroker, follow: Follow
) -> None:
    follower = follow()
    before = append(broker, draft("before"))
    follower.until_data("before")
    server.lose()
    server.start()
    follower.until(lambda: len(follower.begins) == 2)
    assert follower.end is not None
    assert follower.end > before
    assert follower.end == persevere(broker.head)


def test_snapshot_from_before_is_a_new_epoch(follow: Follow) -> None:
    """A real one: Redis writes it from time to time, and is killed later."""
    with Redis("--appendonly", "no") as server:
        broker = RedisBroker(server.url, PREFIX)
        follower = follow(RedisBroker(server.url, PREFIX))
        append(broker, draft(1))
        server.client.save()
        before = append(broker, draft(2), draft(3))
        follower.until_data(1, 2, 3)
        server.kill()
        server.start()
        follower.until(lambda: len(follower.begins) == 2)
        after = insist(broker, draft(4))
        assert after.epoch > before.epoch
        follower.until_data(4)
        follower.stop()
        follower.broker.close()
        broker.close()


def test_who_has_just_published_knows_of_it_before_it_has_come_back(
    server: Redis, broker: RedisBroker
) -> None:
    with Redis("--appendonly", "no") as server:
        broker = RedisBroker(server.url, PREFIX)
        append(broker, draft(1))
        server.client.save()
        before = append(broker, draft(2))
        server.kill()
        server.start()
        assert insist(broker, draft(3), known=None).epoch > before.epoch
        broker.close()


def test_flush_in_the_middle_is_noticed_by_who_follows(
    server: Redis, broker: RedisBroker, follow: Follow
) -> None:
    follower = follow()
    before = append(broker, draft(1))
    follower.until_data(1)
    server.client.flushall()
    follower.until(lambda: len(follower.begins) == 2)
    assert follower.end is not None
    assert follower.end.epoch > before.epoch
    assert follower.errors == []


def test_flush_and_another_message_at_once_wakes_who_follows(
    server: Redis, broker: RedisBroker, make: Make, follow: Follow
) -> None:
    follower = follow()
    append(broker, *(draft(n) for n in range(10)))
    follower.until_data(9)
    server.client.flushall()
    # By a process that knows nothing of the old log; its number is one that the follower has seen.
    after = append(make(), draft("new"))
    follower.until(lambda: follower.end == after)


@pytest.mark.parametrize("more", [0, 1])
def test_other_message_under_the_last_number_is_a_new_epoch(
    server: Redis, make: Make, follow: Follow, more: int
) -> None:
    """As after a failover to a replica that was behind, and that others, who were behind, have published to."""
    follower = follow()
    before = append(make(), draft(1), draft(2))
    follower.until(lambda: follower.end == before)
    follower.stop()
    _, (_, first) = server.client.xrevrange(TAIL, count=2)
    server.client.xtrim(TAIL, maxlen=0, approximate=False)
    server.client.execute_command("XSETID", TAIL, "0-1")
    server.client.delete(log_of(ROOM))
    server.client.hset(HEAD, mapping={"last": 1, "mark": first[b"mark"]})
    append(make(), *(draft("other") for _ in range(1 + more)))
    again = follow(follower.broker, before)
    again.until(lambda: again.begins)
    assert again.begins[0].epoch > before.epoch


def test_replica_takes_and_gives_nothing(
    server: Redis, broker: RedisBroker, make: Make, follow: Follow
) -> None:
    follower = follow()
    append(broker, draft("before"))
    follower.until_data("before")
    server.client.execute_command("REPLICAOF", "127.0.0.1", "1")
    try:
        with pytest.raises(BrokerUnavailable, match="replica"):
            append(broker, draft("never"))
        follower.until_away()
    finally:
        server.client.execute_command("REPLICAOF", "NO", "ONE")
    insist(broker, draft("after"))
    follower.until_data("before", "after")


# Redis evicts


def test_evicted_log_of_a_channel_is_seen_by_its_hole(server: Redis, broker: RedisBroker) -> None:
    second = append(broker, draft(1), draft(2))
    server.client.delete(log_of(ROOM))
    assert broker.backlog(ROOM) == ([], second.offset, second.epoch)
    append(broker, draft("other", hall()), draft(3))
    messages, floor, _ = broker.backlog(ROOM)
    assert [message.data for message in messages] == [3]
    assert floor == second.offset


def test_evicted_head_is_a_new_epoch_whose_backlogs_have_nothing_of_the_old(
    server: Redis, broker: RedisBroker, follow: Follow
) -> None:
    follower = follow()
    before = append(broker, draft(1), draft(2))
    follower.until_data(1, 2)
    server.client.delete(HEAD)
    follower.until(lambda: len(follower.begins) == 2)
    assert follower.end is not None
    assert follower.end.epoch > before.epoch
    assert broker.backlog(ROOM) == ([], 0, follower.end.epoch)
    append(broker, draft(3))
    assert [message.data for message in broker.backlog(ROOM).messages] == [3]


def test_backlog_without_a_head_is_of_no_epoch(server: Redis, broker: RedisBroker) -> None:
    append(broker, draft(1))
    server.client.delete(HEAD)
    assert broker.backlog(ROOM) == ([], 0, b"")


def test_evicted_set_of_last_numbers_makes_gaps_of_all_that_was_before(
    server: Redis, broker: RedisBroker
) -> None:
    before = append(broker, draft(1), draft("expired", hall()))
    server.client.delete(LASTS, log_of(hall()))
    for channel in (ROOM, hall()):
        assert broker.backlog(channel) == ([], before.offset, before.epoch)
    append(broker, draft(2))
    assert broker.backlog(hall()) == ([], before.offset, before.epoch)
    messages, floor, _ = broker.backlog(ROOM)
    assert [message.data for message in messages] == [2]
    assert floor == before.offset


def test_evicted_tail_begins_anew_and_the_backlog_has_the_rest(
    server: Redis, broker: RedisBroker, follow: Follow
) -> None:
    follower = follow()
    begun = append(broker, draft(1))
    follower.until_data(1)
    follower.stop()
    end = append(broker, draft(2))
    server.client.delete(TAIL)
    late = follow(None, begun)
    late.until(lambda: late.begins == [end])
    assert [message.data for message in broker.backlog(ROOM).messages] == [1, 2]
    append(broker, draft(3))
    late.until_data(3)


def test_redis_that_evicts_at_random_loses_nothing_in_silence(
    server: Redis, broker: RedisBroker
) -> None:
    server.client.config_set("maxmemory", server.client.info()["used_memory"] + 1_500_000)
    server.client.config_set("maxmemory-policy", "allkeys-random")
    channels = [hall(number) for number in range(20)]
    published: list[tuple[Position, str, int]] = []
    known: Position | None = None
    for n in range(400):
        channel = channels[n % 19]
        known = append(broker, draft([n, "x" * 8000], channel), known=known)
        published.append((known, channel.name, n))
        self_check = channels[n * 7 % 20]
        messages, floor, epoch = broker.backlog(self_check)
        wanted = [
            number
            for position, name, number in published
            if name == self_check.name and position > Position(epoch, floor)
        ]
        assert [message.data[0] for message in messages] == wanted or epoch == b""
    assert server.client.info()["evicted_keys"] > 0


def test_full_memory_fails_publishing_with_what_redis_says_and_nothing_else(
    server: Redis, broker: RedisBroker, make: Make, follow: Follow
) -> None:
    before = append(broker, draft("before"))
    batch = secrets.token_bytes(16)
    server.client.config_set("maxmemory", 1)
    try:
        with pytest.raises(BrokerUnavailable, match="'maxmemory'"):
            broker.append(batch, [draft("during")], None)
        assert [message.data for message in broker.backlog(ROOM).messages] == ["before"]
        follower = follow()
        assert follower.begins == [before]
    finally:
        server.client.config_set("maxmemory", 0)
    assert broker.append(batch, [draft("during")], None).offset == before.offset + 1
    follower.until_data("during")


# What is kept, and for how long


def test_tail_is_bounded_and_who_was_away_for_longer_has_the_backlog(
    server: Redis, broker: RedisBroker, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "TAIL", 100)
    follower = follow()
    begun = append(broker, draft("first"))
    follower.until_data("first")
    follower.stop()
    for n in range(10):
        end = append(broker, *(draft(100 * n + m) for m in range(100)))
    # Redis drops a hundred at a time, because it was asked for "about" so many.
    assert server.client.xlen(TAIL) <= 200
    late = follow(None, begun)
    late.until(lambda: late.begins == [end])
    assert [message.data for message in broker.backlog(ROOM).messages] == ["first", *range(1000)]
    append(broker, draft("last"))
    late.until_data("last")


def test_tail_is_bounded_in_bytes(
    server: Redis, broker: RedisBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "TAIL_BYTES", 10 * len(body(ROOM.name, "x" * 1000)))
    for _ in range(5):
        append(broker, *(draft("x" * 1000) for _ in range(7)))
        assert server.client.xlen(TAIL) <= 10
    assert server.client.xlen(TAIL) == 10


def test_channel_is_bounded_on_the_server(server: Redis, broker: RedisBroker) -> None:
    few = hall(1, history=3)
    small = hall(2, max_bytes=3 * len(body("hall:2", 0)))
    append(broker, *(draft(n, channel) for n in range(9) for channel in (few, small)))
    assert server.client.xlen(log_of(few)) == server.client.xlen(log_of(small)) == 3


def test_nothing_but_the_last_numbers_stays_for_ever(server: Redis, broker: RedisBroker) -> None:
    append(broker, draft(1), draft(2, hall(1, ttl=10)))
    keys = {key.decode() for key in server.client.scan_iter()}
    lasting = {key for key in keys if server.client.ttl(key) < 0}
    assert lasting == {HEAD, TAIL, LASTS}
    assert server.client.ttl(log_of(hall())) <= 10 + broker_module.MARGIN


def test_last_numbers_are_forgotten_after_a_day_and_then_the_floor_tells(
    server: Redis, broker: RedisBroker
) -> None:
    begin = broker.head()
    expired = append(broker, draft("expired", hall(1)))
    server.client.delete(log_of(hall(1)))

    def half_a_day_later(data: object) -> Position:
        noted = int(server.client.hget(HEAD, "noted"))
        server.client.hset(HEAD, "noted", noted - HALF_DAY * 10**6)
        return append(broker, draft(data))

    half_a_day_later(1)
    half_a_day_later(2)
    assert broker.backlog(hall(1)).floor == expired.offset
    assert broker.backlog(hall(2)).floor == begin.offset
    assert half_a_day_later(3).offset == expired.offset + 3
    assert {name.decode() for name in server.client.zrange(LASTS, 0, -1)} == {"", ROOM.name}
    # What was there when the first of the three half days was over may be forgotten: for hall:2, too.
    assert broker.backlog(hall(1)).floor == broker.backlog(hall(2)).floor == expired.offset
    messages, floor, _ = broker.backlog(ROOM)
    assert [message.data for message in messages] == [1, 2, 3]
    assert floor == begin.offset


def test_last_numbers_do_not_grow_with_the_channels_there_ever_were(
    server: Redis, broker: RedisBroker
) -> None:
    append(broker, *(draft(n, hall(n)) for n in range(100)))
    for _ in range(3):
        server.client.hset(HEAD, "noted", 0)
        append(broker, draft("later"))
    for _ in range(100):
        append(broker, draft("later"))
    assert server.client.zcard(LASTS) == 2


# Beside each other


def test_scripts_that_redis_has_forgotten_are_sent_again(
    server: Redis, broker: RedisBroker
) -> None:
    append(broker, draft(1))
    server.client.script_flush()
    end = append(broker, draft(2))
    server.client.script_flush()
    assert broker.head() == end
    assert [message.data for message in broker.backlog(ROOM).messages] == [1, 2]


def test_prefixes_do_not_mix(server: Redis, broker: RedisBroker, follow: Follow) -> None:
    other = RedisBroker(server.url, "other")
    followers = [follow(), follow(RedisBroker(server.url, "other"))]
    append(broker, draft("here"))
    append(other, draft("there"))
    for follower, value in zip(followers, ["here", "there"], strict=True):
        follower.until_data(value)
        assert follower.data == [value]
    assert [message.data for message in other.backlog(ROOM).messages] == ["there"]
    followers[1].stop()
    followers[1].broker.close()
    other.close()


@pytest.mark.parametrize("prefix", ["", "a}b"])
def test_prefix_that_is_no_hash_tag_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigurationError, match=r"PREFIX"):
        RedisBroker("redis://127.0.0.1", prefix)


@needs_redis_7
def test_all_keys_are_in_one_slot_of_a_cluster() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
    ):
        ports = [str(free.getsockname()[1]) for free in (one, two)]
    options = ("--cluster-enabled", "yes", "--port", ports[0], "--cluster-port", ports[1])
    with Redis(*options) as cluster:
        cluster.client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        broker = RedisBroker(cluster.url, "clustered")
        persevere(broker.head)
        append(broker, draft(1), draft(2, hall(1)), draft(3, hall(2)))
        assert len(broker.backlog(hall(1)).messages) == 1
        slots = [
            cluster.client.execute_command("CLUSTER", "KEYSLOT", key)
            for key in cluster.client.scan_iter()
        ]
        assert len(slots) == 7
        assert len(set(slots)) == 1
        broker.close()


# What it says


@pytest.mark.parametrize(
    "url",
    [
        "",
        "secret",
        "http://secret@127.0.0.1",
        "redis://:sec/ret@127.0.0.1:6379/0",
        "redis://user:secret@127.0.0.1:port",
        "redis://127.0.0.1/?password=secret&db=x",
        "redis://127.0.0.1/?secret=1",
        "redis://[::1",
    ],
)
def test_bad_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        RedisBroker(url, PREFIX)
    assert "REDIS" in str(caught.value)
    assert "sec" not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("redis://127.0.0.1:1/2", "127.0.0.1:1"),
        ("redis://user:secret@127.0.0.1:1", "127.0.0.1:1"),
        ("rediss://:secret@127.0.0.1:1/0?ssl_cert_reqs=none", "127.0.0.1:1"),
        ("redis://127.0.0.1:1?password=secret", "127.0.0.1:1"),
        ("unix://user:secret@/nowhere/socket?db=1", "unix:///nowhere/socket"),
    ],
)
def test_server_that_is_not_there_is_named_without_its_password(url: str, server: str) -> None:
    broker = RedisBroker(url, PREFIX)
    for call in (broker.head, lambda: append(broker, draft(1)), lambda: broker.backlog(ROOM)):
        with pytest.raises(BrokerUnavailable) as caught:
            call()
        assert str(caught.value).startswith(f"Redis at {server}: Error ")
        assert "secret" not in str(caught.value)
    assert broker.status()["server"] == server
    assert "secret" not in str(broker.status())


def test_password_is_asked_for_and_not_told() -> None:
    with Redis() as server:
        server.client.config_set("requirepass", "right-secret")
        url = server.url.replace("unix://", "unix://:{}@")
        right = RedisBroker(url.format("right-secret"), PREFIX)
        assert append(right, draft(1)).offset == 1
        for wrong in (
            RedisBroker(url.format("wrong-secret"), PREFIX),
            RedisBroker(server.url, PREFIX),
        ):
            with pytest.raises(BrokerUnavailable) as caught:
                append(wrong, draft(2))
            assert "secret" not in str(caught.value)
            wrong.close()
        assert "secret" not in str(right.status())
        right.close()


@needs_redis_7
def test_server_that_is_loading_is_said_to_be() -> None:
    with Redis("--appendonly", "no", "--save", "3600 1") as slow:
        broker = RedisBroker(slow.url, PREFIX)
        append(broker, *(draft(n, hall(n)) for n in range(50)))
        slow.stop()
        # Each channel's log takes so many microseconds.
        delay = ("--key-load-delay", "20000", "--loading-process-events-interval-bytes", "1024")
        slow.start(*delay, until_ready=False)
        while "Error 2 " in (error := failure(broker)) or "Error 111 " in error:
            assert slow.runs  # It has no socket yet.
        assert "loading the dataset" in error
        assert persevere(broker.head).offset == 50
        broker.close()


def failure(broker: RedisBroker) -> str:
    with pytest.raises(BrokerUnavailable) as caught:
        append(broker, draft("never"))
    return str(caught.value)


def test_status_tells_how_far_the_tail_is(broker: RedisBroker, follow: Follow, make: Make) -> None:
    following = make()
    follower = follow(following)
    end = append(broker, draft(1), draft(2))
    follower.until_data(1, 2)
    follower.stop()
    assert following.status() == {"server": following.server, "last": end.offset, "behind": 0}


# Processes


@pytest.fixture
def outage(error_log: list[logging.LogRecord]) -> Iterator[None]:
    """Of a test in which the broker is lost: that is logged, as an error."""
    yield
    assert any("COMET has lost the redis broker" in it.getMessage() for it in error_log)
    error_log[:] = [it for it in error_log if "COMET has lost" not in it.getMessage()]


@pytest.mark.gen_test
async def test_published_in_one_process_and_read_in_another(make: Make) -> None:
    name = f"open:{uuid.uuid4()}"
    with started(make(), make()) as (one, other):
        await other.ready()
        reader = await reader_at(other, None, name)
        with reader.parked():
            publish(one, draft_to(name, 1), draft_to(name, 2))
            answer = await reader.next(20)
        assert data(answer) == [1, 2]


@pytest.mark.gen_test
async def test_process_that_comes_late_serves_older_cursors(make: Make) -> None:
    name = f"open:{uuid.uuid4()}"
    with started(make()) as [one]:
        await one.ready()
        cursor = await cursor_of(one, name)
        publish(one, draft_to(name, 1))
        publish(one, draft_to(name, 2))
        with started(make()) as [late]:
            await late.ready()
            reader = await reader_at(late, cursor, name)
            with reader.parked():
                answer = await reader.next(20)
            assert (data(answer), answer.gaps) == ([1, 2], [])


@pytest.mark.gen_test
async def test_short_history_is_told_as_a_gap_by_a_process_that_comes_late(make: Make) -> None:
    name = f"short:{uuid.uuid4()}"
    with started(make()) as [one]:
        await one.ready()
        cursor = await cursor_of(one, name)
        publish(one, *(draft_to(name, n) for n in range(4)))
        with started(make()) as [late]:
            await late.ready()
            reader = await reader_at(late, cursor, name)
            with reader.parked():
                answer = await reader.next(20)
            assert (data(answer), answer.gaps) == ([], [name])


@pytest.mark.gen_test
@pytest.mark.usefixtures("outage")
async def test_readers_wait_through_an_outage_and_what_was_published_in_it_comes(
    server: Redis, make: Make
) -> None:
    name = f"open:{uuid.uuid4()}"
    with started(make(), make()) as (one, other):
        await other.ready()
        reader = await reader_at(other, None, name)
        with reader.parked():
            server.stop()
            await until(lambda: other.lost)
            sent = one.send([draft_to(name, "during")], 20)
            await until(lambda: one.lost)
            server.start()
            answer = await reader.next(20)
            assert data(answer) == ["during"]
            assert sent.result(20).offset == 1
        await until(lambda: one.lost is None and other.lost is None)


@pytest.mark.gen_test
@pytest.mark.usefixtures("outage")
async def test_data_that_are_lost_are_told_as_a_gap(server: Redis, make: Make) -> None:
    name = f"open:{uuid.uuid4()}"
    with started(make(), make()) as (one, other):
        await other.ready()
        publish(one, draft_to(name, 1))
        await until(lambda: other.present().offset == 1)
        reader = await reader_at(other, None, name)
        with reader.parked():
            server.lose()
            server.start()
            answer = await reader.next(20)
        assert (data(answer), answer.gaps) == ([], [name])
        await until(lambda: one.lost is None and other.lost is None)
        reader = await reader_at(other, answer.cursor, name)
        with reader.parked():
            publish(one, draft_to(name, 2))
            assert data(await reader.next(20)) == [2]
