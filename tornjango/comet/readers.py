"""One who follows channels, whatever the transport: what it may read, where it stands, and what comes next."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from django.http import HttpRequest

from tornjango.comet import channels, cursors, grants
from tornjango.comet.hub import Hub, get_hub
from tornjango.comet.log import Audience, Channel, Message, Position
from tornjango.comet.waiters import Waiter


@dataclass(frozen=True, slots=True)
class Answer:
    """What a reader is told at one time: messages in order, and the cursor to come back with.

    ``gaps`` names the channels that have lost messages this reader has not seen: fetch their state afresh. ``more`` says
    that further messages are there at once, ``retry`` in how many milliseconds to come back: 0 but when the server stops.
    ``grant``, where there is one, is to be shown from now on, that authorisers need not be asked each time.
    """

    messages: list[Message]
    cursor: str
    gaps: list[str]
    more: bool
    retry: int
    grant: str | None = None

    def json(self) -> bytes:
        """The answer as the browser client takes it, on every transport; messages are not encoded again."""
        grant = b"" if self.grant is None else b',"grant":%s' % json.dumps(self.grant).encode()
        return b'{"messages":[%s],"cursor":%s,"gaps":%s,"more":%s,"retry":%d%s}' % (
            b",".join([message.body for message in self.messages]),
            json.dumps(self.cursor).encode(),
            json.dumps(self.gaps).encode(),
            b"true" if self.more else b"false",
            self.retry,
            grant,
        )


class Reader:
    """Follows channels for one client, from its cursor on. On one event loop, by one task at a time.

    With ``request`` None the caller vouches: no authoriser is asked, and messages for some only are not for this reader.
    ``client`` is what the client calls itself, on whatever transport; a newer reader of the same name takes its place.
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
        self.client = client
        self.hub: Hub = get_hub()
        self.channels: dict[str, channels.Match] = {}
        self.superseded = False
        #: Whether a channel was new to the reader's cursor: then the client has to hear of its place at once.
        self.is_new = False
        self._positions: dict[Channel, Position] = {}
        self._grant = grants.NOTHING if request is None else grants.read(request, grant)
        self._granted: dict[str, Position] = {}
        self._new_grant = False
        self._identity: _Identity | None = None
        self._waiter: Waiter | None = None

    # What it follows

    async def follow(self, names: Iterable[str], cursor: str | None) -> None:
        """Adds channels: from where the cursor stands in each, or from now on where it knows nothing of one.

        Raises UnknownChannel, ChannelForbidden, InvalidCursor, BrokerUnavailable, and CometError for none or too many; then
        nothing is added.
        """
        names = list(names)
        matches = channels.resolve_all([*self.channels, *names])
        added = [match for match in matches if match.channel.name not in self.channels]
        wanted = [match.channel.name for match in added]
        known = cursors.decode(cursor, wanted) if cursor else {}
        await self.hub.ready()
        # Before anything is awaited: what is published while an authoriser thinks belongs to the answer.
        present = self.hub.present()
        await self._authorise(added, present)
        for match in added:
            name = match.channel.name
            self.channels[name] = match
            self._positions[match.channel] = known.get(name, present)
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
            self._waiter = waiter
            try:
                with self.hub.waiters.known(self):
                    yield
            finally:
                self._waiter = None

    def _hear(self) -> None:
        if self._waiter is not None:
            self.hub.waiters.change(self._waiter, list(self.channels))
            self._waiter.wake()

    def supersede(self) -> None:
        """A newer reader of the same client is there: this one's `next` returns at once, with what it has."""
        self.superseded = True
        if self._waiter is not None:
            self._waiter.wake()

    # What it may

    async def _authorise(self, matches: Iterable[channels.Match], present: Position) -> None:
        if self.request is None:
            return
        asked: list[channels.Match] = []
        for match in matches:
            name = match.channel.name
            if self._grant.covers(name) and not self.hub.revoked_since(name, self._grant.position):
                self._granted[name] = self._grant.position
            else:
                asked.append(match)
        if asked:
            await channels.authorise(self.request, asked)
            self._granted |= {match.channel.name: present for match in asked}
            self._new_grant = True

    async def _authorise_again(self) -> None:
        """Asks for the channels that were revoked since. Raises ChannelForbidden, and then follows those no longer."""
        if self.request is None:
            return
        revoked = [
            match
            for name, match in self.channels.items()
            if self.hub.revoked_since(name, self._granted[name])
        ]
        if not revoked:
            return
        present = self.hub.present()
        try:
            await channels.authorise(self.request, revoked)
        except BaseException:
            self.leave([match.channel.name for match in revoked])
            raise
        self._granted |= {match.channel.name: present for match in revoked}
        self._new_grant = True

    def _take_grant(self) -> str | None:
        if not self._new_grant or self.request is None:
            return None
        self._new_grant = False
        epoch = self.hub.present().epoch
        oldest = min((it.offset for it in self._granted.values() if it.epoch == epoch), default=0)
        return grants.issue(self.request, Position(epoch, oldest), self.channels)

    # What comes

    @property
    def cursor(self) -> str:
        """Where it stands."""
        return cursors.encode({channel.name: at for channel, at in self._positions.items()})

    async def next(self, timeout: float) -> Answer:  # noqa: ASYNC109 (as in `comet.wait`)
        """Waits, inside of `parked`, until there is something for this reader, or something to be said.

        Returns with empty ``messages`` after ``timeout`` seconds, when the server is stopping, and when it was superseded.
        Raises ChannelForbidden when a channel was revoked, and the authoriser now says no: it is not followed any more.
        """
        assert self._waiter is not None
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            await self._authorise_again()
            reading = await self.hub.read(self._positions, deadline)
            self._positions = {
                channel: reading.positions[channel.name] for channel in self._positions
            }
            messages = reading.messages
            if any(message.audience is not None for message in messages):
                messages = await self._for_me(messages)
            draining = self.hub.waiters.draining
            over = draining or self.superseded or loop.time() >= deadline
            if messages or reading.gaps or over:
                retry = self.hub.waiters.retry()
                grant = self._take_grant()
                return Answer(messages, self.cursor, reading.gaps, reading.more, retry, grant)
            if not reading.more:
                await self._waiter.wait(deadline)

    async def _for_me(self, messages: Iterable[Message]) -> list[Message]:
        if self._identity is None:
            self._identity = await _identify(self.request)
        identity = self._identity
        return [message for message in messages if identity.is_in(message.audience)]


@dataclass(frozen=True, slots=True)
class _Identity:
    """Whom a request is from, as audiences name them."""

    user: str | None
    groups: frozenset[str]

    def is_in(self, audience: Audience | None) -> bool:
        if audience is None:
            return True
        return self.user in audience.users or not self.groups.isdisjoint(audience.groups)


async def _identify(request: HttpRequest | None) -> _Identity:
    user: Any = None
    if request is not None and hasattr(request, "auser"):
        user = await request.auser()
    if user is None or not user.is_authenticated:
        return _Identity(None, frozenset())
    groups: Any = getattr(user, "groups", None)
    names = [] if groups is None else [name async for name in groups.values_list("name", flat=True)]
    return _Identity(str(user.pk), frozenset(names))
