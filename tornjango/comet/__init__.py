"""Channels that pages follow: whoever comes back with its cursor misses nothing and sees nothing twice, or is told of a gap.

@comet.channel("entry:<int:pk>")            # in the channels.py of an app
async def can_read(request, pk):
    return True

comet.publish("entry:7", {"text": "Hello"})  # in any view, thread or command
path("comet/", include("tornjango.comet.urls"))
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from django.core.serializers.json import DjangoJSONEncoder
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.http import HttpRequest

from tornjango.comet import channels as _channels
from tornjango.comet import cursors as _cursors
from tornjango.comet.brokers.base import Broker
from tornjango.comet.brokers.memory import MemoryBroker
from tornjango.comet.channels import channel
from tornjango.comet.log import Channel, Message, Position, Reading
from tornjango.comet.waiters import Waiters
from tornjango.conf import get_config
from tornjango.exceptions import (
    ChannelForbidden,
    CometError,
    InvalidCursor,
    UnknownChannel,
)

__all__ = [
    "Answer",
    "ChannelForbidden",
    "CometError",
    "InvalidCursor",
    "Message",
    "UnknownChannel",
    "channel",
    "cursor",
    "drain",
    "publish",
    "status",
    "wait",
]

# One answer's messages together: a hundred of the largest would be six megabytes, times every reader.
_ANSWER_BYTES = 512 * 1024

# Readers that came together (a deploy, a network that is back) should not time out together for ever.
_EARLIEST_TIMEOUT = 0.9

_waiters = Waiters()


@cache
def get_broker() -> Broker:
    """The process's broker, made at first use."""
    return MemoryBroker(_waiters.notify, max_channels=get_config().COMET.MAX_CHANNELS)


if hasattr(os, "register_at_fork"):
    # Two processes that went on numbering under one epoch would take each other's cursors for their own.
    os.register_at_fork(after_in_child=get_broker.cache_clear)


@dataclass(frozen=True, slots=True)
class Answer:
    """What ``wait`` brings: messages in order, and the cursor to come back with.

    ``gaps`` names the channels that have lost messages this reader has not seen: fetch their state afresh. ``more`` says
    that further messages are there at once, ``retry`` in how many milliseconds to come back: 0 but when the server stops.
    """

    messages: list[Message]
    cursor: str
    gaps: list[str]
    more: bool
    retry: int

    def json(self) -> bytes:
        """The answer as the browser client takes it; messages are not encoded again."""
        return b'{"messages":[%s],"cursor":%s,"gaps":%s,"more":%s,"retry":%d}' % (
            b",".join([message.body for message in self.messages]),
            json.dumps(self.cursor).encode(),
            json.dumps(self.gaps).encode(),
            b"true" if self.more else b"false",
            self.retry,
        )


def publish(channel: str, data: Any, event: str | None = None, *, now: bool = False) -> None:
    """Sends ``data`` to everyone who follows ``channel``; from any thread, with or without an event loop.

    Inside ``transaction.atomic``, or ``async with db.atomic()``, the message goes out when the transaction commits, and
    never if it is rolled back (which includes tests in a ``TestCase``, as for ``on_commit``); with ``now=True``, or
    outside a transaction, at once. ``data`` is anything that DjangoJSONEncoder takes, encoded here and now;
    ``event`` is a short name that readers get beside it.

    Raises UnknownChannel if no declared pattern matches, TypeError or ValueError if ``data`` is no JSON, ValueError if it
    is larger than the channel or ``TORNJANGO["COMET"]["MAX_MESSAGE"]`` allows.
    """
    target = _declared(channel)
    body = _encode(channel, data, event)
    _check_size(target, body)
    send = partial(get_broker().publish, target, body)
    connection = None if now else _connection_in_transaction()
    if connection is None:
        send()
    else:
        connection.on_commit(send)


def _declared(name: str) -> Channel:
    try:
        return _channels.resolve(name).channel
    except UnknownChannel as error:
        declared = ", ".join(_channels.patterns()) or "none"
        raise UnknownChannel(
            f"{error} Declare it with @comet.channel(...) in the channels.py of an installed app "
            f"(declared: {declared})."
        ) from None


def _encode(channel: str, data: Any, event: str | None) -> bytes:
    if not isinstance(event, str | None):
        raise TypeError(f"The event published to {channel!r} must be a string, not {event!r}.")
    message = {"channel": channel, "event": event, "data": data}
    try:
        return json.dumps(
            message,
            cls=DjangoJSONEncoder,
            allow_nan=False,
            ensure_ascii=False,
            separators=(",", ":"),
        ).encode()
    except TypeError as error:
        raise TypeError(f"The data published to {channel!r} is not JSON: {error}.") from error
    except ValueError as error:
        raise ValueError(f"The data published to {channel!r} is not JSON: {error}.") from error


def _check_size(target: Channel, body: bytes) -> None:
    most = min(get_config().COMET.MAX_MESSAGE, target.limits.max_bytes)
    if len(body) > most:
        raise ValueError(
            f"The message for {target.name!r} has {len(body)} bytes as JSON; the most is {most}. "
            "Publish where the data is to be found instead, "
            'or raise TORNJANGO["COMET"]["MAX_MESSAGE"] and the channel\'s max_bytes.'
        )


def _connection_in_transaction() -> BaseDatabaseWrapper | None:
    # Asks only connections that are there, and only for a flag: so this opens nothing, and is safe on the event loop.
    opened = connections.all(initialized_only=True)
    return next((connection for connection in opened if connection.in_atomic_block), None)


def cursor(*channels: str) -> str:
    """A cursor at the present end of these channels; from any thread.

    Take it before the queries whose result a page shows: the page then follows with it, and nothing that is published
    between is lost. Raises UnknownChannel, or CometError for none or too many channels.
    """
    wanted = [match.channel for match in _channels.resolve_all(channels)]
    return _cursors.encode(get_broker().ends(wanted))


async def wait(
    request: HttpRequest | None,
    cursor: str | None,
    *channels: str,
    timeout: float | None = None,  # noqa: ASYNC109 (its end is an answer, not a cancellation)
) -> Answer:
    """Waits until something is published to one of the channels, after the cursor.

    Returns at once if there is news already; with empty ``messages`` after ``timeout`` seconds (by default
    ``TORNJANGO["COMET"]["POLL_TIMEOUT"]``, less a random bit), or when the server is stopping. In every case
    ``answer.cursor`` is what to come back with. A channel that the cursor does not name, or any without a cursor, starts
    now, and the answer comes at once: only a reader that holds a cursor can wait without risk of losing anything.

    Every channel's authoriser is asked about ``request``; with None the caller vouches. Raises UnknownChannel,
    ChannelForbidden, InvalidCursor, and CometError for none or too many channels.
    """
    matches = _channels.resolve_all(channels)
    wanted = {match.channel.name: match.channel for match in matches}
    known = _cursors.decode(cursor, wanted) if cursor else {}
    # Before anything is awaited: what is published while an authoriser thinks belongs to the answer.
    since = _since(wanted, known)
    if request is not None:
        await _channels.authorise(request, matches)
    if len(known) < len(wanted):
        timeout = 0
    elif timeout is None:
        timeout = get_config().COMET.POLL_TIMEOUT * random.uniform(_EARLIEST_TIMEOUT, 1)
    reading = await _read_or_park(since, asyncio.get_running_loop().time() + timeout)
    return Answer(
        reading.messages,
        _cursors.encode(reading.positions),
        reading.gaps,
        reading.more,
        _waiters.retry(),
    )


def _since(wanted: Mapping[str, Channel], known: Mapping[str, Position]) -> dict[Channel, Position]:
    ends = get_broker().ends(channel for name, channel in wanted.items() if name not in known)
    return {channel: known.get(name) or ends[name] for name, channel in wanted.items()}


async def _read_or_park(since: Mapping[Channel, Position], deadline: float) -> Reading:
    loop = asyncio.get_running_loop()
    # Registered first, read second: what is published between the two is read, what comes after wakes.
    with _waiters.registered([channel.name for channel in since]) as waiter:
        reading = await _read(since)
        while not (reading.has_news or _waiters.draining) and loop.time() < deadline:
            await waiter.wait(deadline)
            # After a time-out too, for its cursor: it stands at the present then.
            reading = await _read(since)
        return reading


async def _read(since: Mapping[Channel, Position]) -> Reading:
    count = get_config().COMET.MESSAGES_PER_POLL
    return await get_broker().read(since, count=count, size=_ANSWER_BYTES)


def drain() -> int:
    """Answers every poll parked on the running event loop, with its cursor and a spread-out ``retry``.

    New ones on this loop are answered at once from then on. Returns at once, with how many were parked; their answers
    leave in the next turns of the loop. Raises RuntimeError outside a running loop.
    """
    return _waiters.drain()


def status() -> dict[str, Any]:
    """Numbers of this process: broker, channels, messages and bytes kept, published in all, polls parked."""
    broker = get_broker()
    return {"broker": broker.name, **broker.status(), "parked": _waiters.count()}
