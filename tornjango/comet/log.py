"""What the channels of one process remember, and what a reader that comes back is told.

Pure: no clock, no thread, no event loop; the caller says what time it is and keeps others out.

1. Every message takes the next number of one sequence, whatever its channel. A position is the number of the last message
   a reader has seen or could have seen, so the same number fits any channel, with a log or without.
2. A channel knows the highest number it has forgotten, its floor. At or above the floor a reader gets everything that came
   since; below it, it is told of a gap. Channels without a log share the floor of their dropped siblings.
3. Numbers are never used twice under one epoch, and an epoch dies with its process. So a position from before a restart, or
   from before a log was dropped and made anew, can never be mistaken for a newer one.
"""

from __future__ import annotations

import heapq
import json
import secrets
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

EPOCH_BYTES = 8

# A publish adds one log at most, so dropping a few at each keeps up, and none takes long.
_DROPS_PER_APPEND = 8


class Limits(NamedTuple):
    """The bounds of one channel's log: messages, seconds, bytes."""

    history: int
    ttl: float
    max_bytes: int


class Channel(NamedTuple):
    """A channel by its full name (``entry:7``), with the bounds its declaration gives it."""

    name: str
    limits: Limits


class Position(NamedTuple):
    """A place in a channel: the offset of the last message behind it. Offsets grow; they need not be consecutive."""

    epoch: bytes
    offset: int


@dataclass(frozen=True, slots=True)
class Message:
    """One published message. ``body`` is the JSON object ``{"channel", "event", "data"}`` that clients are sent."""

    channel: str
    offset: int
    published: float
    body: bytes

    @property
    def data(self) -> Any:
        """What was published, as JSON gives it back; parsed at every call."""
        return json.loads(self.body)["data"]

    @property
    def event(self) -> str | None:
        return json.loads(self.body)["event"]  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Reading:
    """What one read found: messages in order, and where each channel's reader now stands."""

    messages: list[Message]
    positions: dict[str, Position]
    gaps: list[str]
    more: bool

    @property
    def has_news(self) -> bool:
        return bool(self.messages or self.gaps)


class Log:
    """The messages that one channel still has."""

    __slots__ = ("_messages", "floor", "last", "size", "touched")

    def __init__(self, floor: int) -> None:
        self._messages: deque[Message] = deque()
        self.floor = floor
        self.last = floor
        self.size = 0
        self.touched = 0.0

    def __len__(self) -> int:
        return len(self._messages)

    def append(self, message: Message) -> None:
        self._messages.append(message)
        self.last = message.offset
        self.size += len(message.body)
        self.touched = message.published

    def trim(self, limits: Limits, now: float) -> None:
        """Forgets the oldest messages until what is left is within the limits."""
        while self._messages and self._exceeds(limits, now):
            message = self._messages.popleft()
            self.floor = message.offset
            self.size -= len(message.body)

    def _exceeds(self, limits: Limits, now: float) -> bool:
        return (
            len(self._messages) > limits.history
            or self.size > limits.max_bytes
            or now - self._messages[0].published >= limits.ttl
        )

    def since(self, offset: int) -> list[Message] | None:
        """The messages after ``offset``, oldest first; None where some of them are forgotten."""
        if offset < self.floor:
            return None
        # From the end, where readers are: most have seen all but the last few.
        news: list[Message] = []
        for message in reversed(self._messages):
            if message.offset <= offset:
                break
            news.append(message)
        news.reverse()
        return news


class _Family:
    """The logs of all channels with the same limits, the one with the oldest last message first."""

    __slots__ = ("floor", "limits", "logs")

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.logs: OrderedDict[str, Log] = OrderedDict()
        self.floor = 0

    @property
    def oldest(self) -> float:
        return next(iter(self.logs.values())).touched

    def append(self, message: Message) -> None:
        log = self.logs.get(message.channel)
        if log is None:
            log = self.logs[message.channel] = Log(self.floor)
        log.append(message)
        log.trim(self.limits, message.published)
        self.logs.move_to_end(message.channel)

    def since(self, name: str, offset: int, now: float) -> list[Message] | None:
        log = self.logs.get(name)
        if log is None:
            return [] if offset >= self.floor else None
        log.trim(self.limits, now)
        return log.since(offset)

    def drop_oldest(self) -> None:
        _, log = self.logs.popitem(last=False)
        self.floor = max(self.floor, log.last)

    def drop_expired(self, now: float) -> None:
        for _ in range(_DROPS_PER_APPEND):
            if not self.logs or now - self.oldest < self.limits.ttl:
                return
            self.drop_oldest()


class Logs:
    """All channels' logs, at most ``max_channels`` of them; beyond that the longest untouched is dropped.

    Only appending makes a log: a reader costs nothing here, whatever channels it names.
    """

    def __init__(self, *, max_channels: int) -> None:
        self.epoch = secrets.token_bytes(EPOCH_BYTES)
        self.sequence = 0
        self._max_channels = max_channels
        self._families: dict[Limits, _Family] = {}

    @property
    def end(self) -> Position:
        """The position of a reader that has seen everything up to now, in any channel."""
        return Position(self.epoch, self.sequence)

    def append(self, channel: Channel, body: bytes, *, now: float) -> Position:
        self.sequence += 1
        family = self._families.get(channel.limits)
        if family is None:
            family = self._families[channel.limits] = _Family(channel.limits)
        family.append(Message(channel.name, self.sequence, now, body))
        self._drop(now)
        return self.end

    def _drop(self, now: float) -> None:
        for family in self._families.values():
            family.drop_expired(now)
        while self._count_logs() > self._max_channels:
            filled = (family for family in self._families.values() if family.logs)
            min(filled, key=attrgetter("oldest")).drop_oldest()

    def _count_logs(self) -> int:
        return sum(len(family.logs) for family in self._families.values())

    def read(
        self, since: Mapping[Channel, Position], *, now: float, count: int, size: int
    ) -> Reading:
        """Everything after the given positions, in the order of publishing across all the channels.

        At most ``count`` messages and ``size`` bytes, but always one if there is one; ``more`` says that some are left.
        A channel in ``gaps`` has lost messages that its reader has not seen: what it still has is not repeated, and
        its reader stands at the present end, because it has to fetch the state afresh anyway.
        """
        found = {channel: self._since(channel, since[channel], now) for channel in since}
        news = [messages for messages in found.values() if messages]
        taken = _take(heapq.merge(*news, key=attrgetter("offset")), count, size)
        more = len(taken) < sum(map(len, news))
        # All messages up to the last one taken are taken, in every channel: their order is one.
        reached = taken[-1].offset if more else self.sequence
        positions = {
            channel.name: self.end
            if found[channel] is None
            else Position(self.epoch, max(position.offset, reached))
            for channel, position in since.items()
        }
        gaps = [channel.name for channel, messages in found.items() if messages is None]
        return Reading(taken, positions, gaps, more)

    def _since(self, channel: Channel, position: Position, now: float) -> list[Message] | None:
        if position.epoch != self.epoch or position.offset > self.sequence:
            return None
        family = self._families.get(channel.limits)
        return [] if family is None else family.since(channel.name, position.offset, now)

    def status(self) -> dict[str, int]:
        logs = [log for family in self._families.values() for log in family.logs.values()]
        return {
            "channels": len(logs),
            "messages": sum(map(len, logs)),
            "bytes": sum(log.size for log in logs),
            "published": self.sequence,
        }


def _take(messages: Iterable[Message], count: int, size: int) -> list[Message]:
    taken: list[Message] = []
    for message in messages:
        size -= len(message.body)
        if taken and (size < 0 or len(taken) == count):
            break
        taken.append(message)
    return taken
