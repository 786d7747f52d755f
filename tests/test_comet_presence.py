"""Who follows a channel. Processes are hubs that share a server; time goes on when a test says so."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import AnonymousUser, User
from django.http import HttpRequest
from django.test import RequestFactory, override_settings

from tests.comet_postgres import PostgresServer
from tests.loopback_broker import LoopbackBroker, LoopbackServer
from tests.postgres import Postgres
from tests.serving import serving, until
from tests.test_cycles import garbage
from tornjango import comet
from tornjango.comet import attendance, channels
from tornjango.comet import hub as hubs
from tornjango.comet.attendance import (
    FAREWELLS,
    GONE_AFTER,
    HEARTBEAT,
    MEMBERS_SHOWN,
    PIECE,
    PRESENCE,
    RETRY,
    TICK,
    Presence,
    member_id,
)
from tornjango.comet.brokers.base import Draft
from tornjango.comet.hub import Hub
from tornjango.comet.log import Position
from tornjango.comet.readers import Reader
from tornjango.comet.roll import Member
from tornjango.conf import get_config
from tornjango.exceptions import (
    BrokerUnavailable,
    ChannelForbidden,
    CometError,
    Overloaded,
    UnknownChannel,
)

ROOM = "seats:7"
STATES = f"{ROOM}@presence"
ANN, BOB, CARL = (Member(letter * 20, pk, letter) for pk, letter in enumerate("abc"))
LINGER = 10.0


allowed = {"yes": True}


@pytest.fixture(autouse=True)
def _declared() -> Iterator[None]:
    """For these tests only: where there is such a channel, every process that follows a broker speaks."""

    @comet.channel("seats:<int:pk>", presence=True)
    async def may_sit(request: HttpRequest, pk: int) -> bool:
        return allowed["yes"]

    @comet.channel("plain:<int:pk>")
    async def may_read(request: HttpRequest, pk: int) -> bool:
        return True

    allowed["yes"] = True
    yield
    for pattern in ("seats:<int:pk>", "plain:<int:pk>"):
        del channels._declared[pattern]


class Clock:
    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now


class Process(Hub):
    """Tells how far its listeners have heard."""

    heard: Position | None = None

    def begin(self, end: Position) -> None:
        super().begin(end)
        self.heard = end

    def deliver(self, messages: Sequence[comet.Message]) -> None:
        super().deliver(messages)
        self.heard = self.end


class World:
    """The processes of a project, and the server between them."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.server = LoopbackServer(self.clock)
        self.hubs: list[Process] = []

    async def start(self) -> Process:
        hub = Process(get_config().COMET, LoopbackBroker(self.server))
        hub.presence._clock = self.clock
        hub.presence.timer.wake = lambda: None
        self.hubs.append(hub)
        await hub.ready()
        return hub

    def kill(self, hub: Process) -> None:
        """Nobody hears of it any more, and no goodbye."""
        self.hubs.remove(hub)
        hub.close(0)

    def stop(self, hub: Process) -> None:
        self.hubs.remove(hub)
        hub.close(5)

    async def settle(self) -> None:
        """Two seconds, in which everybody says what there is to say."""
        for _ in range(10):
            await self._step(TICK)

    async def pass_time(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            await self._step(1)

    async def _step(self, seconds: float) -> None:
        self.clock.now += seconds
        for hub in self.hubs:
            hub.presence.run()
        await until(self._is_quiet)

    def _is_quiet(self) -> bool:
        return all(
            not hub.presence._sending and hub.heard == self.server.end
            for hub in self.hubs
            if hub.lost is None
        )

    def told(self, channel: str = STATES) -> list[Any]:
        """What a channel has been told, in order."""
        return [
            json.loads(message.body)["data"]
            for message in self.server.messages
            if message.channel == channel
        ]

    def counts(self) -> list[int]:
        return [state["count"] for state in self.told()]


@asynccontextmanager
async def world_of(count: int) -> AsyncIterator[tuple[World, list[Process]]]:
    world = World()
    started = [await world.start() for _ in range(count)]
    await world.settle()
    try:
        yield world, list(started)
    finally:
        for hub in world.hubs:
            hub.close(5)


class Words:
    """What a process that is alone sends."""

    def __init__(self) -> None:
        self.drafts: list[Draft] = []
        self.error: Exception | None = None

    def send(self, drafts: Sequence[Draft], wait: float) -> Future[Position]:
        if isinstance(self.error, Overloaded):
            raise self.error
        done: Future[Position] = Future()
        if self.error is not None:
            done.set_exception(self.error)
        else:
            self.drafts += drafts
            done.set_result(Position(b"epoch", len(self.drafts)))
        return done

    def data(self) -> list[Any]:
        return [json.loads(draft.body)["data"] for draft in self.drafts]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def words() -> Words:
    return Words()


@pytest.fixture
def alone(words: Words, clock: Clock) -> Presence:
    return Presence(words.send, alone=True, clock=clock)


# One process


@pytest.mark.gen_test
async def test_pages_are_told_the_whole_state(alone: Presence, words: Words) -> None:
    alone.appear(ROOM, ANN)
    alone.appear(ROOM, Member("x" * 20))
    alone.run()
    (draft,) = words.drafts
    assert (draft.channel.name, draft.channel.limits.latest) == (STATES, True)
    assert json.loads(draft.body) == {
        "channel": STATES,
        "event": "presence",
        "data": {
            "count": 2,
            "members": [
                {"id": ANN.id, "user": 0, "name": "a"},
                {"id": "x" * 20, "user": None, "name": None},
            ],
        },
    }


@pytest.mark.gen_test
async def test_gap_between_two_polls_is_no_leave(
    alone: Presence, words: Words, clock: Clock
) -> None:
    for _ in range(20):
        alone.appear(ROOM, ANN)
        alone.run()
        alone.vanish(ROOM, ANN.id, LINGER)
        clock.now += LINGER - 1
        alone.run()
    assert len(words.drafts) == 1
    assert alone.members(ROOM) == [ANN]


@pytest.mark.gen_test
async def test_member_leaves_when_it_does_not_come_back_in_time(
    alone: Presence, words: Words, clock: Clock
) -> None:
    alone.appear(ROOM, ANN)
    alone.run()
    alone.vanish(ROOM, ANN.id, LINGER)
    clock.now += TICK
    assert alone.run() == pytest.approx(LINGER - TICK)
    clock.now += LINGER
    assert alone.members(ROOM) == []
    alone.run()
    assert [state["count"] for state in words.data()] == [1, 0]


@pytest.mark.gen_test
async def test_member_is_there_until_its_last_reader_ends(alone: Presence) -> None:
    alone.appear(ROOM, ANN)
    alone.appear(ROOM, ANN)
    alone.vanish(ROOM, ANN.id, 0)
    assert alone.members(ROOM) == [ANN]
    alone.vanish(ROOM, ANN.id, 0)
    assert alone.members(ROOM) == []


@pytest.mark.gen_test
async def test_who_comes_and_goes_between_two_states_is_not_told_of(
    alone: Presence, words: Words, clock: Clock
) -> None:
    alone.appear(ROOM, ANN)
    alone.run()
    clock.now += TICK
    alone.appear(ROOM, BOB)
    alone.vanish(ROOM, BOB.id, 0)
    alone.run()
    assert len(words.drafts) == 1


@pytest.mark.gen_test
async def test_ten_thousand_are_counted_and_a_hundred_are_named(
    alone: Presence, words: Words, clock: Clock
) -> None:
    for n in range(10_000):
        alone.appear(ROOM, Member(f"{n:020}"))
        if n % 100 == 0:
            clock.now += TICK
            alone.run()
    clock.now += 10
    alone.run()
    # 20 seconds, with more deliveries for each state: not the hundred states of a small room.
    assert len(words.drafts) < 20
    last = words.data()[-1]
    assert last["count"] == len(alone.members(ROOM)) == 10_000
    assert [member["id"] for member in last["members"]] == [
        f"{n:020}" for n in range(MEMBERS_SHOWN)
    ]


@pytest.mark.gen_test
async def test_states_of_many_channels_are_told_a_few_at_a_time(
    alone: Presence, words: Words, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "STATES_PER_TICK", 10)
    for n in range(25):
        alone.appear(f"seats:{n}", ANN)
    sent = []
    for _ in range(4):
        clock.now += TICK
        alone.run()
        sent.append(len(words.drafts))
    assert sent == [10, 20, 25, 25]


@pytest.mark.gen_test
async def test_those_who_linger_are_bounded(
    alone: Presence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "MAX_LINGERING", 10)
    for n in range(100):
        alone.appear(ROOM, Member(str(n)))
        alone.vanish(ROOM, str(n), LINGER)
    assert [member.id for member in alone.members(ROOM)] == [str(n) for n in range(90, 100)]


@pytest.mark.parametrize(
    "error", [BrokerUnavailable("away"), Overloaded("full")], ids=["away", "full"]
)
@pytest.mark.gen_test
async def test_state_that_could_not_be_told_is_told_later(
    alone: Presence, words: Words, clock: Clock, error: Exception
) -> None:
    words.error = error
    alone.appear(ROOM, ANN)
    alone.run()
    words.error = None
    clock.now += RETRY - TICK
    alone.run()
    assert words.drafts == []
    clock.now += TICK
    alone.run()
    assert [state["count"] for state in words.data()] == [1]


@pytest.mark.gen_test
async def test_one_announcement_is_on_its_way_at_a_time(clock: Clock) -> None:
    sent: list[Sequence[Draft]] = []
    arrived: Future[Position] = Future()

    def send(drafts: Sequence[Draft], wait: float) -> Future[Position]:
        sent.append(drafts)
        return arrived

    presence = Presence(send, alone=False, clock=clock)
    for n in range(100):
        presence.appear(ROOM, Member(str(n)))
        clock.now += TICK
        presence.run()
    assert len(sent) == 1
    arrived.set_result(Position(b"epoch", 1))
    presence.run()
    (draft,) = sent[1]
    assert len(json.loads(draft.body)["data"]["entries"]) == 99


@pytest.mark.gen_test
async def test_process_that_has_stopped_says_nothing_more(alone: Presence, words: Words) -> None:
    alone.appear(ROOM, ANN)
    alone.close(5)
    alone.close(5)
    alone.appear(ROOM, BOB)
    assert alone.run() is None
    assert [draft.channel for draft in words.drafts] == [FAREWELLS]


@pytest.mark.gen_test
async def test_what_a_broker_cannot_store_is_logged(
    alone: Presence, words: Words, error_log: list[Any]
) -> None:
    words.error = ValueError("no text")
    alone.appear(ROOM, ANN)
    alone.run()
    assert "no text" in error_log.pop().getMessage()


@pytest.mark.gen_test
async def test_channel_that_is_not_declared_any_more_is_told_nothing(
    alone: Presence, words: Words
) -> None:
    alone.appear("unknown:1", ANN)
    alone.run()
    assert words.drafts == []


@pytest.mark.gen_test
async def test_nothing_is_left_when_everybody_has_left(alone: Presence, clock: Clock) -> None:
    for n in range(100):
        alone.appear(f"seats:{n}", ANN)
    alone.run()
    for n in range(100):
        alone.vanish(f"seats:{n}", ANN.id, LINGER)
    delay: float | None = 0.0
    while delay is not None:
        clock.now += delay
        delay = alone.run()
    kept = ("_readers", "_lingering", "_news", "_told", "_quiet", "_doubts", "_emptied", "_asks")
    assert {name: len(getattr(alone, name)) for name in kept} == dict.fromkeys(kept, 0)
    assert alone._roll.processes == {alone.id: {}}
    assert (list(alone._roll.channels()), alone._roll.changed) == ([], set())


# Several processes


@pytest.mark.gen_test
async def test_every_process_knows_who_is_there_and_one_tells() -> None:
    async with world_of(3) as (world, processes):
        for hub, member in zip(processes, (ANN, BOB, CARL), strict=True):
            hub.presence.appear(ROOM, member)
        await world.settle()
        for hub in processes:
            assert sorted(hub.members(ROOM)) == [ANN, BOB, CARL]
        assert world.counts()[-1] == 3
        before = len(world.told())
        processes[1].presence.vanish(ROOM, BOB.id, 0)
        await world.settle()
        assert world.counts()[before:] == [2]


@pytest.mark.gen_test
async def test_process_that_comes_late_asks() -> None:
    async with world_of(2) as (world, processes):
        processes[0].presence.appear(ROOM, ANN)
        await world.settle()
        before = len(world.told())
        late = await world.start()
        await world.settle()
        assert late.members(ROOM) == [ANN]
        assert len(world.told()) == before


@pytest.mark.gen_test
async def test_nothing_is_repeated_but_that_a_process_lives() -> None:
    async with world_of(2) as (world, processes):
        processes[0].presence.appear(ROOM, ANN)
        await world.settle()
        before = len(world.server.messages)
        await world.pass_time(10 * HEARTBEAT)
        news = world.server.messages[before:]
        assert {json.loads(message.body)["event"] for message in news} == {"lives"}
        assert len(news) <= 20
        assert processes[1].members(ROOM) == [ANN]


@pytest.mark.gen_test
async def test_members_of_a_process_that_was_killed_leave_after_a_time() -> None:
    async with world_of(3) as (world, processes):
        for hub, member in zip(processes, (ANN, BOB, CARL), strict=True):
            hub.presence.appear(ROOM, member)
        await world.settle()
        before = len(world.told())
        world.kill(processes[0])
        await world.pass_time(GONE_AFTER - 5)
        assert len(processes[1].members(ROOM)) == 3
        await world.pass_time(10)
        assert sorted(processes[1].members(ROOM)) == [BOB, CARL]
        assert world.counts()[before:] == [2]


@pytest.mark.gen_test
async def test_room_that_was_left_with_the_process_that_would_have_told_is_told_empty() -> None:
    async with world_of(3) as (world, processes):
        for n, hub in enumerate(processes):
            room = f"seats:{n}"
            hub.presence.appear(room, ANN)
        await world.settle()
        # Whoever has to tell that the first room is empty now, is killed at that moment.
        silent = next(it for it in processes if it.presence._speaker("seats:99") == it.presence.id)
        other = next(it for it in processes if it is not silent)
        other.presence.appear("seats:99", BOB)
        await world.settle()
        other.presence.vanish("seats:99", BOB.id, 0)
        world.kill(silent)
        await world.pass_time(GONE_AFTER + 10)
        assert world.told("seats:99@presence")[-1]["count"] == 0


@pytest.mark.gen_test
async def test_client_that_goes_to_another_process_has_not_left() -> None:
    async with world_of(2) as (world, (one, two)):
        one.presence.appear(ROOM, ANN)
        await world.settle()
        one.presence.vanish(ROOM, ANN.id, LINGER)
        two.presence.appear(ROOM, ANN)
        await world.pass_time(2 * LINGER)
        assert (one.members(ROOM), world.counts()) == ([ANN], [1])


@pytest.mark.gen_test
async def test_restart_one_after_the_other_lets_nobody_leave() -> None:
    async with world_of(2) as (world, (one, two)):
        one.presence.appear(ROOM, ANN)
        two.presence.appear(ROOM, BOB)
        await world.settle()
        before = len(world.told())
        for old, member in ((one, ANN), (two, BOB)):
            new = await world.start()
            await world.settle()
            old.presence.vanish(ROOM, member.id, LINGER)
            world.stop(old)
            await world.pass_time(LINGER - 1)
            new.presence.appear(ROOM, member)
            await world.pass_time(GONE_AFTER)
        assert set(world.counts()[before:]) <= {2}
        assert sorted(new.members(ROOM)) == [ANN, BOB]


@pytest.mark.gen_test
async def test_restart_of_all_at_once_lets_nobody_leave() -> None:
    async with world_of(2) as (world, (one, two)):
        one.presence.appear(ROOM, ANN)
        two.presence.appear(ROOM, BOB)
        await world.settle()
        world.stop(one)
        world.stop(two)
        new = await world.start()
        new.presence.appear(ROOM, BOB)
        await world.pass_time(LINGER)
        assert world.counts()[-1] == 2
        await world.pass_time(LINGER)
        assert new.members(ROOM) == [BOB]
        assert world.counts()[-1] == 1


@pytest.mark.gen_test
async def test_broker_that_is_away_for_long_lets_nobody_leave_and_what_changed_meanwhile_comes(
    error_log: list[Any],
) -> None:
    async with world_of(2) as (world, (one, two)):
        one.presence.appear(ROOM, ANN)
        two.presence.appear(ROOM, BOB)
        await world.settle()
        before = len(world.told())
        world.server.go_away()
        await until(lambda: one.lost and two.lost)
        for _ in range(10):
            world.clock.now += HEARTBEAT
            for hub in world.hubs:
                hub.presence.run()
        assert sorted(one.members(ROOM)) == [ANN, BOB]
        one.presence.appear(ROOM, CARL)
        two.presence.vanish(ROOM, BOB.id, 0)
        world.server.come_back()
        await until(lambda: not (one.lost or two.lost))
        await world.settle()
        for hub in (one, two):
            assert sorted(hub.members(ROOM)) == [ANN, CARL]
        assert 0 not in world.counts()[before:]
    error_log.clear()


@pytest.mark.parametrize("what", ["lose_everything", "forget"])
@pytest.mark.gen_test
async def test_log_that_was_lost_lets_nobody_leave(what: str) -> None:
    async with world_of(2) as (world, (one, two)):
        one.presence.appear(ROOM, ANN)
        two.presence.appear(ROOM, BOB)
        await world.settle()
        getattr(world.server, what)()
        await until(lambda: one.heard == two.heard == world.server.end)
        one.presence.appear(ROOM, CARL)
        await world.settle()
        for hub in (one, two):
            assert sorted(hub.members(ROOM)) == [ANN, BOB, CARL]
        assert world.counts()[-1] == 3
        assert min(world.counts()) >= 2


@pytest.mark.gen_test
async def test_process_that_slept_is_forgotten_and_found_again() -> None:
    async with world_of(2) as (world, (one, two)):
        one.presence.appear(ROOM, ANN)
        two.presence.appear(ROOM, BOB)
        await world.settle()
        world.hubs.remove(one)
        await world.pass_time(GONE_AFTER + 5)
        assert two.members(ROOM) == [BOB]
        world.hubs.append(one)
        await world.settle()
        # It does not take the others for gone, and they ask it.
        for hub in (one, two):
            assert sorted(hub.members(ROOM)) == [ANN, BOB]


@pytest.mark.gen_test
async def test_storm_of_ten_thousand_is_a_few_messages_and_none_is_large() -> None:
    async with world_of(2) as (world, (one, two)):
        before = len(world.server.messages)
        for n in range(10_000):
            one.presence.appear(ROOM, Member(f"{n:020}", n, f"user {n}"))
        await world.pass_time(10)
        messages = world.server.messages[before:]
        assert len(two.members(ROOM)) == 10_000
        assert world.counts()[-1] == 10_000
        assert len(messages) < 60
        assert max(len(message.body) for message in messages) < 1.2 * PIECE
        late = await world.start()
        await world.settle()
        assert len(late.members(ROOM)) == 10_000


@pytest.mark.gen_test
async def test_state_in_parts_counts_when_it_is_whole() -> None:
    async with world_of(2) as (world, (one, two)):
        hear, parts = two.presence.hear, []
        for n in range(3000):
            one.presence.appear(ROOM, Member(f"{n:020}"))
        await world.settle()
        one.presence._tells = True
        for message in world.server.messages:
            assert message.channel != FAREWELLS.name
        two.presence.hear = parts.append
        drafts = one.presence._whole(PRESENCE, "state")
        assert len(drafts) > 2
        # A process that begins to hear in the middle, asks for it all.
        fresh = Presence(Words().send, alone=False, clock=world.clock)
        for n, draft in enumerate(drafts[1:]):
            fresh.hear(comet.Message(PRESENCE.name, n, world.clock(), draft.body))
        assert fresh.members(ROOM) == []
        assert fresh._asks == {one.presence.id}
        for n, draft in enumerate(drafts):
            assert fresh.members(ROOM) == []
            fresh.hear(comet.Message(PRESENCE.name, n, world.clock(), draft.body))
        assert len(fresh.members(ROOM)) == 3000
        two.presence.hear = hear


@pytest.mark.gen_test
async def test_state_from_a_process_that_did_not_know_better_is_put_right() -> None:
    async with world_of(2) as (world, (one, two)):
        one.presence.appear(ROOM, ANN)
        two.presence.appear(ROOM, BOB)
        await world.settle()
        stale = channels.companion(ROOM)
        body = json.dumps({"channel": STATES, "event": "presence", "data": {"count": 1}}).encode()
        one.send([Draft(stale, body)], 5).result(5)
        await world.pass_time(2 * HEARTBEAT)
        assert world.counts()[-2:] == [1, 2]


@pytest.mark.gen_test
async def test_process_that_does_not_hear_the_others_asks_the_log() -> None:
    async with world_of(1) as (world, (one,)):
        one.presence.appear(ROOM, ANN)
        await world.settle()
        command = Hub(get_config().COMET, LoopbackBroker(world.server))
        with pytest.raises(BrokerUnavailable, match="in a thread"):
            command.members(ROOM)
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(None, command.members, ROOM) == [ANN]
        assert await loop.run_in_executor(None, command.members, "seats:8") == []
        command.close(0)


@pytest.mark.gen_test
async def test_over_postgresql(own_postgres: Postgres) -> None:
    server = PostgresServer(own_postgres)
    one, two = (Hub(get_config().COMET, server.make()) for _ in range(2))
    try:
        for hub in (one, two):
            await hub.ready()
            hub.presence.start()
        one.presence.appear(ROOM, ANN)
        two.presence.appear(ROOM, BOB)
        await until(lambda: sorted(one.members(ROOM)) == sorted(two.members(ROOM)) == [ANN, BOB])
        one.presence.vanish(ROOM, ANN.id, 0)
        await until(lambda: two.members(ROOM) == [BOB])
    finally:
        for hub in (one, two):
            hub.presence.timer.stop()
            hub.close(5)


@pytest.mark.gen_test
async def test_memory_is_handed_over_with_who_was_there(tmp_path: Path) -> None:
    clock = Clock()
    old, new = (Hub(get_config().COMET, None) for _ in range(2))
    for hub in (old, new):
        hub.presence._clock = clock
    old.presence.appear(ROOM, ANN)
    old.save(str(tmp_path / "kept"))
    new.load(str(tmp_path / "kept"))
    assert new.members(ROOM) == [ANN]
    clock.now += LINGER + new.waiters.spread() + 1
    assert new.members(ROOM) == []


# Readers


def _request(user: User | None = None, session: str = "") -> HttpRequest:
    request = RequestFactory().get("/")
    request.COOKIES["sessionid"] = session
    request.asked = 0

    async def auser() -> User | AnonymousUser:
        request.asked += 1
        return user or AnonymousUser()

    request.auser = auser
    return request


def _reader(hub: Hub, client: str | None, request: HttpRequest | None = None) -> Reader:
    reader = Reader(request or _request(), transport="sse", client=client)
    reader.hub = hub
    return reader


@pytest.fixture
def hub(clock: Clock) -> Hub:
    hub = Hub(get_config().COMET, None)
    hub.presence._clock = clock
    hub.presence.timer.wake = lambda: None
    return hub


@pytest.mark.gen_test
async def test_reader_is_there_while_it_is_parked_and_a_while_longer(
    hub: Hub, clock: Clock
) -> None:
    reader = _reader(hub, "tab")
    await reader.follow([ROOM], None)
    assert hub.members(ROOM) == []
    with reader.parked():
        assert [member.name for member in hub.members(ROOM)] == [None]
    assert len(hub.members(ROOM)) == 1
    clock.now += get_config().COMET.LINGER
    assert hub.members(ROOM) == []


@pytest.mark.gen_test
async def test_reader_without_a_name_leaves_at_once(hub: Hub) -> None:
    reader = _reader(hub, None)
    await reader.follow([ROOM], None)
    with reader.parked():
        assert len(hub.members(ROOM)) == 1
    assert hub.members(ROOM) == []


@pytest.mark.gen_test
async def test_reader_that_leaves_a_channel_is_gone_at_once_and_may_come_back(hub: Hub) -> None:
    reader = _reader(hub, "tab")
    await reader.follow(["plain:1"], None)
    with reader.parked():
        await reader.follow([ROOM], None)
        assert len(hub.members(ROOM)) == 1
        reader.leave([ROOM])
        assert hub.members(ROOM) == []
        await reader.follow([ROOM], None)
        assert len(hub.members(ROOM)) == 1


@pytest.mark.gen_test
async def test_reader_without_a_request_is_nobody(hub: Hub) -> None:
    reader = Reader(None, transport="follow")
    reader.hub = hub
    await reader.follow([ROOM, STATES], None)
    with reader.parked():
        assert hub.members(ROOM) == []


@pytest.mark.gen_test
async def test_two_readers_of_a_client_are_one_member_and_two_clients_of_a_user_are_two(
    hub: Hub,
) -> None:
    ann = User(pk=7, username="ann")
    readers = [
        _reader(hub, client, _request(ann, session))
        for client, session in (("tab", "s1"), ("tab", "s1"), ("tab", "s2"), ("other", "s1"))
    ]
    for reader in readers:
        await reader.follow([ROOM], None)
    with readers[0].parked(), readers[1].parked(), readers[2].parked(), readers[3].parked():
        members = hub.members(ROOM)
        assert [(member.user, member.name) for member in members] == [(7, "ann")] * 3
        assert len({member.id for member in members}) == 3
        assert not any("tab" in member.id for member in members)


@pytest.mark.gen_test
async def test_user_is_asked_for_once_per_client_and_only_for_presence(hub: Hub) -> None:
    ann = User(pk=7, username="ann")
    requests = [_request(ann) for _ in range(3)]
    for request, names in zip(requests, (["plain:1"], [ROOM], [ROOM, "seats:8"]), strict=True):
        reader = _reader(hub, "tab", request)
        await reader.follow(names, None)
        with reader.parked():
            pass
    assert [request.asked for request in requests] == [0, 1, 0]
    assert [member.name for member in hub.members("seats:8")] == ["ann"]


@pytest.mark.gen_test
async def test_reader_that_is_revoked_leaves(hub: Hub) -> None:
    reader = _reader(hub, "tab")
    await reader.follow([ROOM, STATES], None)
    with reader.parked():
        allowed["yes"] = False
        hub.send([Draft(hubs.REVOKED, json.dumps({"data": ROOM}).encode())], 1)
        with pytest.raises(ChannelForbidden) as refused:
            await reader.next(5)
        assert hub.members(ROOM) == []
    # Who may not read a channel may not read who is there.
    assert STATES in str(refused.value)


@pytest.mark.gen_test
async def test_reader_that_a_drain_sends_away_has_more_time_to_come_back(
    hub: Hub, clock: Clock
) -> None:
    reader = _reader(hub, "tab")
    await reader.follow([ROOM], None)
    with reader.parked():
        hub.waiters.drain()
    clock.now += get_config().COMET.LINGER + hub.waiters.spread() - 0.1
    assert len(hub.members(ROOM)) == 1
    clock.now += 0.1
    assert hub.members(ROOM) == []


# The companion


@pytest.mark.gen_test
async def test_newcomer_is_told_the_state_though_nothing_changes(hub: Hub) -> None:
    hub.presence.appear(ROOM, ANN)
    hub.presence.run()
    reader = _reader(hub, None)
    await reader.follow([STATES], None)
    with reader.parked():
        answer = await reader.next(5)
        assert [message.data["count"] for message in answer.messages] == [1]
        hub.presence.appear(ROOM, BOB)
        hub.presence._clock.now += TICK
        hub.presence.run()
        answer = await reader.next(5)
    assert [message.data["count"] for message in answer.messages] == [2]


@pytest.mark.parametrize("told", [True, False], ids=["told-again", "lost"])
@pytest.mark.gen_test
async def test_reader_of_states_is_never_told_of_a_gap(told: bool) -> None:
    async with world_of(1) as (world, (hub,)):
        hub.presence.appear(ROOM, ANN)
        await world.settle()
        reader = _reader(hub, None)
        await reader.follow([STATES, "plain:1"], None)
        with reader.parked():
            assert len((await reader.next(5)).messages) == 1
            world.server.lose_everything()
            await until(lambda: hub.heard == world.server.end)
            if told:
                await world.settle()
            world.server.forget()
            answers = [await reader.next(0)]
            while answers[-1].more:
                answers.append(await reader.next(5 if told else 0))
        assert [gap for answer in answers for gap in answer.gaps] == ["plain:1"]
        assert [it.data["count"] for answer in answers for it in answer.messages] == [1] * told


@pytest.mark.gen_test
async def test_page_with_a_cursor_from_before_its_queries_is_told_the_state() -> None:
    room = "seats:71"
    presence = comet.get_hub().presence
    presence.appear(room, ANN)
    presence.run()
    try:
        answer = await comet.wait(None, comet.cursor(f"{room}@presence"), f"{room}@presence")
        assert [message.data["count"] for message in answer.messages] == [1]
        assert comet.presence(room) == [ANN]
    finally:
        presence.vanish(room, ANN.id, 0)


@pytest.mark.gen_test
async def test_companion_asks_as_its_channel_does() -> None:
    allowed["yes"] = False
    with pytest.raises(ChannelForbidden, match=STATES):
        await comet.wait(_request(), None, STATES)


@pytest.mark.parametrize(
    "name", ["plain:1@presence", "seats:x@presence", "seats:1@presence@presence"]
)
def test_only_presence_channels_have_a_companion(name: str) -> None:
    with pytest.raises(UnknownChannel):
        channels.resolve(name)


def test_nobody_publishes_to_a_companion_from_a_browser() -> None:
    @comet.channel("stage:<int:pk>", presence=True, publisher=lambda request, pk: True)
    async def may_watch(request: HttpRequest, pk: int) -> bool:
        return True

    try:
        assert channels.resolve("stage:1").declaration.publisher
        assert channels.resolve("stage:1@presence").declaration.publisher is None
    finally:
        del channels._declared["stage:<int:pk>"]


def test_channel_without_presence_says_so() -> None:
    with pytest.raises(CometError, match="presence=True"):
        comet.presence("plain:1")


def test_what_others_know_a_client_by_does_not_tell_its_name() -> None:
    assert member_id("tab") == member_id("tab") != member_id("tub")
    assert "tab" not in member_id("tab")
    assert member_id(None) != member_id(None)


@pytest.mark.gen_test
async def test_reader_leaves_nothing_for_the_garbage_collector(hub: Hub) -> None:
    request = _request()

    async def poll() -> None:
        reader = _reader(hub, "tab", request)
        await reader.follow([ROOM, STATES], None)
        with reader.parked():
            await reader.next(0)

    await poll()
    with garbage() as found:
        await poll()
    assert found == []


# The timer, and a server


@pytest.mark.gen_test
async def test_timer_tells_by_itself_and_rests_when_there_is_nothing_to_do(
    words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "TICK", 0.001)
    monkeypatch.setattr(attendance, "HEARTBEAT", 0.01)
    presence = Presence(words.send, alone=True)
    presence.appear(ROOM, ANN)
    await until(lambda: words.drafts)
    presence.vanish(ROOM, ANN.id, 0.01)
    await until(lambda: len(words.drafts) == 2)
    await until(lambda: presence.timer._handle is None)


@pytest.mark.gen_test
async def test_timer_goes_on_after_an_error(
    monkeypatch: pytest.MonkeyPatch, error_log: list[Any]
) -> None:
    for name in ("TICK", "HEARTBEAT"):
        monkeypatch.setattr(attendance, name, 0.001)
    calls: list[int] = []

    def run() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError

    timer = attendance.Timer(run)
    timer.start()
    await until(lambda: len(calls) == 2)
    assert error_log.pop().exc_info[0] is ZeroDivisionError


def test_timer_goes_on_another_loop_when_its_own_is_closed(
    words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "TICK", 0.001)
    presence = Presence(words.send, alone=True)

    async def appear(member: Member) -> None:
        before = len(words.drafts)
        presence.appear(ROOM, member)
        await until(lambda: len(words.drafts) > before)

    asyncio.run(appear(ANN))
    presence.timer.wake()  # no loop runs here
    asyncio.run(appear(BOB))
    assert [state["count"] for state in words.data()] == [1, 2]


@pytest.mark.gen_test
async def test_served_readers_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "TICK", 0.01)
    room = "seats:72"
    with override_settings(TORNJANGO={"COMET": {"LINGER": 0.1}}):
        async with serving(ROOT_URLCONF="tests.comet_urls") as site:
            target = f"/comet/poll/?channel={room}&client=tab"
            answer = json.loads((await site.request(target)).body)
            assert len(comet.presence(room)) == 1
            states = comet.follow(None, None, f"{room}@presence")
            counts = []
            async for state in states:
                counts.append(state.data["count"])
                if counts[-1] == 0:
                    break
    assert (answer["messages"], counts[-1]) == ([], 0)


def test_nobody_else_publishes_who_is_there() -> None:
    with pytest.raises(comet.CometError, match="tells who follows"):
        comet.publish("seats:1@presence", {"count": 7})
