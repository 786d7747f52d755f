"""Channels that pages follow: whoever comes back with its cursor misses nothing and sees nothing twice, or is told of a gap.

@comet.channel("entry:<int:pk>")            # in the channels.py of an app
async def can_read(request, pk):
    return True

comet.publish("entry:7", {"text": "Hello"})  # in any view, thread or command
path("comet/", include("tornjango.comet.urls"))
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

from django.http import HttpRequest

from tornjango.comet import channels as _channels
from tornjango.comet import cursors as _cursors
from tornjango.comet import hub as _hub
from tornjango.comet import publishing as _publishing
from tornjango.comet.channels import channel
from tornjango.comet.hub import get_hub
from tornjango.comet.log import Message, Position
from tornjango.comet.publishing import Event
from tornjango.comet.readers import Answer, Reader
from tornjango.comet.roll import Member
from tornjango.conf import get_config
from tornjango.exceptions import (
    BrokerUnavailable,
    ChannelForbidden,
    CometError,
    InvalidCursor,
    UnknownChannel,
)

__all__ = [
    "Answer",
    "BrokerUnavailable",
    "ChannelForbidden",
    "CometError",
    "Event",
    "Following",
    "Gap",
    "InvalidCursor",
    "Member",
    "Message",
    "Position",
    "UnknownChannel",
    "apublish",
    "apublish_batch",
    "arevoke",
    "channel",
    "cursor",
    "drain",
    "follow",
    "presence",
    "publish",
    "publish_batch",
    "ready",
    "revoke",
    "status",
    "wait",
]

# Readers that came together (a deploy, a network that is back) should not time out together for ever.
_EARLIEST_TIMEOUT = 0.9

# The attribute of a request that says where the channels ended when it came.
_ARRIVAL = "_comet_arrival"

#: The environment variable with the file by which a process hands its memory's messages to the next, in development.
KEPT = "TORNJANGO_COMET"


def publish(
    channel: str,
    data: Any,
    event: str | None = None,
    *,
    users: Iterable[Any] | None = None,
    groups: Iterable[str] | None = None,
    now: bool = False,
    wait: float | None = None,
) -> Position | None:
    """Sends ``data`` to everyone who follows ``channel``; from any process and thread, with or without an event loop.

    Inside ``transaction.atomic``, or ``async with db.atomic()``, the message goes out when the transaction commits, and
    never if it is rolled back (which includes tests in a ``TestCase``, as for ``on_commit``); with ``now=True``, or
    outside a transaction, at once. ``data`` is anything that DjangoJSONEncoder takes, encoded here and now; ``event``
    is a short name that readers get beside it. With ``users`` (or their primary keys) or ``groups`` (or their names) it is
    for those of the channel's readers only who are one of them, or in one of them.

    Returns the message's position, or None where it is not published yet: before the commit, and on an event loop
    with a broker, which has it a moment later; ``apublish`` waits for that. While the broker is away a message waits for
    ``wait`` seconds (by default ``TORNJANGO["COMET"]["PUBLISH_TIMEOUT"]``); then this raises BrokerUnavailable, or, where
    nobody waits, the log says so.

    Raises UnknownChannel if no declared pattern matches, TypeError or ValueError if ``data`` is no JSON, ValueError if it
    is larger than the channel or ``TORNJANGO["COMET"]["MAX_MESSAGE"]`` allows, Overloaded if too many messages wait, and
    RuntimeError for ``now=True`` on an event loop with a broker.
    """
    return _publishing.publish([Event(channel, data, event, users, groups)], now=now, wait=wait)


async def apublish(
    channel: str,
    data: Any,
    event: str | None = None,
    *,
    users: Iterable[Any] | None = None,
    groups: Iterable[str] | None = None,
    now: bool = False,
    wait: float | None = None,
) -> Position | None:
    """As ``publish``; returns when no later reader can miss the message, or None inside a transaction."""
    events = [Event(channel, data, event, users, groups)]
    return await _publishing.apublish(events, now=now, wait=wait)


def publish_batch(
    events: Iterable[Event], *, now: bool = False, wait: float | None = None
) -> Position | None:
    """As ``publish``, for many at once, which stay together and in order; all of them, or none. The position is the last one's."""
    return _publishing.publish(events, now=now, wait=wait)


async def apublish_batch(
    events: Iterable[Event], *, now: bool = False, wait: float | None = None
) -> Position | None:
    """As ``publish_batch``, as ``apublish``."""
    return await _publishing.apublish(events, now=now, wait=wait)


def revoke(*channels: str, now: bool = False, wait: float | None = None) -> None:
    """Has everyone who follows these channels asked for again, at once, in every process.

    Call it when somebody loses the right to read. The authoriser is asked about each parked and each streaming reader, and
    about each client that comes back; who is refused hears no message that was published after this. On commit, as
    ``publish``, and with its errors.
    """
    _publishing.revoke(channels, now=now, wait=wait)


async def arevoke(*channels: str, wait: float | None = None) -> None:
    """As ``revoke``, now; returns when it counts for every message that is published from then on."""
    await _publishing.arevoke(channels, wait=wait)


async def ready() -> None:
    """Returns once this process follows the broker. Raises BrokerUnavailable if it cannot be reached."""
    await get_hub().ready()


def cursor(*channels: str, request: HttpRequest | None = None) -> str:
    """A cursor at the present end of these channels; from any thread.

    Take it before the queries whose result a page shows: the page then follows with it, and nothing that is published
    between is lost. With ``request`` it is where the channels ended when tornjango began to answer that request, whenever
    this is called; under another server it is the present end all the same. A message that was published between cursor
    and query comes again, and may be in the query's result already: pages should know what they show by its id.

    Raises UnknownChannel, BrokerUnavailable, or CometError for none or too many channels.
    """
    wanted = _channels.resolve_all(channels)
    end: Position | None = getattr(request, _ARRIVAL, None)
    if end is None:
        end = get_hub().present()
    return _cursors.encode({match.channel.name: match.begin(end) for match in wanted})


def note_arrival(request: HttpRequest) -> None:
    """For the server: a request is about to be answered. The channels' end is noted on it, for ``cursor(request=...)``."""
    if _channels.patterns() and (hub := get_hub()).is_ready:
        setattr(request, _ARRIVAL, hub.present())


async def wait(
    request: HttpRequest | None,
    cursor: str | None,
    *channels: str,
    timeout: float | None = None,  # noqa: ASYNC109 (its end is an answer, not a cancellation)
    grant: str | None = None,
    client: str | None = None,
) -> Answer:
    """Waits until something is published to one of the channels, after the cursor.

    Returns at once if there is news already; with empty ``messages`` after ``timeout`` seconds (by default
    ``TORNJANGO["COMET"]["POLL_TIMEOUT"]``, less a random bit), when the server is stopping, or when a newer reader of the
    same ``client`` is there. In every case ``answer.cursor`` is what to come back with. A channel that the cursor does not
    name, or any without a cursor, starts now, and the answer comes at once: only a reader that holds a cursor can wait
    without risk of losing anything.

    Every channel's authoriser is asked about ``request``, unless ``grant``, of an answer before, says that it has been;
    with None the caller vouches. Raises UnknownChannel, ChannelForbidden, InvalidCursor, BrokerUnavailable, and CometError
    for none or too many channels.
    """
    reader = Reader(request, transport="poll", grant=grant, client=client)
    await reader.follow(channels, cursor)
    if reader.is_new:
        timeout = 0
    elif timeout is None:
        timeout = get_config().COMET.POLL_TIMEOUT * random.uniform(_EARLIEST_TIMEOUT, 1)
    with reader.parked():
        return await reader.next(timeout)


@dataclass(frozen=True, slots=True)
class Gap:
    """In place of messages that a reader has missed for good: fetch the channel's state afresh."""

    channel: str


class Following:
    """An iterator over what comes: `Message` and `Gap`.

    ``cursor`` is where to go on after what it has given last, in another iteration or another process; before the first
    step of one it is what it was made with.
    """

    def __init__(
        self, request: HttpRequest | None, cursor: str | None, channels: Iterable[str]
    ) -> None:
        self._request = request
        self._cursor = cursor
        self._channels = list(channels)
        self._positions: dict[str, Position] = {}

    @property
    def cursor(self) -> str | None:
        return _cursors.encode(self._positions) if self._positions else self._cursor

    async def __aiter__(self) -> AsyncIterator[Message | Gap]:
        reader = Reader(self._request, transport="follow")
        await reader.follow(self._channels, self.cursor)
        self._positions = dict(reader.at)
        retry = 0
        with reader.parked():
            while not retry:
                answer = await reader.next(get_config().COMET.POLL_TIMEOUT)
                after = dict(answer.at)
                for name in answer.gaps:
                    self._positions[name] = after[name]
                    yield Gap(name)
                for message in answer.messages:
                    self._pass(message.offset, after)
                    yield message
                self._positions = after
                retry = answer.retry

    def _pass(self, offset: int, after: dict[str, Position]) -> None:
        """A message is given: those before it are, in every channel, but where the broker has not told them yet."""
        for name, at in self._positions.items():
            self._positions[name] = at._replace(
                offset=max(at.offset, min(offset, after[name].offset))
            )


def follow(request: HttpRequest | None, cursor: str | None, *channels: str) -> Following:
    """``async for event in comet.follow(...)``: every message from the cursor on, as it comes, and each `Gap`.

    Ends when the server stops. Authorisers and errors are as in ``wait``; ChannelForbidden comes in the middle, too, when
    a channel is revoked.
    """
    return Following(request, cursor, channels)


def presence(channel: str) -> list[Member]:
    """Who follows a channel that is declared with ``presence=True``, on any transport, in any process; the longest there first.

    A client counts once, however many readers it has, and for ``TORNJANGO["COMET"]["LINGER"]`` seconds after the last of
    them: its next poll may be on its way. One that says that it leaves the channel, over a WebSocket, is gone at once; so is
    one that may not read it any more, and one without a name for itself, which nobody would know again. Whoever was in a
    process that was killed counts for half a minute more.

    Followers hear of it on the channel's companion, ``"room:7@presence"``, which asks whom it lets in as the channel does,
    and to which no client publishes: ``{"count": 3, "members": [{"id", "user", "name"}, ...]}``, first when they come, then
    whenever it changes. The count is exact; of the members it has the hundred that have been there longest. All followers
    see them, with what ``get_username()`` says: think of that where it is an address.

    A served process answers from memory. Any other one, such as a command, has the broker's last word, which names a
    hundred members at most: it waits for the broker, so on an event loop it raises BrokerUnavailable. With the memory for a
    broker other processes see nobody. In the first second of a process those of others may be missing. Raises
    UnknownChannel, and CometError for a channel without presence.
    """
    declaration = _channels.resolve(channel).declaration
    if not declaration.presence:
        raise CometError(
            f"Nobody knows who follows {channel!r}: declare {declaration.pattern!r} with presence=True."
        )
    return get_hub().members(channel)


def drain() -> int:
    """Answers every poll parked on the running event loop, with its cursor and a spread-out ``retry``.

    New ones on this loop are answered at once from then on. Returns at once, with how many were parked; their answers
    leave in the next turns of the loop. Raises RuntimeError outside a running loop.
    """
    return get_hub().waiters.drain()


def start() -> None:
    """For the server: this process follows the broker from now on, if the project has channels.

    With the memory for a broker, it goes on with what `stop` has kept in a process before.
    """
    if _channels.patterns():
        get_hub().start()
    if _channels.has_presence():
        get_hub().presence.start()
    if _keeps_messages() and (path := os.environ.get(KEPT)):
        get_hub().load(path)


def hand_over(line: socket.socket) -> None:
    """For a worker that leaves: its memory's messages go to the one that takes its place, by a line that both have."""
    if _keeps_messages():
        get_hub().hand_over(line)
    else:
        line.close()


async def take_over(line: socket.socket) -> None:
    """For a worker that takes another's place: returns when that one has handed over, or has not in time."""
    if _keeps_messages():
        get_hub().expect(line)
        await ready()
    else:
        line.close()


def _keeps_messages() -> bool:
    return bool(_channels.patterns()) and get_hub().broker is None


async def stop() -> None:
    """For the server, when nothing is served any more: what waits for the broker is published, and its threads end."""
    if _keeps_messages() and (path := os.environ.get(KEPT)):
        get_hub().save(path)
    await _hub.aclose(get_config().COMET.PUBLISH_TIMEOUT)


def status() -> dict[str, Any]:
    """Numbers of this process: broker, channels, messages and bytes kept, published in all, polls parked."""
    return get_hub().status()
