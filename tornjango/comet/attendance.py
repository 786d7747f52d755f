"""Who follows a channel: each process's own members, told to all the others, and to the pages that ask.

1. Every process keeps the whole roll, and nobody else does: there is no table. What changes in one goes to the others by an
   internal channel, collected, a few times a second; where nothing changes it only says now and then that it lives.
2. A process that begins, or has lost its place in the broker's log, asks the others for all they have. What it knew it keeps
   until they answer: nobody seems to leave because a broker has.
3. A process that is not heard any more is gone, and its members with it. One that stops says who was there: they stay until
   they had time to come to another process, or to the one that takes its place.
4. What a page is told is the whole state of a channel, by one process: of those that have members in it, the one that all of
   them take for it. They may differ for a moment, so whoever hears a state from another looks at it again later.

A member lingers when its last reader has ended: between two polls, on a page that is loaded again, in a tunnel.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

from tornjango.comet import channels
from tornjango.comet.brokers.base import Draft
from tornjango.comet.log import Channel, Limits, Message, Position
from tornjango.comet.roll import Entry, Member, Roll
from tornjango.conf import get_config
from tornjango.exceptions import BrokerUnavailable, Overloaded

logger = logging.getLogger("tornjango.comet")

#: Seconds between two announcements of a process, at least.
TICK = 0.2

#: Seconds after which a process says that it lives, and after which one that has not is gone.
HEARTBEAT = 10.0
GONE_AFTER = 3 * HEARTBEAT

#: Seconds after which what could not be sent is tried again: that is everything, and so no little work.
RETRY = 2.0

#: Seconds in which the others answer a process that asks. Until then it does not know enough to tell pages.
ANSWER_TIME = 1.0

#: Members that a channel's state names; it counts them all.
MEMBERS_SHOWN = 100

#: A state goes to everyone in the channel: in a large one less often, so that no more than so many are sent in a second.
DELIVERIES_PER_SECOND = 2000

#: States of channels that a process tells in one go; the others come with the next one.
STATES_PER_TICK = 50

#: Members of one process that may linger. Beyond that the first to go goes at once: clients make up names for nothing.
MAX_LINGERING = 50_000

#: Bytes in one announcement, about; it is split beyond. And characters of a name.
PIECE = 32 * 1024
NAME_LENGTH = 150

#: What processes tell each other: news, and their state where one asks. Nobody reads it later.
PRESENCE = Channel(f"{channels.INTERNAL}presence", Limits(history=1, ttl=60, max_bytes=1 << 20))

#: Who was in a process that has stopped. A process that starts then reads it.
FAREWELLS = Channel(
    f"{channels.INTERNAL}farewells", Limits(history=10_000, ttl=600, max_bytes=32 << 20)
)

_EVERYONE = ""

Seat = tuple[str, str]
"""A channel, and a member's id."""


def member_id(client: str | None) -> str:
    """What others may know a client by: its own name would let them speak for it. None is a client of its own each time."""
    if client is None:
        return secrets.token_hex(10)
    return hashlib.sha256(client.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def make_member(id: str, user: Any) -> Member:
    """``user`` is Django's, or None."""
    if user is None or not user.is_authenticated:
        return Member(id)
    pk = user.pk if isinstance(user.pk, int) else str(user.pk)
    name = str(user.get_username())[:NAME_LENGTH]
    return Member(id, pk, name.encode("utf-8", "replace").decode())


@dataclass(slots=True)
class _Peer:
    """Another process. ``whole`` is whether all it has is known here; ``until`` when its members go, once it has stopped."""

    heard: float
    whole: bool = False
    asked: bool = False
    until: float | None = None
    parts: int = 0
    coming: list[Entry] = field(default_factory=list)

    @property
    def lives(self) -> bool:
        return self.whole and self.until is None

    @property
    def end(self) -> float:
        """When it is gone, if nothing is heard of it."""
        return self.heard + GONE_AFTER if self.until is None else self.until


class Presence:
    """One for each process, in its hub. Its methods may be called in any thread; none of them waits.

    ``send`` is the hub's. A process that is ``alone``, as with the memory broker, tells pages only. While the broker
    ``is_lost`` nothing can be heard of the others, and that means nothing. ``clock`` is in seconds, and only goes on.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Draft], float], Future[Position]],
        *,
        alone: bool,
        is_lost: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.id = secrets.token_hex(8)
        self.timer = Timer(self.run)
        self._send = send
        self._alone = alone
        self._is_lost = is_lost
        self._clock = clock
        self._lock = threading.Lock()
        self._roll = Roll()
        self._peers: dict[str, _Peer] = {}
        self._closed = False
        # This process's own: readers, those that linger and until when, and what the others do not know of it.
        self._readers: dict[Seat, int] = {}
        self._lingering: dict[Seat, float] = {}
        self._news: dict[Seat, Member | None] = {}
        # What is to be said: to whom it asks, and whether all it has.
        self._asks: set[str] = set()
        self._tells = False
        self._sending = False
        self._spoke = self._ran = self._tidied = clock()
        #: Whether this process takes part: else it knows nothing of the others.
        self.takes_part = alone
        self._has_asked = alone
        self._answered = self._resting = 0.0
        # Of channels: what was told last, as a hash; until when nothing more is; whose last state another process told;
        # and in which nobody is any more, since when.
        self._told: dict[str, int] = {}
        self._quiet: dict[str, float] = {}
        self._doubts: set[str] = set()
        self._emptied: dict[str, float] = {}

    # This process's readers

    def appear(self, channel: str, member: Member) -> None:
        """One more reader of this member is there."""
        seat = channel, member.id
        with self._lock:
            self._readers[seat] = self._readers.get(seat, 0) + 1
            self._lingering.pop(seat, None)
            if not self._roll.join(self.id, channel, member):
                return
            self._news[seat] = member
        self.timer.wake()

    def vanish(self, channel: str, id: str, linger: float) -> None:
        """One reader less; after its last one the member is there for ``linger`` seconds, unless it comes back."""
        seat = channel, id
        with self._lock:
            self._readers[seat] -= 1
            if self._readers[seat]:
                return
            del self._readers[seat]
            self._lingering[seat] = self._clock() + linger
            if linger <= 0:
                self._depart(seat)
            elif len(self._lingering) > MAX_LINGERING:
                self._depart(next(iter(self._lingering)))
        self.timer.wake()

    def _depart(self, seat: Seat) -> None:
        del self._lingering[seat]
        if self._roll.leave(self.id, *seat):
            self._news[seat] = None

    def recall(self, id: str, names: Iterable[str]) -> Member | None:
        """Who it is, if this process knows the client by one of these channels."""
        with self._lock:
            mine = self._roll.processes.get(self.id, {})
            found = (mine.get(name, {}).get(id) for name in names)
            return next((member for member in found if member is not None), None)

    def members(self, channel: str) -> list[Member]:
        """Everyone who is there by any process, the longest present first, as far as this process has seen."""
        with self._lock:
            self._forget(self._clock())
            return self._roll.members(channel)

    # What is due

    def run(self) -> float | None:
        """Does what is due. Returns in how many seconds it is to be called again; None if nothing is to come."""
        with self._lock:
            if self._closed:
                return None
            now = self._clock()
            if now - self._ran > 2 * HEARTBEAT:
                self._spare(now)  # it was this process that slept
            self._ran = now
            self._forget(now)
            if now - self._tidied >= HEARTBEAT:
                self._tidy(now)
            drafts: list[Draft] = []
            if not self._sending and now >= self._resting:
                drafts += self._announcements(now)
                drafts += self._states(now)
                self._sending = bool(drafts)
        if drafts:
            self._put(drafts)
        with self._lock:
            return self._due(self._clock())

    def _forget(self, now: float) -> None:
        """Members that have lingered long enough, and processes that are gone."""
        for seat, _ in list(takewhile(lambda item: item[1] <= now, self._lingering.items())):
            self._depart(seat)
        for process, peer in list(self._peers.items()):
            if now >= peer.end and (peer.until is not None or not self._is_lost()):
                del self._peers[process]
                if process in self._roll.processes:
                    self._roll.remove(process)
                # It may have been the one to tell that nobody is there any more.
                self._roll.changed.update(self._emptied)

    def _tidy(self, now: float) -> None:
        self._tidied = now
        self._roll.changed |= self._doubts
        self._doubts.clear()
        self._quiet = {name: until for name, until in self._quiet.items() if until > now}
        for name, since in list(self._emptied.items()):
            if now - since > 2 * GONE_AFTER:
                del self._emptied[name]
                self._told.pop(name, None)

    def _due(self, now: float) -> float | None:
        times = [peer.end for peer in self._peers.values()]
        times += list(self._lingering.values())[:1]
        if not self._alone:
            times.append(self._spoke + HEARTBEAT)
        if self._emptied or self._quiet or self._doubts:
            times.append(self._tidied + HEARTBEAT)
        if not self._sending and (self._roll.changed or self._news or self._tells or self._asks):
            times.append(self._resting)
        return max(min(times) - now, TICK) if times else None

    def _put(self, drafts: Sequence[Draft]) -> None:
        try:
            # What waits for the broker is one announcement at most; whatever changes meanwhile, is in the next one.
            sent = self._send(drafts, HEARTBEAT)
        except (BrokerUnavailable, Overloaded):
            self._failed(drafts)
        else:
            sent.add_done_callback(partial(self._sent, drafts))

    def _sent(self, drafts: Sequence[Draft], sent: Future[Position]) -> None:
        if (error := sent.exception()) is not None:
            if not isinstance(error, BrokerUnavailable):
                logger.error("Who is present in COMET's channels was not told: %s", error)
            self._failed(drafts)
            return
        with self._lock:
            self._sending = False
        self.timer.wake()

    def _failed(self, drafts: Sequence[Draft]) -> None:
        """Of a broker that is away the hub has told. The others have missed something: all there is is told again."""
        names = {draft.channel.name for draft in drafts}
        with self._lock:
            self._sending = False
            self._resting = self._clock() + RETRY
            self._tells = True
            self._asks.add(_EVERYONE)
            for name in names - {PRESENCE.name}:
                channel = name.removesuffix(channels.COMPANION)
                self._told.pop(channel, None)
                self._roll.changed.add(channel)
        self.timer.wake()

    # What pages are told

    def _states(self, now: float) -> list[Draft]:
        drafts: list[Draft] = []
        if not self._has_asked or now < self._answered:
            return drafts
        for name in list(self._roll.changed):
            if len(drafts) == STATES_PER_TICK:
                break
            if self._quiet.get(name, 0) > now:
                continue
            self._roll.changed.discard(name)
            count = self._roll.count(name)
            if count:
                self._emptied.pop(name, None)
            else:
                self._emptied.setdefault(name, now)
            if self._speaker(name) != self.id or (draft := self._state(name)) is None:
                continue
            if self._told.get(name) != hash(draft.body):
                self._told[name] = hash(draft.body)
                self._quiet[name] = now + max(TICK, count / DELIVERIES_PER_SECOND)
                drafts.append(draft)
        return drafts

    def _speaker(self, name: str) -> str:
        """The process that tells a channel's state: a different one for each channel, and everywhere the same."""
        living = {self.id, *(process for process, peer in self._peers.items() if peer.lives)}
        there = living.intersection(self._roll.holders(name)) or living
        return min(there, key=lambda process: zlib.crc32(f"{process}{name}".encode()))

    def _state(self, name: str) -> Draft | None:
        """None for a channel that is not known here, but was to a process of another version."""
        companion = channels.companion(name)
        if companion is None:
            return None
        members = [member._asdict() for member in self._roll.members(name, MEMBERS_SHOWN)]
        state = {"count": self._roll.count(name), "members": members}
        return Draft(companion, _body(companion.name, "presence", state))

    def hear_state(self, message: Message) -> None:
        """A state was told, by this process or another."""
        name = message.channel.removesuffix(channels.COMPANION)
        with self._lock:
            if self._told.get(name) != hash(message.body):
                self._told[name] = hash(message.body)
                self._doubts.add(name)
                if not self._roll.count(name):
                    self._emptied.setdefault(name, self._clock())

    # What processes tell each other

    def _announcements(self, now: float) -> list[Draft]:
        drafts: list[Draft] = []
        if not self._alone:
            drafts += self._whole(PRESENCE, "state") if self._tells else self._changes()
            # After the state: whoever hears of a process for the first time asks it for that.
            drafts += [self._say("ask", of=process) for process in sorted(self._asks)]
            if not drafts and now - self._spoke >= HEARTBEAT:
                drafts.append(self._say("lives"))
            if _EVERYONE in self._asks:
                self.takes_part = self._has_asked = True
                self._answered = now + ANSWER_TIME
        self._tells = False
        self._news.clear()
        self._asks.clear()
        if drafts:
            self._spoke = now
        return drafts

    def _changes(self) -> list[Draft]:
        entries = [
            (channel, id) if member is None else (channel, *member)
            for (channel, id), member in self._news.items()
        ]
        return [self._say("news", entries=piece) for piece in _pieces(entries)]

    def _whole(self, channel: Channel, event: str, **more: Any) -> list[Draft]:
        entries = ((name, *member) for name, member in self._roll.entries(self.id))
        pieces = list(_pieces(entries)) or [[]]
        return [
            self._say(event, channel, part=part, of=len(pieces), entries=piece, **more)
            for part, piece in enumerate(pieces)
        ]

    def _say(self, event: str, channel: Channel = PRESENCE, **data: Any) -> Draft:
        return Draft(channel, _body(channel.name, event, {"from": self.id, **data}))

    def hear(self, message: Message) -> None:
        """Takes what a process says on `PRESENCE` or `FAREWELLS`."""
        said = message.data
        process = said["from"]
        if process == self.id:
            return
        with self._lock:
            now = self._clock()
            peer = self._peers.setdefault(process, _Peer(now))
            peer.heard = now
            event = message.event
            if event == "ask":
                self._tells = self._tells or said["of"] in (_EVERYONE, self.id)
            elif event == "news":
                self._take_news(process, said["entries"])
            elif event in ("state", "farewell"):
                self._take_whole(process, peer, said)
                if event == "farewell":
                    peer.until = message.published + said["linger"]
            if not (peer.whole or peer.coming or peer.asked or peer.until):
                peer.asked = True
                self._asks.add(process)
        self.timer.wake()

    def _take_news(self, process: str, entries: Iterable[Sequence[Any]]) -> None:
        for channel, id, *rest in entries:
            if rest:
                self._roll.join(process, channel, Member(id, *rest))
            else:
                self._roll.leave(process, channel, id)

    def _take_whole(self, process: str, peer: _Peer, said: dict[str, Any]) -> None:
        """Counts when its last part is there: nobody leaves between the parts."""
        if said["part"] == 0:
            peer.coming, peer.parts = [], 0
        if said["part"] != peer.parts:
            return  # this process began to hear in the middle
        peer.parts += 1
        peer.coming += [(channel, Member(*rest)) for channel, *rest in said["entries"]]
        if peer.parts == said["of"]:
            self._roll.replace(process, peer.coming)
            peer.coming, peer.whole = [], True

    # The server and the broker

    def start(self) -> None:
        """For the server: from now on, on the running event loop, this process takes part."""
        with self._lock:
            self._closed = False
            self.takes_part = True
        self.timer.start()

    def begin(self, farewells: Iterable[Message], *, anew: bool) -> None:
        """This process hears the others from now on, and has missed what they said. ``anew`` is when the log is another."""
        with self._lock:
            self._spare(self._clock())
            self._asks.add(_EVERYONE)
            self._tells = True
            if anew:
                self._told.clear()
                self._roll.changed.update(self._roll.channels())
        self.hear_all(farewells)
        self.timer.wake()

    def hear_all(self, farewells: Iterable[Message]) -> None:
        """Who was in processes that have stopped, and may be on the way to this one."""
        for message in farewells:
            self.hear(message)

    def resume(self) -> None:
        """What is said can be heard again."""
        with self._lock:
            self._spare(self._clock())

    def _spare(self, now: float) -> None:
        """Nobody could be heard, so nobody is gone."""
        for peer in self._peers.values():
            peer.heard = now

    def close(self, spread: float, *, silently: bool = False) -> None:
        """This process stops: its members may come to another one, within ``spread`` seconds and the time that all have.

        It sends its last words, unless there is no time for them, and says nothing from then on. Harmless a second time.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if silently:
                return
            linger = get_config().COMET.LINGER + spread
            known = self._roll.processes.get(self.id) or (self._has_asked and not self._alone)
            drafts = self._whole(FAREWELLS, "farewell", linger=linger) if known else []
        if drafts:
            self._put(drafts)


class Timer:
    """Calls ``run`` on an event loop: soon after each `wake`, and again after as many seconds as it has returned.

    The loop is the one of `start`, the server's; without that, the first one on which something wakes it.
    """

    def __init__(self, run: Callable[[], float | None]) -> None:
        self._run = run
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handle: asyncio.TimerHandle | None = None
        self._soon = False

    def start(self) -> None:
        """On the running loop, from now on."""
        self.stop()
        self.wake()

    def stop(self) -> None:
        """Calls nothing any more; on the loop."""
        if self._handle is not None:
            self._handle.cancel()
        self._loop, self._handle, self._soon = None, None, False

    def wake(self) -> None:
        """Something has changed; in any thread. Many of them at once are one call."""
        loop = self._loop
        if loop is None or loop.is_closed():
            loop = asyncio._get_running_loop()
            if loop is None:
                return
            self._loop, self._handle, self._soon = loop, None, False
        if not self._soon:
            self._soon = True
            try:
                loop.call_soon_threadsafe(self._plan, loop, TICK)
            except RuntimeError:
                if not loop.is_closed():
                    raise

    def _plan(self, loop: asyncio.AbstractEventLoop, delay: float) -> None:
        if loop is self._loop:
            if self._handle is not None:
                self._handle.cancel()
            self._handle = loop.call_later(delay, self._fire, loop)

    def _fire(self, loop: asyncio.AbstractEventLoop) -> None:
        if loop is self._loop:
            self._handle, self._soon = None, False
            delay: float | None = HEARTBEAT
            try:
                delay = self._run()
            finally:
                if delay is not None and not self._soon:
                    self._plan(loop, delay)


def _pieces(entries: Iterable[Sequence[Any]]) -> Iterator[list[Sequence[Any]]]:
    """The entries, a few at a time, for messages of bounded size."""
    most = min(PIECE, get_config().COMET.MAX_MESSAGE // 2)
    piece: list[Sequence[Any]] = []
    size = 0
    for entry in entries:
        length = len(json.dumps(entry))
        if piece and size + length > most:
            yield piece
            piece, size = [], 0
        piece.append(entry)
        size += length
    if piece:
        yield piece


def _body(channel: str, event: str, data: Any) -> bytes:
    message = {"channel": channel, "event": event, "data": data}
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()
