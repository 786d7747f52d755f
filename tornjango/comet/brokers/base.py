from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

from tornjango.comet.log import Audience, Backlog, Channel, Message, Position


class Draft(NamedTuple):
    """A message that has no number yet; ``body`` as in `Message`."""

    channel: Channel
    body: bytes
    audience: Audience | None = None


class Appender(Protocol):
    """What an outbox needs of a broker."""

    @property
    def name(self) -> str: ...

    def append(self, batch: bytes, drafts: Sequence[Draft], known: Position | None) -> Position:
        """As `Broker.append`."""


class Sink(Protocol):
    """What a broker's tail fills: this process's logs."""

    @property
    def end(self) -> Position | None:
        """The last message that has come; None before the first `begin`."""

    def begin(self, end: Position) -> None:
        """The tail goes on after ``end``, the log's present end, for one of these reasons:

        it is the first time; the log has another epoch now; or what came after the sink's own end is not to be had in
        one piece any more, so that readers have to ask for the rest channel by channel.
        """

    def deliver(self, messages: Sequence[Message]) -> None:
        """The next messages, without a hole: each has the number after the one before."""

    def connected(self) -> None:
        """The tail follows the log: whatever is published from now on comes. Called after each connecting."""

    @property
    def stopped(self) -> bool:
        """Whether the tail is to return, as soon as it can, a second at the latest."""


class Broker(ABC):
    """Keeps the channels' messages for all processes, and numbers them. Its methods block, each in a thread of its own.

    What every broker promises:

    - There is one log for all channels. Each message has the number after the one before, and becomes readable after it.
      A channel's order is the order of the numbers; of messages in one `append`, the order in it.
    - An epoch (EPOCH_BYTES of them) goes with the numbers. When the log is lost, or has lost its end (a restored backup, a
      replica that was behind), there is a new epoch: no position ever means two things.
    - `append` with the same ``batch`` again stores nothing again, whatever became of the first time.
    - Reading removes nothing, and readers leave no trace.
    - Each method connects where it has no connection, and raises BrokerUnavailable, naming the server and what the driver
      said, when it cannot, or when the connection is lost or deaf for more than TIMEOUT. The caller calls again.
    """

    #: Seconds in which a server that works has answered.
    TIMEOUT: ClassVar[float] = 5.0

    name: ClassVar[str]

    @abstractmethod
    def append(self, batch: bytes, drafts: Sequence[Draft], known: Position | None) -> Position:
        """Stores all of the drafts, or none; the position of the last. ``batch`` is 16 random bytes, kept for a minute at least.

        ``known`` is the newest position that this process has seen: a log of that epoch which ends before it has lost
        its end, and gets a new epoch first. One thread calls this, and no other.
        """

    @abstractmethod
    def tail(self, sink: Sink) -> None:
        """Delivers to ``sink`` until it is stopped: what was published since its end, then what is being published.

        In a thread of its own. A message is delivered a few milliseconds after `append` has returned, in any process.
        """

    @abstractmethod
    def backlog(self, channel: Channel) -> Backlog:
        """All that the channel has, within its limits, by the broker's clock.

        Messages older than a day may be forgotten without regard to the limits. May be called by several threads at once.
        """

    @abstractmethod
    def head(self) -> Position:
        """The log's present end; for processes that do not follow it. May be called by several threads at once."""

    @abstractmethod
    def status(self) -> dict[str, int | float | str]:
        """What the status page tells about the server, from memory: nothing is asked."""

    @abstractmethod
    def close(self) -> None:
        """Closes what is open; nothing is called afterwards. The tail has returned, or is about to."""
