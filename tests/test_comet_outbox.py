from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial

import pytest

from tests.comet_processes import PATIENCE, FaultyBroker, draft, in_threads
from tests.loopback_broker import LoopbackServer
from tornjango.comet import outbox as outboxes
from tornjango.comet.brokers.base import Draft
from tornjango.comet.log import Position
from tornjango.comet.outbox import Outbox
from tornjango.exceptions import BrokerUnavailable, Overloaded

AWAY = BrokerUnavailable("away")


class Slow(FaultyBroker):
    """Takes nothing before it is let."""

    def __init__(self, server: LoopbackServer) -> None:
        super().__init__(server)
        self.let = threading.Event()
        self.sizes: list[int] = []

    def append(self, batch: bytes, drafts: Sequence[Draft], known: Position | None) -> Position:
        self.sizes.append(len(drafts))
        self.appended.release()
        assert self.let.wait(PATIENCE)
        return super().append(batch, drafts, known)


class Reports:
    def __init__(self) -> None:
        self.errors: list[BrokerUnavailable | None] = []

    def __call__(self, error: BrokerUnavailable | None) -> None:
        self.errors.append(error)


@pytest.fixture
def server() -> LoopbackServer:
    return LoopbackServer()


@pytest.fixture
def broker(server: LoopbackServer) -> FaultyBroker:
    return FaultyBroker(server)


@pytest.fixture
def slow(server: LoopbackServer) -> Iterator[Slow]:
    slow = Slow(server)
    yield slow
    slow.let.set()


@pytest.fixture
def reports() -> Reports:
    return Reports()


def make(broker: FaultyBroker, reports: Reports | None = None, *, most: int = 1000) -> Outbox:
    return Outbox(broker, most=most, known=lambda: None, report=reports or Reports())


def room(*values: object) -> list[Draft]:
    return [draft("open:room", value) for value in values]


def stored(server: LoopbackServer) -> list[object]:
    return [message.data for message in server.messages]


def offset(sent: Future[Position]) -> int:
    return sent.result(PATIENCE).offset


def put_behind(slow: Slow, outbox: Outbox, *values: object) -> Future[Position]:
    """Put, and being given to the broker: what is put next waits behind it."""
    sent = outbox.put(room(*values), PATIENCE)
    assert slow.appended.acquire(timeout=PATIENCE)
    return sent


def test_each_has_the_position_of_its_own_last_message(slow: Slow, server: LoopbackServer) -> None:
    outbox = make(slow)
    first = put_behind(slow, outbox, 1)
    rest = [outbox.put(room(*values), PATIENCE) for values in [(2, 3), (4,), (5, 6, 7)]]
    assert outbox.waiting == 7
    slow.let.set()
    assert [offset(sent) for sent in (first, *rest)] == [1, 3, 4, 7]
    assert slow.sizes == [1, 6]
    assert stored(server) == [1, 2, 3, 4, 5, 6, 7]
    assert outbox.stored == server.end
    assert outbox.close(PATIENCE) == 0


def test_what_waits_goes_in_batches_of_a_bounded_size(
    slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outboxes, "BATCH_MESSAGES", 3)
    monkeypatch.setattr(outboxes, "BATCH_BYTES", 1000)
    outbox = make(slow)
    put_behind(slow, outbox, 0)
    for values in [(1, 2), (3,), (4,), ("x" * 800,), ("y" * 2000,), (5, 6, 7, 8)]:
        outbox.put(room(*values), PATIENCE)
    slow.let.set()
    assert outbox.close(PATIENCE) == 0
    assert slow.sizes == [1, 3, 2, 1, 4]


def test_failed_batch_is_sent_again_under_its_number_until_it_is_stored(
    broker: FaultyBroker, server: LoopbackServer, reports: Reports
) -> None:
    broker.errors["append"] = [AWAY, AWAY]
    sent = make(broker, reports).put(room(1), PATIENCE)
    assert offset(sent) == 1
    assert len(broker.batches) == 3
    assert len(set(broker.batches)) == 1
    assert stored(server) == [1]
    assert reports.errors == [AWAY, AWAY, None]


def test_threads_that_publish_at_once_keep_each_their_order(
    broker: FaultyBroker, server: LoopbackServer
) -> None:
    outbox = make(broker, most=10_000)

    def run(name: int) -> None:
        last = [outbox.put(room([name, n]), PATIENCE) for n in range(300)][-1]
        last.result(PATIENCE)

    in_threads(*(partial(run, name) for name in range(3)))
    for name in range(3):
        mine = [data for data in stored(server) if isinstance(data, list) and data[0] == name]
        assert mine == [[name, n] for n in range(300)]
    assert len(broker.batches) < 900


def test_message_that_waited_for_as_long_as_was_said_fails(
    broker: FaultyBroker, server: LoopbackServer
) -> None:
    server.go_away()
    outbox = make(broker)
    sent = outbox.put(room(1), 0)
    with pytest.raises(BrokerUnavailable, match="loopback server is away"):
        sent.result(PATIENCE)
    server.come_back()
    assert offset(outbox.put(room(2), PATIENCE)) == 1
    assert outbox.waiting == 0


def test_messages_in_the_queue_expire_too_and_the_others_go_on_waiting(
    slow: Slow, server: LoopbackServer
) -> None:
    slow.errors["append"] = [AWAY]
    outbox = make(slow)
    first = put_behind(slow, outbox, 1)
    impatient = [outbox.put(room(n), 0) for n in (2, 3)]
    patient = outbox.put(room(4), PATIENCE)
    slow.let.set()
    for sent in impatient:
        with pytest.raises(BrokerUnavailable):
            sent.result(PATIENCE)
    assert (offset(first), offset(patient)) == (1, 2)
    assert stored(server) == [1, 4]
    assert outbox.close(PATIENCE) == 0


def test_more_than_may_wait_are_refused_but_one_call_may_have_many(slow: Slow) -> None:
    outbox = make(slow, most=3)
    put_behind(slow, outbox, 1, 2, 3, 4, 5)
    with pytest.raises(Overloaded, match=r"5 messages wait .* PUBLISH_QUEUE|PUBLISH_QUEUE"):
        outbox.put(room(6), PATIENCE)
    slow.let.set()
    assert outbox.close(PATIENCE) == 0


def test_what_the_broker_cannot_store_fails_for_its_publisher_alone(
    slow: Slow, server: LoopbackServer
) -> None:
    class Refusing(Slow):
        def append(self, batch: bytes, drafts: Sequence[Draft], known: Position | None) -> Position:
            if any(b"poison" in draft.body for draft in drafts):
                raise ValueError("no")
            return super().append(batch, drafts, known)

    refusing = Refusing(server)
    outbox = make(refusing)
    first = put_behind(refusing, outbox, 1)
    good, bad, better = (outbox.put(room(value), PATIENCE) for value in (2, "poison", 3))
    refusing.let.set()
    with pytest.raises(ValueError, match="no"):
        bad.result(PATIENCE)
    assert [offset(sent) for sent in (first, good, better)] == [1, 2, 3]
    assert outbox.close(PATIENCE) == 0


def test_batch_that_was_stored_before_the_broker_failed_is_not_stored_again(
    server: LoopbackServer,
) -> None:
    class Stumbling(FaultyBroker):
        def append(self, batch: bytes, drafts: Sequence[Draft], known: Position | None) -> Position:
            super().append(batch, drafts, known)
            if len(self.batches) == 1:
                raise ZeroDivisionError
            return self.server.batches[batch]

    assert offset(make(Stumbling(server)).put(room(1, 2), PATIENCE)) == 2
    assert stored(server) == [1, 2]


def test_publishing_cannot_be_cancelled(slow: Slow, server: LoopbackServer) -> None:
    outbox = make(slow)
    sent = put_behind(slow, outbox, 1)
    assert not sent.cancel()
    slow.let.set()
    assert offset(sent) == 1


def test_closing_publishes_what_waits_and_takes_no_more(
    broker: FaultyBroker, server: LoopbackServer
) -> None:
    outbox = make(broker)
    sent = [outbox.put(room(n), PATIENCE) for n in range(5)]
    assert outbox.close(PATIENCE) == 0
    assert [offset(one) for one in sent] == [1, 2, 3, 4, 5]
    with pytest.raises(BrokerUnavailable, match="stopped"):
        outbox.put(room(6), PATIENCE)
    assert outbox.close(PATIENCE) == 0


def test_closing_leaves_nobody_waiting_and_the_broker_in_peace(
    broker: FaultyBroker, server: LoopbackServer
) -> None:
    server.go_away()
    outbox = make(broker)
    sent = [outbox.put(room(n), PATIENCE) for n in range(3)]
    assert broker.appended.acquire(timeout=PATIENCE)
    assert outbox.close(0) == 3
    for one in sent:
        with pytest.raises(BrokerUnavailable):
            one.result(PATIENCE)
    assert outbox.close(PATIENCE) == 0
    calls = len(broker.batches)
    server.come_back()
    assert stored(server) == []
    assert len(broker.batches) == calls
