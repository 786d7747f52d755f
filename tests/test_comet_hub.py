"""Several processes of a project around one broker: what readers are told, whatever happens between."""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from django.http import HttpRequest
from django.test import RequestFactory, override_settings

from tests.comet_processes import (
    FaultyBroker,
    channel,
    cursor_of,
    data,
    draft,
    in_threads,
    publish,
    reader_at,
    started,
)
from tests.loopback_broker import LoopbackBroker, LoopbackServer
from tests.serving import until
from tornjango import comet
from tornjango.comet import hub as hubs
from tornjango.comet.brokers.base import Broker, Draft
from tornjango.comet.hub import REVOKED, Hub
from tornjango.comet.log import Audience, Channel, Limits, Logs, Message, Position
from tornjango.comet.publishing import encode
from tornjango.comet.readers import Reader
from tornjango.conf import get_config
from tornjango.exceptions import BrokerUnavailable, ChannelForbidden, ConfigurationError

FAR = 20.0

#: Who may read "hub-allowed:<name>"; a test says so.
allowed: dict[str, bool] = {}


@comet.channel("hub-allowed:<str:name>")
async def if_allowed(request: HttpRequest, name: str) -> bool:
    return allowed[name]


@pytest.fixture
def server() -> LoopbackServer:
    return LoopbackServer()


@pytest.fixture
def name() -> str:
    return f"open:{uuid.uuid4()}"


@pytest.fixture
def outage(error_log: list[logging.LogRecord]) -> Iterator[None]:
    """Of a test in which the broker is lost: that is logged, as an error."""
    yield
    assert any("COMET has lost the loopback broker" in it.getMessage() for it in error_log)
    error_log[:] = [it for it in error_log if "COMET has lost" not in it.getMessage()]


def revocation(name: str) -> Draft:
    return Draft(REVOKED, encode(REVOKED.name, name, None))


async def all_of(reader: Reader, wanted: int) -> list[Any]:
    found: list[Any] = []
    with reader.parked():
        while len(found) < wanted:
            answer = await reader.next(FAR)
            assert not answer.gaps
            found += data(answer)
    return found


async def parked(reader: Reader, seconds: float = FAR) -> asyncio.Task[comet.Answer]:
    async def wait() -> comet.Answer:
        with reader.parked():
            return await reader.next(seconds)

    before = reader.hub.waiters.count()
    task = asyncio.create_task(wait())
    await until(lambda: reader.hub.waiters.count() > before or task.done())
    return task


@pytest.mark.gen_test
async def test_what_one_process_publishes_the_readers_of_all_get(
    server: LoopbackServer, name: str
) -> None:
    with started(LoopbackBroker(server), LoopbackBroker(server)) as (one, other):
        readers = [await reader_at(hub, None, name) for hub in (one, other)]
        for n in range(3):
            await asyncio.to_thread(publish, one, draft(name, n))
        for reader in readers:
            assert await all_of(reader, 3) == [0, 1, 2]


@pytest.mark.gen_test
async def test_no_wake_up_is_lost_while_threads_publish(server: LoopbackServer, name: str) -> None:
    with started(LoopbackBroker(server), LoopbackBroker(server)) as (one, other):
        reading = [
            asyncio.create_task(all_of(await reader_at(hub, None, name), 400))
            for hub in (one, other)
        ]

        def run(hub: Hub, mine: int) -> None:
            for n in range(200):
                publish(hub, draft(name, [mine, n]))

        await asyncio.to_thread(in_threads, partial(run, one, 1), partial(run, other, 2))
        first, second = await asyncio.gather(*reading)
        assert first == second
        for mine in (1, 2):
            assert [n for who, n in first if who == mine] == list(range(200))


@pytest.mark.gen_test
@pytest.mark.usefixtures("outage")
async def test_cursor_of_one_process_is_good_in_another_that_is_behind(
    server: LoopbackServer, name: str
) -> None:
    late = LoopbackBroker(server)
    with started(LoopbackBroker(server), late) as (one, other):
        await other.ready()
        late.cut()
        await until(lambda: other.lost)
        publish(one, draft(name, 1))
        await until(lambda: one.present().offset == 1)
        waiting = await parked(await reader_at(other, await cursor_of(one, name), name))
        late.mend()
        publish(one, draft(name, 2))
        assert data(await waiting) == [2]


# What the logs do not reach back to


@pytest.mark.gen_test
async def test_what_came_before_a_process_began_is_fetched_once_for_all_who_ask(
    server: LoopbackServer, name: str
) -> None:
    broker = FaultyBroker(server)
    with started(LoopbackBroker(server)) as (one,):
        cursor = await cursor_of(one, name)
        publish(one, draft(name, 1), draft(name, 2))
        with started(broker) as (restarted,):
            broker.held.clear()
            waiting = [await parked(await reader_at(restarted, cursor, name)) for _ in range(20)]
            broker.held.set()
            assert [data(await answer) for answer in waiting] == [[1, 2]] * 20
            publish(one, draft(name, 3))
            assert await all_of(await reader_at(restarted, cursor, name), 3) == [1, 2, 3]
            assert broker.fetched == [name]


@pytest.mark.gen_test
async def test_message_published_while_the_backlog_is_fetched_comes_once_and_after_it(
    server: LoopbackServer, name: str
) -> None:
    broker = FaultyBroker(server)
    with started(LoopbackBroker(server)) as (one,):
        cursor = await cursor_of(one, name)
        publish(one, draft(name, 1))
        with started(broker) as (restarted,):
            broker.held.clear()
            waiting = await parked(await reader_at(restarted, cursor, name))
            await asyncio.to_thread(broker.asked.acquire)
            publish(one, draft(name, 2))
            await until(lambda: restarted.present().offset == 2)
            broker.held.set()
            assert data(await waiting) == [1, 2]


@pytest.mark.gen_test
@override_settings(TORNJANGO={"COMET": {"MAX_CHANNELS": 1}})
async def test_message_that_was_dropped_while_the_backlog_was_fetched_is_fetched_again(
    server: LoopbackServer, name: str
) -> None:
    broker = FaultyBroker(server)
    with started(LoopbackBroker(server)) as (one,):
        cursor = await cursor_of(one, name)
        publish(one, draft(name, 1))
        with started(broker) as (restarted,):
            broker.held.clear()
            waiting = await parked(await reader_at(restarted, cursor, name))
            await asyncio.to_thread(broker.asked.acquire)
            publish(one, draft(name, 2), draft("open:other", "drops its log"))
            await until(lambda: restarted.present().offset == 3)
            broker.held.set()
            assert data(await waiting) == [1, 2]


@pytest.mark.gen_test
async def test_logs_that_begin_anew_while_the_backlog_is_fetched_lose_nothing(
    server: LoopbackServer, name: str
) -> None:
    broker = FaultyBroker(server)
    with started(LoopbackBroker(server)) as (one,):
        cursor = await cursor_of(one, name)
        publish(one, draft(name, 1))
        with started(broker) as (restarted,):
            broker.held.clear()
            waiting = await parked(await reader_at(restarted, cursor, name))
            await asyncio.to_thread(broker.asked.acquire)
            publish(one, draft(name, 2))
            await until(lambda: restarted.present().offset == 2)
            # As a tail does that finds that what came meanwhile is not to be had in one piece.
            restarted.begin(restarted.present())
            broker.held.set()
            assert data(await waiting) == [1, 2]


@pytest.mark.gen_test
async def test_backlog_of_before_another_epoch_is_not_taken(
    server: LoopbackServer, name: str
) -> None:
    broker = FaultyBroker(server)
    with started(LoopbackBroker(server)) as (one,):
        cursor = await cursor_of(one, name)
        publish(one, draft(name, 1))
        with started(broker) as (restarted,):
            broker.held.clear()
            waiting = await parked(await reader_at(restarted, cursor, name))
            await asyncio.to_thread(broker.asked.acquire)
            server.lose_everything()
            publish(one, draft(name, "new"))
            answer = await waiting
            assert (data(answer), answer.gaps) == ([], [name])
            broker.held.set()
            publish(one, draft(name, "newer"))
            assert data(await (await parked(await reader_at(restarted, answer.cursor, name))))[
                -1:
            ] == ["newer"]


@pytest.mark.gen_test
async def test_messages_that_are_here_do_not_wait_for_those_that_are_fetched(
    server: LoopbackServer, name: str
) -> None:
    broker, other = FaultyBroker(server), f"open:{uuid.uuid4()}"
    with started(LoopbackBroker(server)) as (one,):
        cursor = await cursor_of(one, name, other)
        publish(one, draft(name, 1))
        with started(broker) as (restarted,):
            reader = await reader_at(restarted, cursor, name)
            broker.held.clear()
            await restarted.read({channel(name): Position(server.end.epoch, 0)})
            await reader.follow([other], await cursor_of(restarted, other))
            waiting = await parked(reader)
            publish(one, draft(other, 2))
            answer = await waiting
            assert data(answer) == [2]
            broker.held.set()
            assert data(await (await parked(reader))) == [1]


@pytest.mark.gen_test
@pytest.mark.parametrize("how", ["timeout", "drain", "superseded"])
async def test_reader_of_what_cannot_be_fetched_is_answered_all_the_same(
    server: LoopbackServer, name: str, how: str
) -> None:
    broker = FaultyBroker(server)
    with started(LoopbackBroker(server)) as (one,):
        cursor = await cursor_of(one, name)
        publish(one, draft(name, 1))
        with started(broker) as (restarted,):
            broker.held.clear()
            reader = await reader_at(restarted, cursor, name)
            waiting = await parked(reader, 0.01 if how == "timeout" else FAR)
            if how == "drain":
                restarted.waiters.drain()
            elif how == "superseded":
                reader.supersede()
            answer = await waiting
            assert (data(answer), answer.gaps, answer.cursor) == ([], [], cursor)
            broker.held.set()
            again = await reader_at(one, answer.cursor, name)
            assert await all_of(again, 1) == [1]


@pytest.mark.gen_test
@pytest.mark.parametrize("error", [BrokerUnavailable("away"), ZeroDivisionError("a bug")])
async def test_what_could_not_be_fetched_is_fetched_again(
    server: LoopbackServer, name: str, error: Exception, error_log: list[logging.LogRecord]
) -> None:
    broker = FaultyBroker(server)
    with started(LoopbackBroker(server)) as (one,):
        cursor = await cursor_of(one, name)
        publish(one, draft(name, 1))
        with started(broker) as (restarted,):
            broker.errors["backlog"] = [error] * 2
            assert await all_of(await reader_at(restarted, cursor, name), 1) == [1]
            assert broker.fetched == [name] * 3
            await until(lambda: restarted.lost is None)
    logged = [record.getMessage() for record in error_log]
    error_log.clear()
    assert sum("has lost the loopback broker" in line for line in logged) == 1
    failures = [
        line for line in logged if line == f"Fetching {name!r} from the COMET broker failed"
    ]
    assert len(failures) == (0 if isinstance(error, BrokerUnavailable) else 2)


# When the broker is lost


@pytest.mark.gen_test
@pytest.mark.usefixtures("outage")
async def test_readers_wait_for_a_broker_that_is_away_and_miss_nothing(
    server: LoopbackServer, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with started(LoopbackBroker(server), LoopbackBroker(server)) as (one, other):
        waiting = await parked(await reader_at(other, None, name))
        server.go_away()
        await until(lambda: one.lost and other.lost)
        sent = one.send([draft(name, 1)], FAR)
        server.come_back()
        assert data(await waiting) == [1]
        assert sent.result(FAR).offset == 1
        await until(lambda: one.lost is None and other.lost is None)
    assert sum("has the loopback broker back" in line for line in caplog.messages) == 2


@pytest.mark.gen_test
@pytest.mark.usefixtures("outage")
@pytest.mark.parametrize("error", [ConfigurationError("no table"), ZeroDivisionError("a bug")])
async def test_tail_that_fails_is_begun_again(
    server: LoopbackServer, name: str, error: Exception, error_log: list[logging.LogRecord]
) -> None:
    broker = FaultyBroker(server)
    broker.errors["tail"] = [error]
    with started(broker) as (one,):
        reader = await reader_at(one, None, name)
        publish(one, draft(name, 1))
        assert await all_of(reader, 1) == [1]
    failures = [it for it in error_log if "Following the loopback broker failed" in it.getMessage()]
    assert len(failures) == isinstance(error, ZeroDivisionError)
    error_log[:] = [it for it in error_log if it not in failures]


@pytest.mark.gen_test
@pytest.mark.usefixtures("outage")
async def test_process_that_never_reached_its_broker_says_so_and_why(
    server: LoopbackServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Broker, "TIMEOUT", 0.1)
    server.go_away()
    with started(LoopbackBroker(server)) as (one,):
        with pytest.raises(BrokerUnavailable, match="loopback broker is not there"):
            await reader_at(one, None, name)
        with pytest.raises(BrokerUnavailable, match="does not follow"):
            one.present()
        server.come_back()
        await until(lambda: one.is_ready)
        publish(one, draft(name, 1))


@pytest.mark.gen_test
async def test_parked_readers_are_told_when_the_broker_has_lost_its_data(
    server: LoopbackServer, name: str
) -> None:
    with started(LoopbackBroker(server)) as (one,):
        waiting = await parked(await reader_at(one, None, name))
        server.lose_everything()
        answer = await waiting
        assert (data(answer), answer.gaps) == ([], [name])
        publish(one, draft(name, "new"))
        assert await all_of(await reader_at(one, answer.cursor, name), 1) == ["new"]


@pytest.mark.gen_test
@pytest.mark.usefixtures("outage")
async def test_what_a_process_missed_and_the_broker_forgot_is_a_gap(
    server: LoopbackServer, name: str
) -> None:
    late = LoopbackBroker(server)
    with started(LoopbackBroker(server), late) as (one, other):
        waiting = await parked(await reader_at(other, None, name))
        late.cut()
        await until(lambda: other.lost)
        publish(one, draft(name, 1))
        server.forget()
        late.mend()
        answer = await waiting
        assert (data(answer), answer.gaps) == ([], [name])


@pytest.mark.gen_test
async def test_server_that_closes_publishes_what_waits_and_fails_what_it_cannot(
    server: LoopbackServer, name: str, error_log: list[logging.LogRecord]
) -> None:
    with started(LoopbackBroker(server)) as (one,):
        stored = one.send([draft(name, 1)], FAR)
        await asyncio.to_thread(one.close, FAR)
        assert stored.done()
        with pytest.raises(BrokerUnavailable, match="stopped"):
            one.send([draft(name, 2)], FAR)
    server.go_away()
    with started(LoopbackBroker(server)) as (one,):
        left = one.send([draft(name, 1)], FAR)
        await asyncio.to_thread(one.close, 0)
        with pytest.raises(BrokerUnavailable):
            await asyncio.to_thread(left.result, FAR)
    logged = [record.getMessage() for record in error_log]
    error_log.clear()
    assert any("1 messages were not published" in line for line in logged)


@pytest.mark.gen_test
async def test_reader_of_a_hub_that_was_closed_is_answered_at_its_time(
    server: LoopbackServer, name: str
) -> None:
    with started(LoopbackBroker(server)) as (one,):
        cursor = await cursor_of(one, name)
        publish(one, draft(name, 1))
    with started(LoopbackBroker(server)) as (closed,):
        await closed.ready()
        await asyncio.to_thread(closed.close, 0)
        answer = await (await parked(await reader_at(closed, cursor, name), 0.01))
        assert (data(answer), answer.cursor) == ([], cursor)


# Revoking


def request_of(key: str) -> HttpRequest:
    allowed[key] = True
    return RequestFactory().get("/")


@pytest.mark.gen_test
async def test_nobody_who_is_refused_hears_what_was_published_after_the_revocation(
    server: LoopbackServer,
) -> None:
    """Wherever it was published and is read, and however close together the two came."""
    with started(LoopbackBroker(server), LoopbackBroker(server)) as (one, other):
        for round_ in range(30):
            key = str(uuid.uuid4())
            name = f"hub-allowed:{key}"
            request = request_of(key)
            readers = [await reader_at(hub, None, name, request=request) for hub in (one, other)]
            waiting = [await parked(reader) for reader in readers]
            allowed[key] = False
            if round_ % 2:
                one.send([revocation(name), draft(name, "secret")], FAR)
            else:
                one.send([revocation(name)], FAR)
                one.send([draft(name, "secret")], FAR)
            for answer in waiting:
                with pytest.raises(ChannelForbidden) as refused:
                    await answer
                assert refused.value.channels == [name]


@pytest.mark.gen_test
async def test_who_may_still_read_misses_nothing_by_a_revocation(server: LoopbackServer) -> None:
    key = str(uuid.uuid4())
    name = f"hub-allowed:{key}"
    with started(LoopbackBroker(server)) as (one,):
        reader = await reader_at(one, None, name, request=request_of(key))
        publish(one, draft(name, 1), revocation(name), draft(name, 2))
        assert await all_of(reader, 2) == [1, 2]


@pytest.mark.gen_test
async def test_revocation_from_before_a_process_began_counts_there(server: LoopbackServer) -> None:
    key = str(uuid.uuid4())
    name = f"hub-allowed:{key}"
    request = request_of(key)
    with started(LoopbackBroker(server)) as (one,):
        reader = await reader_at(one, None, name, request=request)
        with reader.parked():
            grant = (await reader.next(0)).grant
        publish(one, revocation(name))
    allowed[key] = False
    with (
        started(LoopbackBroker(server)) as (restarted,),
        pytest.raises(ChannelForbidden),
    ):
        await reader_at(restarted, reader.cursor, name, request=request, grant=grant)


def test_revocations_that_are_forgotten_count_for_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hubs, "REVOCATIONS", 2)
    one = Hub(get_config().COMET, None)
    start = one.present()
    names = [f"open:{n}" for n in range(3)]
    for name in (names[0], names[1], names[0], names[2]):
        publish(one, revocation(name))
    assert one.revoked((name, start) for name in (*names, "open:other")) == {*names, "open:other"}
    assert one.revoked([("open:other", Position(start.epoch, 1))])
    assert not one.revoked([("open:other", Position(start.epoch, 2))])
    assert not one.revoked([(names[2], one.present())])


# Crowds


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What the logs were read for, as often as they were."""
    calls: list[object] = []
    read = Logs.read

    def count(logs: Logs, since: Any, **bounds: Any) -> Any:
        calls.append(since)
        return read(logs, since, **bounds)

    monkeypatch.setattr(Logs, "read", count)
    monkeypatch.setattr(hubs, "READING_LASTS", FAR)
    return calls


@pytest.mark.gen_test
async def test_a_crowd_that_stands_in_one_place_is_read_for_once_and_shares_nothing(
    name: str, counted: list[object]
) -> None:
    one = Hub(get_config().COMET, None)
    readers = [await reader_at(one, None, name) for _ in range(10)]
    waiting = [await parked(reader) for reader in readers]
    publish(one, draft(name, 1))
    answers = await asyncio.gather(*waiting)
    assert [data(answer) for answer in answers] == [[1]] * 10
    assert len(counted) == 2  # before it, and after
    answers[0].messages.clear()
    assert data(answers[1]) == [1]


@pytest.mark.gen_test
async def test_what_was_read_counts_until_there_is_something_new_and_not_for_long(
    name: str, counted: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Hub(get_config().COMET, None)
    since = {channel(name): one.present()}
    for n in range(3):
        for _ in range(2):
            assert [message.data for message in (await one.read(since)).messages] == [*range(n)]
        publish(one, draft(name, n))
    assert len(counted) == 3
    monkeypatch.setattr(hubs, "READING_LASTS", 0)
    for _ in range(2):
        await one.read({channel(name): one.present()})
    assert len(counted) == 5


@pytest.mark.gen_test
async def test_what_was_read_for_others_is_kept_for_a_few_places_only(
    name: str, counted: list[object]
) -> None:
    one = Hub(get_config().COMET, None)
    for n in range(3 * hubs.READINGS):
        await one.read({channel(f"{name}-{n}"): one.present()})
        assert len(one._readings) <= hubs.READINGS
    assert len(counted) == 3 * hubs.READINGS


# Audiences


@pytest.mark.gen_test
async def test_messages_for_others_advance_the_cursor_and_wake_nobody_twice(
    server: LoopbackServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started(LoopbackBroker(server)) as (one,):
        reader = await reader_at(one, None, name)
        others = Audience(frozenset({"7"}), frozenset())
        reads = 0
        read = one.read

        async def counted(*arguments: Any) -> Any:
            nonlocal reads
            reads += 1
            return await read(*arguments)

        monkeypatch.setattr(one, "read", counted)
        waiting = await parked(reader)
        publish(one, *(draft(name, n, others) for n in range(150)))
        await until(lambda: one.present().offset == 150)
        end = await cursor_of(one, name)
        await until(lambda: reader.cursor == end)
        publish(one, draft(name, "for all"))
        answer = await waiting
        assert data(answer) == ["for all"]
        assert answer.cursor == await cursor_of(one, name)
        # The first look, two of a hundred messages, the last one; and each wake-up may be for what was read already.
        assert reads <= 6


# The memory's


def test_listeners_hear_in_the_order_of_the_numbers_whatever_thread_publishes() -> None:
    one = Hub(get_config().COMET, None)
    heard: list[int] = []
    internal = Channel("~test", Limits(history=10, ttl=60, max_bytes=1000))

    def listen(message: Message) -> None:
        heard.append(message.offset)
        if message.data == "asks":
            publish(one, Draft(internal, encode(internal.name, "answers", None)))

    one.listen(internal, listen)
    asks = Draft(internal, encode(internal.name, "asks", None))

    def run() -> None:
        for _ in range(100):
            publish(one, asks)

    in_threads(run, run, run)
    assert heard == list(range(1, 601))


def test_listener_that_fails_keeps_nobody_from_the_message(
    name: str, error_log: list[logging.LogRecord]
) -> None:
    one = Hub(get_config().COMET, None)
    internal = Channel("~test", Limits(history=10, ttl=60, max_bytes=1000))
    heard: list[object] = []

    def fail(message: Message) -> None:
        raise ZeroDivisionError

    one.listen(internal, fail)
    one.listen(internal, lambda message: heard.append(message.data))
    publish(one, Draft(internal, encode(internal.name, 1, None)))
    assert heard == [1]
    assert error_log.pop().getMessage() == "A listener to '~test' failed"


@override_settings(TORNJANGO={"COMET": {"MAX_CHANNELS": 5, "MAX_MEMORY": 2000}})
def test_memory_is_bounded_whatever_is_published() -> None:
    one = Hub(get_config().COMET, None)
    for n in range(100):
        publish(one, draft(f"open:{n % 20}", "x" * random.Random(n).randrange(1000)))
        status = one.status()
        assert status["channels"] <= 5
        assert status["bytes"] <= 2000
    assert one.status()["published"] == 100


@pytest.mark.gen_test
async def test_error_of_closing_is_raised_where_it_is_awaited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(wait: float) -> None:
        raise ZeroDivisionError

    one = Hub(get_config().COMET, LoopbackBroker(LoopbackServer()))
    monkeypatch.setattr(one, "close", fail)
    monkeypatch.setattr(hubs, "_hub", ("key", one))
    with pytest.raises(ZeroDivisionError):
        await hubs.aclose(0)
