"""What every broker promises, over all of them. The memory's has no threads, and its tests are those of `Hub`."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.comet_brokers import (
    ROOM,
    Follower,
    Server,
    append,
    body,
    draft,
    in_threads,
    insist,
    persevere,
)
from tests.comet_postgres import PostgresServer
from tests.comet_redis import RedisServer
from tests.redis_server import PROGRAM, REASON, Redis
from tornjango.comet.log import EPOCH_BYTES, Audience, Channel, Limits, Position
from tornjango.exceptions import BrokerUnavailable


def _postgres(request: pytest.FixtureRequest) -> Server:
    return PostgresServer(request.getfixturevalue("own_postgres"))


def _redis(request: pytest.FixtureRequest) -> Server:
    if PROGRAM is None:
        pytest.skip(REASON)
    return RedisServer(request.getfixturevalue("redis"))


BROKERS: dict[str, Callable[[pytest.FixtureRequest], Server]] = {
    "postgres": _postgres,
    "redis": _redis,
}


@pytest.fixture(scope="module")
def _redis_server() -> Iterator[Redis]:
    with Redis() as redis:
        yield redis


@pytest.fixture
def redis(_redis_server: Redis) -> Redis:
    _redis_server.start()
    return _redis_server


@pytest.fixture(params=BROKERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    server = BROKERS[request.param](request)
    yield server
    server.close()


@pytest.fixture
def follow() -> Iterator[Callable[..., Follower]]:
    followers: list[Follower] = []

    def start(server: Server) -> Follower:
        followers.append(Follower(server.broker()))
        return followers[-1]

    yield start
    for follower in followers:
        follower.stopped = True
    for follower in followers:
        follower.stop()


Follow = Callable[[Server], Follower]


def test_message_is_delivered_to_every_process_as_it_was_published(
    server: Server, follow: Follow
) -> None:
    followers = [follow(server), follow(server)]
    audience = Audience(frozenset({"7", "8"}), frozenset({"Größe"}))
    sent = [
        draft("plain"),
        draft("für ☃ 𝄞 \0 \\ ' %s"),
        draft("x" * 64 * 1024),
        draft("some", audience=audience),
        draft("nobody", audience=Audience(frozenset(), frozenset())),
    ]
    end = append(server.broker(), *sent)
    for follower in followers:
        follower.until(lambda follower=follower: len(follower.messages) == len(sent))
        assert [message.body for message in follower.messages] == [one.body for one in sent]
        assert [message.audience for message in follower.messages] == [one.audience for one in sent]
        assert {message.channel for message in follower.messages} == {ROOM.name}
        assert follower.end == end
    assert len(end.epoch) == EPOCH_BYTES


def test_positions_are_those_of_the_messages(server: Server, follow: Follow) -> None:
    broker = server.broker()
    begin = broker.head()
    follower = follow(server)
    assert follower.begins == [begin]
    first = append(broker, draft(1), draft(2))
    second = append(broker, draft(3))
    assert (first.offset, second.offset) == (begin.offset + 2, begin.offset + 3)
    assert first.epoch == second.epoch == begin.epoch
    assert broker.head() == server.broker().head() == second
    follower.until_data(1, 2, 3)
    assert [message.offset for message in follower.messages] == list(
        range(begin.offset + 1, begin.offset + 4)
    )


def test_many_processes_publish_at_once_and_all_see_one_order(
    server: Server, follow: Follow
) -> None:
    followers = [follow(server), follow(server)]

    def publish(name: int) -> None:
        broker = server.broker()
        for n in range(40):
            append(broker, draft([name, 2 * n]), draft([name, 2 * n + 1]))

    in_threads(*(partial(publish, name) for name in range(3)))
    for follower in followers:
        follower.until(lambda follower=follower: len(follower.messages) == 240)
    first, second = followers
    assert first.data == second.data
    for name in range(3):
        mine = [data for data in first.data if isinstance(data, list) and data[0] == name]
        assert mine == [[name, n] for n in range(80)]


def test_large_batch_stays_together(server: Server, follow: Follow) -> None:
    follower = follow(server)
    append(server.broker(), *(draft(n) for n in range(2000)))
    follower.until(lambda: len(follower.messages) == 2000)
    assert follower.data == list(range(2000))


def test_batch_is_stored_once_however_often_it_is_sent(server: Server, follow: Follow) -> None:
    follower = follow(server)
    one, other = server.broker(), server.broker()
    batch = secrets.token_bytes(16)
    first = one.append(batch, [draft(1), draft(2)], None)
    append(other, draft("between"))
    assert one.append(batch, [draft(1), draft(2)], None) == first
    assert other.append(batch, [draft(1), draft(2)], None) == first
    append(one, draft("end"))
    follower.until_data(1, 2, "between", "end")
    assert len(follower.messages) == 4


def test_batch_is_stored_once_when_it_is_sent_several_times_at_once(
    server: Server, follow: Follow
) -> None:
    follower = follow(server)
    brokers = [server.broker() for _ in range(3)]
    for n in range(10):
        batch = secrets.token_bytes(16)
        ends: list[Position] = []

        def send(broker: object, batch: bytes = batch, n: int = n) -> None:
            ends.append(broker.append(batch, [draft(n), draft("more")], None))  # noqa: B023

        in_threads(*(partial(send, broker) for broker in brokers))
        assert len(ends) == 3
        assert len(set(ends)) == 1
    append(brokers[0], draft("end"))
    follower.until_data("end")
    assert follower.data == [data for n in range(10) for data in (n, "more")] + ["end"]


def test_published_is_told_by_this_process_clock(
    server: Server, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    follower = follow(server)
    before = time.monotonic()
    append(server.broker(), draft(1))
    follower.until_data(1)
    assert before - 1 < follower.messages[0].published <= time.monotonic()
    [message] = server.broker().backlog(ROOM).messages
    assert before - 1 < message.published <= time.monotonic()


# The tail


def test_tail_begins_at_the_present_end_and_only_once(server: Server, follow: Follow) -> None:
    end = append(server.broker(), draft("before"))
    follower = follow(server)
    assert follower.begins == [end]
    append(server.broker(), draft("after"))
    follower.until_data("after")
    assert follower.begins == [end]


def test_tail_goes_on_where_it_was_when_its_connection_is_lost(
    server: Server, follow: Follow
) -> None:
    follower = follow(server)
    broker = server.broker()
    sent = 0
    # One that is not in use at the moment is replaced without a word.
    while sent < 5 or (follower.connections < 2 and sent < 1000):
        insist(broker, draft(sent))
        server.end_connections()
        sent += 1
    insist(broker, draft(sent))
    everything = list(range(sent + 1))
    follower.until_data(*everything)
    assert follower.data == everything
    assert len(follower.begins) == 1
    assert follower.connections > 1


def test_tail_returns_when_it_is_stopped(server: Server, follow: Follow) -> None:
    follower = follow(server)
    follower.stop()
    assert follower.errors == []


def test_server_that_stopped_is_said_to_be_away_and_then_nothing_is_missing(
    server: Server, follow: Follow
) -> None:
    follower = follow(server)
    broker = server.broker()
    before = append(broker, draft("before"))
    follower.until_data("before")
    server.stop()
    try:
        with pytest.raises(BrokerUnavailable):
            append(broker, draft("never"))
        with pytest.raises(BrokerUnavailable):
            broker.backlog(ROOM)
        with pytest.raises(BrokerUnavailable):
            broker.head()
        follower.until_away()
    finally:
        server.start()
    assert persevere(broker.head) == before
    insist(broker, draft("after"), known=before)
    follower.until_data("before", "after")
    assert len(follower.begins) == 1


@pytest.mark.slow
def test_frozen_server_is_said_to_be_away_and_then_nothing_is_missing(
    server: Server, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(server.broker()), "TIMEOUT", 1.0)
    follower = follow(server)
    broker = server.broker()
    append(broker, draft("before"))
    broker.backlog(ROOM)
    follower.until_data("before")
    batch = secrets.token_bytes(16)
    failed: list[str] = []

    def fails(call: Callable[[], object]) -> None:
        with pytest.raises(BrokerUnavailable) as caught:
            call()
        failed.append(str(caught.value))

    server.freeze()
    try:
        # The first time on a connection that was there, the second on none.
        for _ in range(2):
            in_threads(
                partial(fails, lambda: broker.append(batch, [draft("during")], None)),
                partial(fails, partial(broker.backlog, ROOM)),
                partial(fails, broker.head),
            )
        follower.until_away()
    finally:
        server.thaw()
    assert len(failed) == 6
    persevere(lambda: broker.append(batch, [draft("during")], None))
    insist(broker, draft("after"))
    follower.until_data("before", "during", "after")
    assert follower.data == ["before", "during", "after"]


# The log's end


def test_emptied_log_has_a_new_epoch(server: Server, follow: Follow) -> None:
    broker = server.broker()
    follower = follow(server)
    before = append(broker, draft(1), draft(2))
    follower.until_data(1, 2)
    server.empty()
    after = insist(broker, draft("new"), known=before)
    assert after.epoch != before.epoch
    assert server.broker().head().epoch == after.epoch
    follower.until(lambda: follower.end == after)
    assert len(follower.begins) == 2
    insist(broker, draft("newer"), known=after)
    follower.until_data("newer")


def test_log_that_lost_its_end_has_a_new_epoch_for_who_publishes(server: Server) -> None:
    broker = server.broker()
    before = append(broker, *(draft(n) for n in range(5)))
    server.lose(2)
    after = insist(broker, draft("new"), known=before)
    assert after.epoch != before.epoch
    assert insist(broker, draft("newer"), known=after).epoch == after.epoch


def test_log_that_lost_its_end_has_a_new_epoch_for_who_follows(
    server: Server, follow: Follow
) -> None:
    follower = follow(server)
    before = append(server.broker(), *(draft(n) for n in range(5)))
    follower.until(lambda: follower.end == before)
    server.lose(2)
    server.end_connections()
    follower.until(lambda: len(follower.begins) == 2)
    assert follower.end is not None
    assert follower.end.epoch != before.epoch
    after = append(server.broker(), draft("new"))
    assert after.epoch == follower.end.epoch
    follower.until_data("new")


def test_known_end_of_another_epoch_changes_nothing(server: Server) -> None:
    broker = server.broker()
    before = broker.head()
    foreign = Position(secrets.token_bytes(EPOCH_BYTES), 10**9)
    assert append(broker, draft(1), known=foreign).epoch == before.epoch
    behind = Position(before.epoch, 0)
    assert append(broker, draft(1), known=behind).epoch == before.epoch


# Backlogs


def _channel(name: str = "hall:1", **limits: float) -> Channel:
    bounds = {"history": 1000, "ttl": 600, "max_bytes": 10**7} | limits
    return Channel(name, Limits(**bounds))  # type: ignore[arg-type]


def test_backlog_has_the_messages_of_one_channel(server: Server) -> None:
    broker, hall = server.broker(), _channel()
    audience = Audience(frozenset({"1"}), frozenset())
    append(broker, draft(1, hall), draft("other"), draft("ü", hall, audience))
    messages, floor, _ = server.broker().backlog(hall)
    assert [message.data for message in messages] == [1, "ü"]
    assert [message.audience for message in messages] == [None, audience]
    assert [message.channel for message in messages] == [hall.name] * 2
    assert messages[1].offset == messages[0].offset + 2
    assert floor < messages[0].offset


def test_backlog_of_a_channel_without_messages_is_empty(server: Server) -> None:
    broker = server.broker()
    begin = broker.head()
    append(broker, draft(1))
    messages, floor, _ = broker.backlog(_channel("never:1"))
    assert messages == []
    assert floor <= begin.offset


@pytest.mark.parametrize(
    "limits",
    [{"history": 3}, {"max_bytes": 3 * len(body("hall:1", 0)) + 1}],
    ids=["history", "max_bytes"],
)
@pytest.mark.parametrize("forgotten", [False, True])
def test_backlog_is_within_the_limits(
    server: Server, limits: dict[str, float], forgotten: bool
) -> None:
    broker, hall = server.broker(), _channel(**limits)
    begin = broker.head()
    end = append(broker, *(draft(n, hall) for n in range(8)))
    if forgotten:
        server.forget()
    messages, floor, _ = broker.backlog(hall)
    assert [message.data for message in messages] == [5, 6, 7]
    assert floor == begin.offset + 5
    assert messages[-1].offset == end.offset


def test_message_larger_than_the_channel_is_forgotten(server: Server) -> None:
    broker, hall = server.broker(), _channel(max_bytes=10)
    end = append(broker, draft("too large", hall))
    assert broker.backlog(hall)[:2] == ([], end.offset)


def test_backlog_ends_with_the_time_to_live(server: Server) -> None:
    broker, hall = server.broker(), _channel(ttl=0.2)
    end = append(broker, draft(1, hall))
    longer = _channel(ttl=600)
    assert len(broker.backlog(longer).messages) == 1

    def gone() -> Position:
        messages, floor, _ = broker.backlog(hall)
        if messages:
            raise BrokerUnavailable("It is there still.")
        return Position(end.epoch, floor)

    assert persevere(gone) == end


def test_forgotten_messages_do_not_hold_up_the_tail(server: Server, follow: Follow) -> None:
    follower, hall = follow(server), _channel(history=2)
    broker = server.broker()
    append(broker, draft("first"))
    follower.until_data("first")
    follower.stop()
    begun = follower.end
    append(broker, *(draft(n, hall) for n in range(10)))
    server.forget()
    late = Follower(server.broker(), begun)
    append(broker, draft("last"))
    late.until_data("last")
    # Either everything came, or readers are told to ask for the backlog, which knows what is forgotten.
    if late.begins:
        assert [message.data for message in broker.backlog(hall).messages] == [8, 9]
    else:
        assert late.data == [*range(10), "last"]
    late.stop()


def test_backlogs_are_read_while_messages_are_published(server: Server) -> None:
    broker, hall = server.broker(), _channel(history=50)
    wrong: list[object] = []

    def publish() -> None:
        publisher = server.broker()
        for n in range(60):
            append(publisher, draft(3 * n, hall), draft(3 * n + 1, hall), draft(3 * n + 2, hall))

    def read() -> None:
        for _ in range(40):
            messages, floor, _ = broker.backlog(hall)
            data = [message.data for message in messages]
            whole = data == list(range(data[0], data[0] + len(data))) if data else True
            if not whole or (messages and messages[0].offset <= floor):
                wrong.append((data, floor))

    in_threads(publish, read, read, read)
    assert wrong == []


def test_status_asks_nothing(server: Server) -> None:
    broker = server.broker()
    append(broker, draft(1))
    server.stop()
    try:
        status = broker.status()
    finally:
        server.start()
    assert status
    assert all(isinstance(value, int | float | str) for value in status.values())


def test_closed_broker_leaves_no_connection(server: Server) -> None:
    broker = server.broker()
    append(broker, draft(1))
    broker.backlog(ROOM)
    broker.close()
    broker.close()
