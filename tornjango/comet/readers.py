"""One who follows channels, whatever the transport: what it may read, where it stands, and what comes next."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest
from django.utils.functional import SimpleLazyObject, empty

from tornjango.comet import channels, cursors, grants
from tornjango.comet.attendance import make_member, member_id
from tornjango.comet.hub import Hub, get_hub
from tornjango.comet.log import Audience, Channel, Message, Position, Reading
from tornjango.comet.roll import Member
from tornjango.comet.waiters import Waiter
from tornjango.conf import get_config
from tornjango.exceptions import ChannelForbidden, CometError

#: What a client may call itself, in characters.
MAX_CLIENT_LENGTH = 64

# What a crowd is told is made once, and is in memory once however slow its clients are. A crowd is answered in one go, so
# few are kept: each may have BYTES_PER_ANSWER.
_REMEMBERED = 8

# Of the time that a yes counts: readers that came together should not all ask again together.
_EARLIER = 0.2


@dataclass(frozen=True, slots=True)
class Answer:
    """What a reader is told at one time: messages in order, and the cursor to come back with.

    ``gaps`` names the channels that have lost messages this reader has not seen: fetch their state afresh. ``more`` says
    that further messages are there at once, ``retry`` in how many milliseconds to come back: 0 but when the server stops.
    ``grant``, where there is one, is to be shown from now on, that authorisers need not be asked each time.

    ``at`` tells where the reader stands in each of its channels, for a client that puts the answers of several readers
    together, as tabs do that share one connection: in JSON as offsets, under one ``epoch``, beside each message's own.
    """

    messages: list[Message]
    cursor: str
    gaps: list[str]
    more: bool
    retry: int
    grant: str | None = None
    at: tuple[tuple[str, Position], ...] = ()

    def json(self) -> bytes:
        """The answer as the browser client takes it, on every transport; messages are not encoded again."""
        bodies = tuple([message.body for message in self.messages])
        offsets = tuple([message.offset for message in self.messages])
        gaps = tuple(self.gaps)
        return _encode(
            bodies, offsets, self.cursor, gaps, self.more, self.retry, self.grant, self.at
        )


@lru_cache(maxsize=_REMEMBERED)
def _encode(
    bodies: tuple[bytes, ...],
    offsets: tuple[int, ...],
    cursor: str,
    gaps: tuple[str, ...],
    more: bool,
    retry: int,
    grant: str | None,
    at: tuple[tuple[str, Position], ...],
) -> bytes:
    epoch = at[0][1].epoch.hex() if at else ""
    places = json.dumps({name: position.offset for name, position in at}, separators=(",", ":"))
    text = (
        b'{"messages":[%s],"offsets":[%s],"cursor":%s,"gaps":%s,"more":%s,"retry":%d,'
        b'"epoch":"%s","at":%s%s}'
    )
    return text % (
        b",".join(bodies),
        ",".join(map(str, offsets)).encode(),
        json.dumps(cursor).encode(),
        json.dumps(gaps).encode(),
        b"true" if more else b"false",
        retry,
        epoch.encode(),
        places.encode(),
        b"" if grant is None else b',"grant":%s' % json.dumps(grant).encode(),
    )


class _Yes(NamedTuple):
    """What an authoriser has said: where the logs stood then, and until when it counts, in seconds since 1970."""

    position: Position
    expires: int


class Reader:
    """Follows channels for one client, from its cursor on. On one event loop, by one task at a time, but for what another
    one adds and leaves.

    With ``request`` None the caller vouches: no authoriser is asked, and messages for some only are not for this reader.
    ``client`` is what the client calls itself, on whatever transport; a newer reader of the same name, with the same
    session, takes its place. Raises CometError where that is too long.
    """

    def __init__(
        self,
        request: HttpRequest | None,
        *,
        transport: str,
        grant: str | None = None,
        client: str | None = None,
    ) -> None:
        self.request = request
        self.transport = transport
        self.client = _own_name(request, client)
        self.hub: Hub = get_hub()
        self.channels: dict[str, channels.Match] = {}
        self.superseded = False
        #: Whether a channel was new to the reader's cursor: then the client has to hear of its place at once.
        self.is_new = False
        self._prompted = False
        self._positions: dict[Channel, Position] = {}
        self._grant = grants.NOTHING if request is None else grants.read(request, grant)
        self._granted: dict[str, _Yes] = {}
        self._earlier = random.uniform(0, _EARLIER) * get_config().COMET.GRANT_TTL
        self._new_grant = False
        self._identity: _Identity | None = None
        self._waiter: Waiter | None = None
        # Whether it has read all there was: until its waiter is woken there is nothing new.
        self._has_all = False
        # Who it is to others, and the channels in which it counts as present.
        self._member: Member | None = None
        self._present: set[str] = set()

    # What it follows

    async def follow(
        self, names: Iterable[str], cursor: str | None, grant: str | None = None
    ) -> None:
        """Adds channels: from where the cursor stands in each, or from now on where it knows nothing of one.

        Another task may be in `next` meanwhile; a newer ``grant`` takes the place of the reader's own. Raises
        UnknownChannel, ChannelForbidden, InvalidCursor, BrokerUnavailable, and CometError for none or too many; then
        nothing is added.
        """
        names = list(names)
        matches = channels.resolve_all([*self.channels, *names])
        added = [match for match in matches if match.channel.name not in self.channels]
        wanted = [match.channel.name for match in added]
        known = cursors.decode(cursor, wanted) if cursor else {}
        if grant is not None and self.request is not None:
            self._grant = grants.read(self.request, grant)
        await self.hub.ready()
        # Before anything is awaited: what is published while an authoriser thinks belongs to the answer.
        present = self.hub.present()
        await self._authorise(added, present)
        await self._introduce(added)
        for match in added:
            name = match.channel.name
            self.channels[name] = match
            self._positions[match.channel] = known.get(name) or match.begin(present)
        self.is_new = self.is_new or len(known) < len(added)
        self._hear()

    def leave(self, names: Iterable[str]) -> None:
        """Follows these no longer; those it does not follow are passed over."""
        for name in names:
            if (match := self.channels.pop(name, None)) is not None:
                del self._positions[match.channel]
                self._granted.pop(name, None)
        self._hear()

    @contextmanager
    def parked(self) -> Iterator[None]:
        """Inside, `next` is woken by what is published: as long as the client is there."""
        with self.hub.waiters.registered(list(self.channels)) as waiter:
            self._waiter, self._has_all = waiter, False
            try:
                with self.hub.waiters.known(self):
                    self._attend()
                    yield
            finally:
                self._waiter = None
                self._attend(self._linger())

    def _hear(self) -> None:
        if self._waiter is not None:
            self.hub.waiters.change(self._waiter, list(self.channels))
            self._waiter.wake()
            self._attend()

    # Where it is present

    async def _introduce(self, matches: Iterable[channels.Match]) -> None:
        """Who it is to others in presence channels. The user costs a query: so once per client, not for each poll."""
        names = [match.channel.name for match in matches if match.declaration.presence]
        if names and self.request is not None and self._member is None:
            id = member_id(self.client)
            self._member = self.hub.presence.recall(id, names)
            if self._member is None:
                self._member = make_member(id, await _user(self.request))

    def _attend(self, linger: float = 0) -> None:
        """Counts as present where it follows; one that leaves a channel is gone at once, one that ends may come back."""
        if self._member is None:
            return
        present = {name for name, match in self.channels.items() if match.declaration.presence}
        if self._waiter is None:
            present.clear()
        for name in present - self._present:
            self.hub.presence.appear(name, self._member)
        for name in self._present - present:
            self.hub.presence.vanish(name, self._member.id, linger)
        self._present = present

    def _linger(self) -> float:
        """Without a name of its own nobody would know that it is back."""
        if self.client is None:
            return 0
        spread = self.hub.waiters.spread() if self.hub.waiters.drained else 0
        return get_config().COMET.LINGER + spread

    def supersede(self) -> None:
        """A newer reader of the same client is there: this one's `next` returns at once, with what it has."""
        self.superseded = True
        if self._waiter is not None:
            self._waiter.wake()

    def prompt(self) -> None:
        """This reader's `next` returns at once, with what there is: its client has to hear where it stands."""
        self._prompted = True
        if self._waiter is not None:
            self._waiter.wake()

    # What it may

    async def _authorise(self, matches: Sequence[channels.Match], present: Position) -> None:
        if self.request is None:
            return
        covered = [it.channel.name for it in matches if self._grant.covers(it.channel.name)]
        revoked = self.hub.revoked((name, self._grant.position) for name in covered)
        yes = _Yes(self._grant.position, self._grant.expires)
        granted = {name: yes for name in covered if name not in revoked}
        self._granted |= granted
        asked = [match for match in matches if match.channel.name not in granted]
        if asked:
            await channels.authorise(self.request, asked)
            self._take_yes(asked, present)

    def _take_yes(self, matches: Iterable[channels.Match], present: Position) -> None:
        yes = _Yes(present, grants.expiry())
        self._granted |= {match.channel.name: yes for match in matches}
        self._new_grant = True

    def _said(self) -> dict[str, _Yes]:
        """Of the channels that it follows; empty where nobody is asked."""
        return {name: self._granted[name] for name in self.channels if name in self._granted}

    def _revoked(self) -> set[str]:
        return self.hub.revoked((name, yes.position) for name, yes in self._said().items())

    def _expired(self) -> set[str]:
        soon = time.time() + self._earlier
        return {name for name, yes in self._said().items() if soon >= yes.expires}

    async def _authorise_again(self) -> None:
        """Raises ChannelForbidden where a channel may be read no longer: it is followed no longer, either."""
        doubtful = self._revoked() | self._expired()
        if not doubtful:
            return
        assert self.request is not None
        _forget_user(self.request)
        self._identity = None
        await self.hub.ready()
        present = self.hub.present()
        refused: list[str] = []
        for match in [self.channels[name] for name in sorted(doubtful)]:
            try:
                await channels.authorise(self.request, [match])
            except (ChannelForbidden, PermissionDenied, Http404):
                refused.append(match.channel.name)
            else:
                self._take_yes([match], present)
        if refused:
            self.leave(refused)
            raise ChannelForbidden(
                f"This request may no longer read {', '.join(map(repr, refused))}.", refused
            )

    def _take_grant(self) -> str | None:
        if not self._new_grant or self.request is None:
            return None
        said = self._said().values()
        positions = [yes.position for yes in said]
        if not positions or any(it.epoch != positions[0].epoch for it in positions):
            return None  # a yes of another epoch counts no longer: it is asked for again first
        self._new_grant = False
        # One that is added makes none of the others count for longer.
        expires = min(yes.expires for yes in said)
        return grants.issue(self.request, min(positions), expires, self.channels)

    # What comes

    @property
    def cursor(self) -> str:
        """Where it stands."""
        return cursors.encode({channel.name: at for channel, at in self._positions.items()})

    @property
    def at(self) -> tuple[tuple[str, Position], ...]:
        """As in `Answer`."""
        return tuple([(channel.name, at) for channel, at in self._positions.items()])

    async def next(self, timeout: float) -> Answer:  # noqa: ASYNC109 (as in `comet.wait`)
        """Waits, inside of `parked`, until there is something for this reader, or something to be said.

        Returns with empty ``messages`` after ``timeout`` seconds, when the server is stopping, when it was prompted, and
        when it was superseded: what comes then is for the newer reader. Raises ChannelForbidden when a channel was revoked,
        or the last yes is older than ``TORNJANGO["COMET"]["GRANT_TTL"]``, and the authoriser now says no: it is not
        followed any more.
        """
        assert self._waiter is not None
        deadline = asyncio.get_running_loop().time() + timeout
        while True:
            if self._has_all:
                await self._waiter.wait(deadline)
                self._has_all = False
            await self._authorise_again()
            answer, more = await self._look(deadline)
            self._has_all = not more
            if answer is not None:
                return answer

    async def _look(self, deadline: float) -> tuple[Answer | None, bool]:
        """The answer, where one is due; else, whether to look again at once. A parked reader keeps nothing of it."""
        since = dict(self._positions)
        reading = await self.hub.read(since)
        messages = list(reading.messages)
        if any(message.audience is not None for message in messages):
            messages = await self._for_me(messages)
        if self.superseded:
            retry = self.hub.waiters.retry()
            return Answer([], self.cursor, [], False, retry, at=self.at), False
        if self._revoked():
            # While this was read: who is refused hears nothing that was published after.
            return None, True
        if since != self._positions:
            return None, True  # channels were added or left while this was read
        gaps, more = self._advance(reading)
        draining = self.hub.waiters.draining
        over = draining or self._prompted or asyncio.get_running_loop().time() >= deadline
        if not (messages or gaps or over):
            return None, more
        self._prompted = False
        retry = self.hub.waiters.retry()
        grant = self._take_grant()
        return Answer(messages, self.cursor, gaps, more, retry, grant, self.at), more

    def _advance(self, reading: Reading) -> tuple[list[str], bool]:
        """Which gaps to tell of, and whether there is more to read."""
        gaps, more = [], reading.more
        for channel, before in self._positions.items():
            match = self.channels[channel.name]
            after = reading.positions[channel.name]
            if channel.name not in reading.gaps:
                pass
            elif not match.declaration.is_companion:
                gaps.append(channel.name)
            elif before != match.begin(after):
                # Who has missed states of a channel needs the last one only; if even that is lost, the next one.
                after, more = match.begin(after), True
            self._positions[channel] = after
        return gaps, more

    async def _for_me(self, messages: Iterable[Message]) -> list[Message]:
        if self._identity is None:
            self._identity = await _identify(self.request)
        identity = self._identity
        return [message for message in messages if identity.is_in(message.audience)]


def _own_name(request: HttpRequest | None, client: str | None) -> str | None:
    """One that nobody can guess who does not have the session: else one client could end the readers of another."""
    if not client:
        return None
    if len(client) > MAX_CLIENT_LENGTH:
        raise CometError(
            f"What the client calls itself has {len(client)} characters; the most is {MAX_CLIENT_LENGTH}."
        )
    return client if request is None else f"{grants.binding(request).hex()}:{client}"


def _forget_user(request: HttpRequest) -> None:
    """Has the request's user and session read afresh: they are as old as the request, which may have come hours ago."""
    user = request.__dict__.get("user")
    if isinstance(user, SimpleLazyObject):
        user._wrapped = empty
    for cached in ("_cached_user", "_acached_user"):
        request.__dict__.pop(cached, None)
    session: Any = request.__dict__.get("session")
    if session is not None and not session.modified:
        session.__dict__.pop("_session_cache", None)


@dataclass(frozen=True, slots=True)
class _Identity:
    """Whom a request is from, as audiences name them."""

    user: str | None
    groups: frozenset[str]

    def is_in(self, audience: Audience | None) -> bool:
        if audience is None:
            return True
        return self.user in audience.users or not self.groups.isdisjoint(audience.groups)


async def _user(request: HttpRequest | None) -> Any:
    """None where there is no authentication."""
    return await request.auser() if request is not None and hasattr(request, "auser") else None


async def _identify(request: HttpRequest | None) -> _Identity:
    user = await _user(request)
    if user is None or not user.is_authenticated:
        return _Identity(None, frozenset())
    groups: Any = getattr(user, "groups", None)
    names = [] if groups is None else [name async for name in groups.values_list("name", flat=True)]
    return _Identity(str(user.pk), frozenset(names))
