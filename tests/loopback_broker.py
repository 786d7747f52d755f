"""A broker without a server: hubs that share one `LoopbackServer` are to each other as processes are."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence

from tornjango.comet.brokers.base import Broker, Draft, Sink
from tornjango.comet.log import EPOCH_BYTES, Backlog, Channel, Message, Position
from tornjango.exceptions import BrokerUnavailable


class LoopbackServer:
    """The log that its brokers share, and what may happen to it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.changed = threading.Condition()
        self.clock = clock
        self.end = Position(secrets.token_bytes(EPOCH_BYTES), 0)
        self.messages: list[Message] = []
        #: Up to which number everything is forgotten.
        self.floor = 0
        self.batches: dict[bytes, Position] = {}
        self.away = False

    def go_away(self) -> None:
        """From now on it cannot be reached."""
        self._happen(away=True)

    def come_back(self) -> None:
        self._happen(away=False)

    def lose_everything(self) -> None:
        """As a server that comes back without its data: another epoch."""
        end = Position(secrets.token_bytes(EPOCH_BYTES), 0)
        self._happen(end=end, messages=[], floor=0, batches={})

    def forget(self) -> None:
        """What was published is not to be had any more; a tail that has not come so far begins anew."""
        self._happen(messages=[], floor=self.end.offset)

    def _happen(self, **changes: object) -> None:
        with self.changed:
            for name, value in changes.items():
                setattr(self, name, value)
            self.changed.notify_all()


class LoopbackBroker(Broker):
    """One process's way to a `LoopbackServer`; ``cut`` it, and for this process alone the server is away."""

    name = "loopback"

    def __init__(self, server: LoopbackServer) -> None:
        self.server = server
        self._cut = False

    def cut(self) -> None:
        """As if the process had been killed: nothing that it says is heard any more."""
        with self.server.changed:
            self._cut = True
            self.server.changed.notify_all()

    def mend(self) -> None:
        with self.server.changed:
            self._cut = False

    def append(self, batch: bytes, drafts: Sequence[Draft], known: Position | None) -> Position:
        server = self.server
        with server.changed:
            self._reach()
            if batch in server.batches:
                return server.batches[batch]
            self._expect(known)
            epoch, offset = server.end
            now = server.clock()
            for offset, draft in enumerate(drafts, offset + 1):  # noqa: B020
                name = draft.channel.name
                server.messages.append(Message(name, offset, now, draft.body, draft.audience))
            server.end = server.batches[batch] = Position(epoch, offset)
            server.changed.notify_all()
            return server.end

    def tail(self, sink: Sink) -> None:
        self._reach()
        sink.connected()
        while not sink.stopped:
            end = sink.end
            with self.server.changed:
                self._reach()
                self._expect(end)
                present = self.server.end
                news = [] if end is None else self._after(end.offset)
                if end == present:
                    self.server.changed.wait(0.05)
                    continue
            # The sink has locks of its own.
            if end is None or end.epoch != present.epoch or len(news) < present.offset - end.offset:
                sink.begin(present)
            else:
                sink.deliver(news)

    def backlog(self, channel: Channel) -> Backlog:
        limits = channel.limits
        with self.server.changed:
            self._reach()
            floor, size = self.server.floor, 0
            kept: list[Message] = []
            for message in reversed(self._after(floor)):
                if message.channel != channel.name:
                    continue
                size += len(message.body)
                age = self.server.clock() - message.published
                if len(kept) == limits.history or size > limits.max_bytes or age >= limits.ttl:
                    floor = message.offset
                    break
                kept.append(message)
        return Backlog(kept[::-1], floor)

    def head(self) -> Position:
        with self.server.changed:
            self._reach()
            return self.server.end

    def status(self) -> dict[str, int | float | str]:
        return {}

    def close(self) -> None:
        pass

    def _reach(self) -> None:
        if self.server.away or self._cut:
            raise BrokerUnavailable("The loopback server is away.")

    def _expect(self, known: Position | None) -> None:
        """A log that ends before what a process has seen has lost its end."""
        end = self.server.end
        if known is not None and known.epoch == end.epoch and known.offset > end.offset:
            self.server.end = Position(secrets.token_bytes(EPOCH_BYTES), end.offset)

    def _after(self, offset: int) -> list[Message]:
        # Numbers have no holes, so the place of one tells that of another.
        first = self.server.messages[0].offset if self.server.messages else 0
        return self.server.messages[max(offset + 1 - first, 0) :]
