"""What the channels of one process remember, and what a reader that comes back is told.

Pure: no clock, no thread, no event loop; the caller says what time it is and keeps others out.

1. The broker gives every message the next number of one sequence, whatever its channel, and every process has them in that
   order. A position is the number of the last message a reader has seen or could have seen, so the same number fits any
   channel, with a log or without, in any process.
2. A channel's log begins after its floor. At or above the floor a reader gets everything that came since; below it, it is
   told of a gap, if what is below is forgotten for good, or else has to wait for what the broker still has: see `fill`.
   Channels without a log share a floor: where this process began, or the highest number that a dropped log had.
3. Numbers are never used twice under one epoch. The memory's dies with its process, a broker's with its data. So a
   position from before a restart, or from before a log was dropped and made anew, is never mistaken for a newer one.
4. A position ahead of this process is one that another process gave: there is nothing new until this one has caught up.
"""

from __future__ import annotations

import heapq
import json
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, takewhile
from operator import attrgetter
from typing import Any, NamedTuple

EPOCH_BYTES = 8

# A publish adds one log at most, so dropping a few at each keeps up, and none takes long.
_DROPS_PER_APPEND = 8

# Seconds for which a log stays without a message, at least. Readers that are parked, or between two polls, stand where they
# stood before; with the log the process would forget that they have missed nothing.
_LEAST_IDLE = 60


class Limits(NamedTuple):
    """The bounds of one channel's log: messages, seconds, bytes.

    Of a ``latest`` channel only the newest message counts, of those for the same audience: whoever missed others has missed
    nothing.
    """

    history: int
    ttl: float
    max_bytes: int
    latest: bool = False


class Channel(NamedTuple):
    """A channel by its full name (``entry:7``), with the bounds its declaration gives it."""

    name: str
    limits: Limits


class Position(NamedTuple):
    """A place in a channel: the offset of the last message behind it. Offsets grow; they need not be consecutive."""

    epoch: bytes
    offset: int


class Audience(NamedTuple):
    """Who gets a message, of those who follow its channel: any of these users, by primary key, and members of these groups."""

    users: frozenset[str]
    groups: frozenset[str]


@dataclass(frozen=True, slots=True)
class Message:
    """One published message. ``body`` is the JSON object ``{"channel", "event", "data"}`` that clients are sent.

    ``published`` is in seconds of this process's monotonic clock, whoever published it.
    """

    channel: str
    offset: int
    published: float
    body: bytes
    audience: Audience | None = None

    @property
    def data(self) -> Any:
        """What was published, as JSON gives it back; parsed at every call."""
        return json.loads(self.body)["data"]

    @property
    def event(self) -> str | None:
        return json.loads(self.body)["event"]  # type: ignore[no-any-return]


class Backlog(NamedTuple):
    """What a broker still has of one channel: every message after ``floor``, oldest first. Those up to it are forgotten.

    ``epoch`` is that of the numbers; None where the broker cannot tell.
    """

    messages: list[Message]
    floor: int
    epoch: bytes | None = None


class Snapshot(NamedTuple):
    """All that `Logs` hold, for another process: the channels by name, each with its floor and its messages, oldest first.

    ``floor`` is that of channels without a log.
    """

    end: Position
    floor: int
    channels: list[tuple[str, int, list[Message]]]


@dataclass(frozen=True, slots=True)
class Reading:
    """What one read found: messages in order, and where each channel's reader now stands.

    Of the channels in ``missing`` nothing is known here yet: they stand where they stood, until `Logs.fill`.
    """

    messages: list[Message]
    positions: dict[str, Position]
    gaps: list[str]
    more: bool
    missing: list[str] = field(default_factory=list)

    @property
    def has_news(self) -> bool:
        return bool(self.messages or self.gaps)


class Log:
    """The messages that one channel has here: all that came after ``floor``.

    ``ends`` is whether those up to the floor are forgotten for good, and not just unknown to this process.
    """

    __slots__ = ("_messages", "ends", "floor", "last", "size", "touched")

    def __init__(self, floor: int, ends: bool) -> None:
        self._messages: deque[Message] = deque()
        self.floor = floor
        self.ends = ends
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

    def fill(self, backlog: Backlog) -> None:
        """Puts what the broker has before what is here: what it has not is forgotten."""
        for message in reversed(backlog.messages):
            if message.offset <= self.floor:
                self._messages.appendleft(message)
                self.size += len(message.body)
        self.floor = min(self.floor, backlog.floor)
        self.ends = True

    def trim(self, limits: Limits, now: float) -> None:
        """Forgets the oldest messages until what is left is within the limits."""
        while self._messages and self._exceeds(limits, now):
            message = self._messages.popleft()
            self.floor = message.offset
            self.ends = True
            self.size -= len(message.body)

    def _exceeds(self, limits: Limits, now: float) -> bool:
        return (
            len(self._messages) > limits.history
            or self.size > limits.max_bytes
            or now - self._messages[0].published >= limits.ttl
        )

    def messages(self) -> list[Message]:
        return list(self._messages)

    def count_since(self, when: float) -> int:
        """How many of its messages were published after that."""
        return sum(1 for _ in takewhile(lambda it: it.published > when, reversed(self._messages)))

    def since(self, offset: int) -> list[Message]:
        """The messages after ``offset``, oldest first."""
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

    def __init__(self, limits: Limits, floor: int) -> None:
        self.limits = limits
        self.logs: OrderedDict[str, Log] = OrderedDict()
        self.floor = floor

    @property
    def oldest(self) -> float:
        return next(iter(self.logs.values())).touched

    def drop_oldest(self) -> Log:
        _, log = self.logs.popitem(last=False)
        self.floor = max(self.floor, log.last)
        return log


#: Of a channel's position: a part of its messages is forgotten; or they are not known here, and a broker may have them.
_GAP, _MISSING = "gap", "missing"


class Logs:
    """All channels' logs, at most ``max_channels`` of them and ``max_bytes``; beyond that the longest untouched is dropped.

    Only messages make a log: a reader costs nothing here, whatever channels it names. With a ``broker`` that keeps messages
    itself, what is not here may be there, and this process need not have them all.
    """

    def __init__(self, *, max_channels: int, max_bytes: int, broker: bool = False) -> None:
        self._max_channels = max_channels
        self._max_bytes = max_bytes
        self._broker = broker
        self._families: dict[Limits, _Family] = {}
        self.epoch = b""
        self.sequence = 0
        #: Where this process began: whatever was published after it has been here.
        self.start = 0
        self._count = 0
        self._bytes = 0
        self.published = 0

    def restart(self, end: Position) -> None:
        """Forgets everything, and begins at a broker's present end."""
        self.epoch, self.sequence = end
        self.start = self.sequence
        self._families = {}
        self._count = self._bytes = 0

    def newest(self, most: int) -> list[tuple[str, Log]]:
        """The logs with the newest messages, by their channels' names."""
        found = chain.from_iterable(
            islice(reversed(family.logs.items()), most) for family in self._families.values()
        )
        return heapq.nlargest(most, found, key=lambda named: named[1].touched)

    def snapshot(self) -> Snapshot:
        floor = max((family.floor for family in self._families.values()), default=self.start)
        logs = [it for family in self._families.values() for it in family.logs.items()]
        logs.sort(key=lambda named: named[1].touched)
        return Snapshot(self.end, floor, [(name, log.floor, log.messages()) for name, log in logs])

    def restore(self, snapshot: Snapshot, limits: Callable[[str], Limits]) -> None:
        """Goes on with another process's logs, which had all there is, under the bounds that channels have here."""
        self.restart(snapshot.end)
        self.start = snapshot.floor
        for name, floor, messages in snapshot.channels:
            log = self._make(self._family(limits(name)), name, floor)
            log.ends = True
            for message in messages:
                log.append(message)
            self._bytes += log.size

    @property
    def end(self) -> Position:
        """The position of a reader that has seen everything up to now, in any channel."""
        return Position(self.epoch, self.sequence)

    def append(self, limits: Limits, message: Message) -> None:
        """Messages come in the order of their numbers; Raises ValueError for one that is not the next."""
        if message.offset != self.sequence + 1:
            raise ValueError(f"Message {message.offset} came after {self.sequence}.")
        self.sequence = message.offset
        self.published += 1
        family = self._family(limits)
        log = family.logs.get(message.channel)
        if log is None:
            log = self._make(family, message.channel, family.floor)
        before = log.size
        log.append(message)
        log.trim(limits, message.published)
        self._bytes += log.size - before
        family.logs.move_to_end(message.channel)
        self._drop(message.published)

    def fill(self, channel: Channel, backlog: Backlog, asked: Position, now: float) -> None:
        """Takes what a broker has of a channel that was missing; newer messages are here, or will come.

        The broker was asked when the end was ``asked``. What has been forgotten here since then is in neither: in that case
        nothing is taken, and the channel is still missing.
        """
        family = self._family(channel.limits)
        log = family.logs.get(channel.name)
        known = family.floor if log is None else log.floor
        epoch = asked.epoch if backlog.epoch is None else backlog.epoch
        if known > asked.offset or {asked.epoch, epoch} != {self.epoch}:
            return
        if log is None:
            log = self._make(family, channel.name, known)
        before = log.size
        log.fill(backlog)
        log.trim(channel.limits, now)
        log.touched = max(log.touched, now)
        family.logs.move_to_end(channel.name)
        self._bytes += log.size - before
        self._drop(now)

    def _family(self, limits: Limits) -> _Family:
        family = self._families.get(limits)
        if family is None:
            family = self._families[limits] = _Family(limits, self.start)
        return family

    def _make(self, family: _Family, name: str, floor: int) -> Log:
        self._count += 1
        log = family.logs[name] = Log(floor, ends=not self._broker)
        return log

    def _drop(self, now: float) -> None:
        for family in self._families.values():
            for _ in range(_DROPS_PER_APPEND):
                if not family.logs or now - family.oldest < max(family.limits.ttl, _LEAST_IDLE):
                    break
                self._drop_oldest(family)
        # Never the last one, which is within its channel's limits: its readers would fetch it again and again.
        while self._count > 1 and (
            self._count > self._max_channels or self._bytes > self._max_bytes
        ):
            filled = (family for family in self._families.values() if family.logs)
            self._drop_oldest(min(filled, key=attrgetter("oldest")))

    def _drop_oldest(self, family: _Family) -> None:
        self._bytes -= family.drop_oldest().size
        self._count -= 1

    def read(
        self, since: Mapping[Channel, Position], *, now: float, count: int, size: int
    ) -> Reading:
        """Everything after the given positions, in the order of publishing across all the channels.

        At most ``count`` messages and ``size`` bytes, but always one if there is one; ``more`` says that some are left.
        A channel in ``gaps`` has lost messages that its reader has not seen: what it still has is not repeated, and
        its reader stands at the present end, because it has to fetch the state afresh anyway.
        """
        found = {channel: self._since(channel, since[channel], now) for channel in since}
        news = [messages for messages in found.values() if messages and isinstance(messages, list)]
        taken = _take(heapq.merge(*news, key=attrgetter("offset")), count, size)
        more = len(taken) < sum(map(len, news))
        # All messages up to the last one taken are taken, in every channel: their order is one.
        reached = taken[-1].offset if more else self.sequence
        positions: dict[str, Position] = {}
        gaps: list[str] = []
        missing: list[str] = []
        for channel, position in since.items():
            outcome = found[channel]
            if outcome is _MISSING:
                missing.append(channel.name)
                positions[channel.name] = position
            elif outcome is _GAP:
                gaps.append(channel.name)
                positions[channel.name] = self.end
            else:
                positions[channel.name] = Position(self.epoch, max(position.offset, reached))
        return Reading(taken, positions, gaps, more, missing)

    def _since(self, channel: Channel, position: Position, now: float) -> list[Message] | str:
        if position.epoch != self.epoch:
            return _GAP
        if position.offset >= self.sequence:
            return []
        family = self._families.get(channel.limits)
        log = family.logs.get(channel.name) if family is not None else None
        if log is None:
            floor = self.start if family is None else family.floor
            if position.offset >= floor:
                return []
            return _MISSING if self._broker else _GAP
        before = log.size
        log.trim(channel.limits, now)
        self._bytes += log.size - before
        news = log.since(position.offset)
        if channel.limits.latest:
            news = _latest(news)
        if position.offset >= log.floor or (channel.limits.latest and _is_for_all(news[:1])):
            return news
        return _GAP if log.ends else _MISSING

    def status(self) -> dict[str, int]:
        """Numbers for the status page; ``messages`` are counted one log after another."""
        logs = [log for family in self._families.values() for log in family.logs.values()]
        return {
            "channels": len(logs),
            "messages": sum(map(len, logs)),
            "bytes": self._bytes,
            "published": self.published,
        }


def _latest(messages: Sequence[Message]) -> list[Message]:
    """The newest message for all, and since then the newest for each audience."""
    newest: dict[Audience | None, Message] = {}
    for message in reversed(messages):
        newest.setdefault(message.audience, message)
        if message.audience is None:
            break
    return list(newest.values())[::-1]


def _is_for_all(messages: Sequence[Message]) -> bool:
    return any(message.audience is None for message in messages)


def _take(messages: Iterable[Message], count: int, size: int) -> list[Message]:
    taken: list[Message] = []
    for message in messages:
        size -= len(message.body)
        if taken and (size < 0 or len(taken) == count):
            break
        taken.append(message)
    return taken
