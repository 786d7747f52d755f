"""Brokers to test, with the servers behind them, and what follows a broker as a process would."""

from __future__ import annotations

import json
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from tornjango.comet.brokers.base import Broker, Draft
from tornjango.comet.log import Audience, Channel, Limits, Message, Position
from tornjango.exceptions import BrokerUnavailable

ROOM = Channel("room:1", Limits(history=10_000, ttl=600, max_bytes=10**8))

#: Seconds in which what has to happen has happened, on a busy machine.
PATIENCE = 20.0


class Server(ABC):
    """A broker's server, which tests may treat as they like; the log is empty when it is made."""

    def __init__(self) -> None:
        self._brokers: list[Broker] = []

    @abstractmethod
    def make(self) -> Broker: ...

    @abstractmethod
    def end_connections(self) -> None:
        """Ends those that there are; new ones are welcome."""

    @abstractmethod
    def stop(self) -> None: ...

    @abstractmethod
    def start(self) -> None:
        """Returns when it can be reached again, with all that it had."""

    @abstractmethod
    def freeze(self) -> None:
        """It answers nothing any more, and connections to it stay open."""

    @abstractmethod
    def thaw(self) -> None: ...

    @abstractmethod
    def lose(self, count: int) -> None:
        """The newest messages are lost, as when a backup is restored."""

    @abstractmethod
    def empty(self) -> None:
        """All of the log is lost."""

    @abstractmethod
    def forget(self) -> None:
        """What channels have beyond their history is removed for good, now and not only in a while."""

    def broker(self) -> Broker:
        """Another process's."""
        self._brokers.append(self.make())
        return self._brokers[-1]

    def close(self) -> None:
        for broker in self._brokers:
            broker.close()


def body(channel: str, data: object) -> bytes:
    message = {"channel": channel, "event": None, "data": data}
    return json.dumps(message, ensure_ascii=False).encode()


def draft(data: object, channel: Channel = ROOM, audience: Audience | None = None) -> Draft:
    return Draft(channel, body(channel.name, data), audience)


def append(broker: Broker, *drafts: Draft, known: Position | None = None) -> Position:
    return broker.append(secrets.token_bytes(16), drafts, known)


def insist(broker: Broker, *drafts: Draft, known: Position | None = None) -> Position:
    """As the outbox: again, until the broker has them."""
    batch = secrets.token_bytes(16)
    return persevere(lambda: broker.append(batch, drafts, known))


def persevere(call: Callable[[], Position]) -> Position:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return call()
        except BrokerUnavailable:
            if time.monotonic() > deadline:
                raise


def eventually(condition: Callable[[], object]) -> None:
    """Returns when something holds of which nothing tells."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


class Follower:
    """A process that follows a broker: a sink, and the thread that fills it, again and again, as a `Hub` does."""

    def __init__(self, broker: Broker, end: Position | None = None) -> None:
        self.broker = broker
        self.messages: list[Message] = []
        self.begins: list[Position] = []
        #: How often it was connected, and what its tail raised.
        self.connections = 0
        self.errors: list[BrokerUnavailable] = []
        self.stopped = False
        self._end = end
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        self.until(lambda: self.connections > 0 or self.errors)

    def _follow(self) -> None:
        while not self.stopped:
            try:
                self.broker.tail(self)
            except BrokerUnavailable as error:
                with self._changed:
                    self.errors.append(error)
                    self._changed.notify_all()

    # A Sink

    @property
    def end(self) -> Position | None:
        return self._end

    def begin(self, end: Position) -> None:
        with self._changed:
            self.begins.append(end)
            self._end = end
            self._changed.notify_all()

    def deliver(self, messages: Sequence[Message]) -> None:
        with self._changed:
            for message in messages:
                assert self._end is not None
                assert message.offset == self._end.offset + 1
                self._end = Position(self._end.epoch, message.offset)
            self.messages += messages
            self._changed.notify_all()

    def connected(self) -> None:
        with self._changed:
            self.connections += 1
            self._changed.notify_all()

    # For tests

    @property
    def data(self) -> list[object]:
        return [message.data for message in self.messages]

    def until(self, condition: Callable[[], object]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE), (self.data[-5:], self.errors)

    def until_data(self, *data: object) -> None:
        """Returns when the last messages are these."""
        wanted = list(data)
        self.until(lambda: self.data[-len(wanted) :] == wanted)

    def until_away(self) -> None:
        """Returns when the tail has found that the server is away."""
        self.until(lambda: self.errors)

    def stop(self) -> None:
        """Returns when the tail has."""
        self.stopped = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


def in_threads(*calls: Callable[[], object]) -> None:
    """All at once; returns when all have."""
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
