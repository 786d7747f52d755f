"""COMET's promise: whatever happens, what a reader saw is a contiguous slice of each channel, or it was told of a gap.

A machine does at random what happens to a project: two processes publish and restart, readers lose answers, change process
and transport, are refused and allowed again, and the broker goes away, comes back, or loses its data. All that any reader was
ever answered is kept, and compared in the end with what was published: see `Ledger`.

``TESTS_PROMISE=5000 bin/test tests/test_comet_promise.py -s`` does so many steps over each broker, and prints what there was.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

import pytest
from django.http import HttpRequest
from django.test import RequestFactory, override_settings
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.comet_brokers import Server
from tests.comet_postgres import PostgresServer
from tests.comet_processes import PATIENCE, draft, reader_at
from tests.comet_redis import RedisServer
from tests.loopback_broker import LoopbackBroker, LoopbackServer
from tests.redis_server import PROGRAM, REASON, Redis
from tornjango import comet
from tornjango.comet import cursors
from tornjango.comet.brokers.base import Broker, Draft
from tornjango.comet.hub import REVOKED, Hub
from tornjango.comet.log import Audience, Message, Position
from tornjango.comet.publishing import encode
from tornjango.comet.readers import Answer, Reader
from tornjango.conf import get_config
from tornjango.exceptions import BrokerUnavailable, ChannelForbidden

T = TypeVar("T")

STEPS = int(os.environ.get("TESTS_PROMISE", "0"))
STEPS_PER_RUN = 40

#: The channels' kinds, by what their names begin with.
OPEN, SHORT, LATEST, GUARDED = "open", "short", "promise-latest", "promise-guarded"
SHORT_HISTORY = 3

MINE, OTHERS = (Audience(frozenset({user}), frozenset()) for user in ("7", "8"))

#: Names whose channel nobody may read at present.
denied: set[str] = set()


@comet.channel(LATEST + ":<str:name>", latest=True)
async def latest(request: HttpRequest, name: str) -> bool:
    return True


@comet.channel(GUARDED + ":<str:name>")
async def guarded(request: HttpRequest, name: str) -> bool:
    return name not in denied


def _kind(name: str) -> str:
    return name.partition(":")[0]


def _request() -> HttpRequest:
    """From user 7."""

    async def auser() -> Any:
        return SimpleNamespace(is_authenticated=True, pk=7)

    request = RequestFactory().get("/")
    request.auser = auser
    return request


# What was published, and what was answered


@dataclass(frozen=True)
class Sent:
    """What a message's data, a number, stands for."""

    channel: str
    audience: Audience | None


@dataclass(frozen=True)
class Slice:
    """One answer, as far as one channel is concerned: what is to be seen between two positions."""

    reader: str
    channel: str
    start: Position
    end: Position
    seen: list[Message]
    gap: bool
    #: Whether the reader is user 7; others hear only what is for all.
    is_user: bool
    #: Whether the answer has not arrived.
    lost: bool
    #: How many messages had been sent by then, to whatever channel.
    sent: int


@dataclass
class Ledger:
    """What was published where, as publishers and readers have heard; and every slice that was answered."""

    sent: dict[int, Sent] = field(default_factory=dict)
    truth: dict[Position, int] = field(default_factory=dict)
    slices: list[Slice] = field(default_factory=list)

    def note(self, position: Position, number: int) -> None:
        """A position means one message, whoever says so, and a message has one position."""
        assert self.truth.setdefault(position, number) == number, (position, number)

    def check(self) -> None:
        for one in self.slices:
            for message in one.seen:
                position = Position(one.end.epoch, message.offset)
                self.note(position, message.data)
                assert self.sent[message.data].channel == one.channel
        placed = Counter(self.truth.values())
        assert max(placed.values(), default=1) == 1, "a message was stored twice"
        for one in self.slices:
            self._check(one)

    def _check(self, one: Slice) -> None:
        seen = [message.offset for message in one.seen]
        if one.gap:
            assert not seen, f"messages beside a gap: {one}"
            self._check_gap(one)
            return
        assert one.start.epoch == one.end.epoch, f"another epoch without a gap: {one}"
        there = self.between(one)
        if _kind(one.channel) == LATEST:
            assert set(seen) <= set(there), f"{seen} of {there}: {one}"
        else:
            assert seen == there, f"{seen}, but there were {there}: {one}"

    def _check_gap(self, one: Slice) -> None:
        """Of what is kept long enough, nobody is told of a gap who has lost nothing.

        A broker may already have forgotten for the sake of messages that the reader's process has yet to hear of, or of
        some that nobody knows whether they were stored.
        """
        if one.start.epoch != one.end.epoch or _kind(one.channel) != SHORT:
            return
        by_then = set(itertools.islice(self.sent, one.sent))
        lost = sum(
            position.epoch == one.end.epoch
            and position.offset > one.start.offset
            and number in by_then
            and self.sent[number].channel == one.channel
            for position, number in self.truth.items()
        )
        lost += sum(
            self.sent[it].channel == one.channel for it in by_then - set(self.truth.values())
        )
        assert lost > SHORT_HISTORY, f"a gap where {lost} had come: {one}"

    def between(self, one: Slice) -> list[int]:
        """The numbers of what a slice's reader should have seen."""
        epoch = one.end.epoch
        return sorted(
            position.offset
            for position, number in self.truth.items()
            if position.epoch == epoch
            and one.start.offset < position.offset <= one.end.offset
            and self.sent[number].channel == one.channel
            and self._is_for(one, self.sent[number].audience)
        )

    def _is_for(self, one: Slice, audience: Audience | None) -> bool:
        return audience is None or (one.is_user and audience == MINE)


class Client:
    """One who follows channels: it knows its cursor, and nothing of processes."""

    def __init__(self, world: Promise, names: list[str], request: HttpRequest | None) -> None:
        self.world = world
        self.name = f"reader {len(world.clients)}"
        self.names = names
        self.request = request
        self.cursor: str | None = None
        self.grant: str | None = None
        #: Answers do not reach it any more, and the server does not know that.
        self.deaf = False
        self.stream: Future[None] | None = None
        self.error: BaseException | None = None

    def position(self, name: str) -> Position:
        assert self.cursor is not None
        return cursors.decode(self.cursor, [name])[name]

    def take(self, before: str, answer: Answer) -> None:
        start, end = (cursors.decode(cursor, self.names) for cursor in (before, answer.cursor))
        offsets = [message.offset for message in answer.messages]
        assert offsets == sorted(set(offsets))
        for name in self.names:
            seen = [message for message in answer.messages if message.channel == name]
            gap = name in answer.gaps
            is_user = self.request is not None
            ledger = self.world.ledger
            known = seen, gap, is_user, self.deaf, len(ledger.sent)
            slice_ = Slice(self.name, name, start[name], end[name], *known)
            ledger.slices.append(slice_)
            self.world.check_allowed(slice_)
        counts = self.world.counts
        counts["answers"] += 1
        counts["answers lost"] += self.deaf
        counts["messages read"] += len(answer.messages)
        counts["gaps"] += len(answer.gaps)
        if not self.deaf:
            self.cursor = answer.cursor
            self.grant = answer.grant or self.grant

    async def _reader(self, hub: Hub) -> Reader:
        return await reader_at(
            hub, self.cursor, *self.names, request=self.request, grant=self.grant
        )

    async def poll(self, hub: Hub, seconds: float) -> None:
        """One request; its answer may be lost."""
        with suppress(BrokerUnavailable, ChannelForbidden):
            reader = await self._reader(hub)
            before = reader.cursor
            with reader.parked():
                answer = await reader.next(seconds)
            self.take(self.cursor or before, answer)

    async def follow(self, hub: Hub) -> None:
        """A stream, until it is cancelled: each answer comes after the one before, whether that has arrived or not."""
        try:
            reader = await self._reader(hub)
            at = self.cursor or reader.cursor
            with reader.parked():
                while True:
                    answer = await reader.next(0.05)
                    self.take(at, answer)
                    at = answer.cursor
        except (BrokerUnavailable, ChannelForbidden):
            self.world.counts["streams refused"] += 1
        except Exception as error:
            self.error = error
            raise


class Promise(RuleBasedStateMachine):
    server: ClassVar[Server | None]
    counts: ClassVar[Counter[str]]

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="promise", daemon=True)
        self.thread.start()
        self.tag = uuid.uuid4().hex
        self.names = [f"{kind}:{self.tag}" for kind in (OPEN, SHORT, LATEST, GUARDED)]
        self.ledger = Ledger()
        self.numbers = itertools.count()
        self.sending: list[tuple[list[int], Future[Position]]] = []
        self.clients: list[Client] = []
        self.away: str | None = None
        #: Where the guarded channel was revoked, while nobody may read it.
        self.revoked: Position | None = None
        self.hubs = [self.process() for _ in range(2 if self.server else 1)]
        for hub in self.hubs:
            self.call(self.ready(hub))
        for request in (None, _request()):
            for names in (self.names, self.names[:2], self.names[3:]):
                client = Client(self, names, request)
                self.clients.append(client)
                self.call(client.poll(self.hubs[0], 0))

    async def ready(self, hub: Hub) -> None:
        """Also on a machine on which a second, the TIMEOUT here, is not enough."""
        deadline = time.monotonic() + PATIENCE
        while not hub.is_ready:
            try:
                await hub.ready()
            except BrokerUnavailable:
                if time.monotonic() > deadline:
                    raise

    def process(self) -> Hub:
        hub = Hub(get_config().COMET, None if self.server is None else self.server.broker())
        hub.start()
        return hub

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE * 2)

    def hub(self, which: int) -> Hub:
        return self.hubs[which % len(self.hubs)]

    def check_allowed(self, one: Slice) -> None:
        revoked = self.revoked
        if _kind(one.channel) != GUARDED or not one.is_user or revoked is None:
            return
        for message in one.seen:
            assert (one.end.epoch, message.offset) < revoked or one.end.epoch != revoked.epoch, (
                f"read although it was revoked at {revoked}: {one}"
            )

    # What happens

    def send(self, which: int, drafts: list[Draft], numbers: list[int], wait: float) -> None:
        self.counts["messages published"] += len(drafts)
        self.sending.append((numbers, self.hub(which).send(drafts, wait)))

    def drafts(self, name: str, audiences: list[Audience | None]) -> tuple[list[Draft], list[int]]:
        numbers = [next(self.numbers) for _ in audiences]
        for number, audience in zip(numbers, audiences, strict=True):
            self.ledger.sent[number] = Sent(name, audience)
        pairs = zip(numbers, audiences, strict=True)
        return [draft(name, number, audience) for number, audience in pairs], numbers

    WHICH = st.integers(0, 1)
    NAME = st.integers(0, 3)
    CLIENT = st.integers(0, 5)
    SELDOM = st.sampled_from([False, False, False, True])

    @rule(
        which=WHICH,
        name=NAME,
        audiences=st.lists(
            st.sampled_from([None, None, None, MINE, OTHERS]), min_size=1, max_size=7
        ),
        wait=st.sampled_from([0.0, PATIENCE]),
    )
    def publish(self, which: int, name: int, audiences: list[Audience | None], wait: float) -> None:
        drafts, numbers = self.drafts(self.names[name], audiences)
        self.send(which, drafts, numbers, wait)

    def traffic(self) -> None:
        """Something is always on its way when something happens."""
        for which in (0, 1):
            for name in self.names:
                drafts, numbers = self.drafts(name, [None])
                self.send(which, drafts, numbers, PATIENCE)

    @rule(which=WHICH, count=st.integers(1, 30))
    def publish_in_all_channels(self, which: int, count: int) -> None:
        for n in range(count):
            drafts, numbers = self.drafts(self.names[n % 4], [None])
            self.send(which, drafts, numbers, PATIENCE)

    @precondition(lambda self: self.away is None)
    @rule()
    def wait_for_publishers(self) -> None:
        for numbers, sent in self.sending:
            self.settle(numbers, sent)
        self.sending.clear()

    def settle(self, numbers: list[int], sent: Future[Position]) -> None:
        """What was not published for sure may have been all the same; readers will tell."""
        try:
            end = sent.result(PATIENCE * 2)
        except BrokerUnavailable:
            self.counts["publishes failed"] += 1
            return
        for offset, number in enumerate(reversed(numbers)):
            self.ledger.note(Position(end.epoch, end.offset - offset), number)

    @rule(client=CLIENT, which=WHICH, seconds=st.sampled_from([0.0, 0.02]), lost=st.booleans())
    def poll(self, client: int, which: int, seconds: float, lost: bool) -> None:
        one = self.clients[client]
        self.leave(one)
        one.deaf = lost
        self.call(one.poll(self.hub(which), seconds))
        one.deaf = False

    @rule(client=CLIENT, which=WHICH)
    def stream(self, client: int, which: int) -> None:
        one = self.clients[client]
        self.leave(one)
        self.counts["streams"] += 1
        self.traffic()
        one.stream = asyncio.run_coroutine_threadsafe(one.follow(self.hub(which)), self.loop)

    @rule(client=CLIENT)
    def go_deaf(self, client: int) -> None:
        one = self.clients[client]
        one.deaf = one.stream is not None

    def leave(self, one: Client) -> None:
        """Whoever comes back knows what has arrived."""
        stream, one.stream = one.stream, None
        if stream is not None:
            # Also a deaf one's answers were noted, by themselves; in the loop's thread, so that none is noted by half.
            stream.cancel()
            self.call(asyncio.sleep(0))
        if one.error is not None:
            raise one.error
        one.deaf = False

    @rule(which=WHICH)
    def restart(self, which: int) -> None:
        """A worker was killed, or ended: its streams with it. What it had not published yet is not."""
        self.counts["restarts"] += 1
        self.traffic()
        old = self.hub(which)
        self.end_streams()
        old.close(0)
        self.hubs[which % len(self.hubs)] = self.process()

    def end_streams(self) -> None:
        for client in self.clients:
            self.leave(client)

    @precondition(lambda self: self.server is None)
    @rule()
    def hand_over(self) -> None:
        """The memory's graceful restart: here alone nobody is told of a gap."""
        self.counts["handed over"] += 1
        self.traffic()
        old, new = self.hubs[0], self.process()
        ours, theirs = socket.socketpair()
        new.expect(theirs)
        old.hand_over(ours)
        self.call(self.ready(new))
        self.end_streams()
        old.close(PATIENCE)
        self.hubs[0] = new

    # The broker

    @precondition(lambda self: self.server is not None and self.away is None)
    @rule()
    def end_connections(self) -> None:
        assert self.server is not None
        self.counts["connections ended"] += 1
        self.traffic()
        self.server.end_connections()

    @precondition(lambda self: self.server is not None and self.away is None)
    @rule(how=st.sampled_from(["stopped", "frozen"]), really=SELDOM)
    def go_away(self, how: str, really: bool) -> None:
        assert self.server is not None
        if not really:
            return
        self.away = how
        self.counts[how] += 1
        self.traffic()
        (self.server.stop if how == "stopped" else self.server.freeze)()

    @precondition(lambda self: self.away is not None)
    @rule()
    def come_back(self) -> None:
        assert self.server is not None
        (self.server.start if self.away == "stopped" else self.server.thaw)()
        self.away = None

    @precondition(lambda self: self.server is not None and self.away is None)
    @rule(really=SELDOM)
    def lose_everything(self, really: bool) -> None:
        assert self.server is not None
        if not really:
            return
        self.wait_for_publishers()
        self.counts["data lost"] += 1
        self.traffic()
        self.server.empty()
        self.server.end_connections()

    @precondition(lambda self: self.server is not None and self.away is None)
    @rule()
    def trim(self) -> None:
        assert self.server is not None
        self.counts["trimmed"] += 1
        self.traffic()
        self.server.forget()

    # Who may read

    @precondition(lambda self: self.away is None and self.tag not in denied)
    @rule(which=WHICH)
    def revoke(self, which: int) -> None:
        """Under a stream that would be glad to hear what comes then."""
        self.stream(len(self.clients) - 1, which + 1)
        self.counts["revoked"] += 1
        self.traffic()
        denied.add(self.tag)
        number = next(self.numbers)
        self.ledger.sent[number] = Sent(REVOKED.name, None)
        sent = self.hub(which).send(
            [Draft(REVOKED, encode(REVOKED.name, self.names[3], None))], PATIENCE
        )
        with suppress(BrokerUnavailable):
            self.revoked = sent.result(PATIENCE * 2)
            self.ledger.note(self.revoked, number)
        self.traffic()
        self.wait_for_publishers()

    @precondition(lambda self: self.tag in denied)
    @rule()
    def allow(self) -> None:
        self.revoked = None
        denied.discard(self.tag)

    # In the end

    def teardown(self) -> None:
        try:
            self.end()
        finally:
            for client in self.clients:
                if client.stream is not None:
                    client.stream.cancel()
            for hub in self.hubs:
                hub.close(0)
            if self.server is not None:
                self.server.thaw()
                self.server.start()
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.loop.close()
            denied.discard(self.tag)

    def end(self) -> None:
        """All is well again: everyone reads up to the end, and what they have seen is compared."""
        self.counts["runs"] += 1
        if self.away is not None:
            self.come_back()
        self.allow()
        self.wait_for_publishers()
        self.end_streams()
        for hub in self.hubs:
            numbers = [next(self.numbers)]
            self.ledger.sent[numbers[0]] = Sent(self.names[0], None)
            self.settle(numbers, hub.send([draft(self.names[0], numbers[0])], PATIENCE))
        last = max(self.ledger.truth, key=lambda position: self.ledger.truth[position])
        for n, client in enumerate(self.clients):
            self.call(self.catch_up(client, self.hub(n), last))
        self.ledger.check()
        self.check_latest()

    async def catch_up(self, client: Client, hub: Hub, last: Position) -> None:
        deadline = time.monotonic() + PATIENCE
        while not all(self.reached(client.position(name), last) for name in client.names):
            assert time.monotonic() < deadline, (client.name, last, hub.status())
            await client.poll(hub, 0.05)

    def reached(self, at: Position, last: Position) -> bool:
        return at.epoch == last.epoch and at.offset >= last.offset

    def check_latest(self) -> None:
        """Who stands at the end has seen the newest message, or has been told that it is lost."""
        for client in self.clients:
            name = f"{LATEST}:{self.tag}"
            if name not in client.names:
                continue
            mine = [
                it
                for it in self.ledger.slices
                if (it.reader, it.channel, it.lost) == (client.name, name, False)
            ]
            end = client.position(name)
            newest = max(
                (
                    position.offset
                    for position, number in self.ledger.truth.items()
                    if position.epoch == end.epoch
                    and position.offset <= end.offset
                    and self.ledger.sent[number] == Sent(name, None)
                ),
                default=0,
            )
            known = [it.end.offset for it in mine if it.gap and it.end.epoch == end.epoch]
            for one in mine:
                if one.end.epoch == end.epoch:
                    known += [message.offset for message in one.seen]
            begun = mine[0].start
            if begun.epoch != end.epoch or begun.offset < newest:
                assert max(known, default=0) >= newest, (client.name, newest, known)


# Over each broker


class LoopbackServing(Server):
    def __init__(self) -> None:
        super().__init__()
        self.log = LoopbackServer()

    def make(self) -> Broker:
        return LoopbackBroker(self.log)

    def end_connections(self) -> None:
        self.log.go_away()
        self.log.come_back()

    def stop(self) -> None:
        self.log.go_away()

    def start(self) -> None:
        self.log.come_back()

    freeze, thaw = stop, start

    def lose(self, count: int) -> None:
        raise NotImplementedError

    def empty(self) -> None:
        self.log.lose_everything()

    def forget(self) -> None:
        """It always does so at once."""


def _postgres(request: pytest.FixtureRequest) -> Server:
    return PostgresServer(request.getfixturevalue("own_postgres"))


def _redis(request: pytest.FixtureRequest) -> Server:
    return RedisServer(request.getfixturevalue("redis"))


SERVERS: dict[str, Callable[[pytest.FixtureRequest], Server | None]] = {
    "memory": lambda request: None,
    "loopback": lambda request: LoopbackServing(),
    "postgres": _postgres,
    "redis": _redis,
}

#: Runs in each test; those of a broker in a server take longer.
RUNS = {"memory": 8, "loopback": 8, "postgres": 2, "redis": 3}


@pytest.fixture
def redis() -> Iterator[Redis]:
    if PROGRAM is None:
        pytest.skip(REASON)
    with Redis() as redis:
        redis.start()
        yield redis


@pytest.fixture(autouse=True)
def _expected(error_log: list[logging.LogRecord]) -> Iterator[None]:
    """Of these a broker that goes away, and a process that ends, have every reason."""
    yield
    expected = ("COMET has lost the", "messages were not published")
    error_log[:] = [it for it in error_log if not any(text in it.getMessage() for text in expected)]


@pytest.mark.parametrize("name", SERVERS)
def test_readers_see_a_contiguous_slice_or_are_told_of_a_gap(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Broker, "TIMEOUT", 1.0)
    runs = STEPS // STEPS_PER_RUN or RUNS[name]
    server = SERVERS[name](request)
    counts: Counter[str] = Counter()
    machine = type("Promise", (Promise,), {"server": server, "counts": counts})
    options = settings(
        max_examples=runs,
        stateful_step_count=STEPS_PER_RUN,
        deadline=None,
        database=None,
        # What goes wrong in one run seldom does in the next: to try for a shorter one takes minutes, and finds nothing.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    started = time.monotonic()
    with override_settings(TORNJANGO={"COMET": {"MESSAGES_PER_ANSWER": 5}}):
        run_state_machine_as_test(machine, settings=options)
    if server is not None:
        server.close()
    if STEPS:
        print(f"\n{name}: {time.monotonic() - started:.0f} s,", dict(counts))
