"""From what is published to what goes to the broker: named, encoded once, sized, and held back until the commit."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

from django.core.serializers.json import DjangoJSONEncoder
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from tornjango import green
from tornjango.comet import channels
from tornjango.comet.brokers.base import Draft
from tornjango.comet.hub import REVOKED, get_hub
from tornjango.comet.log import Audience, Channel, Position
from tornjango.conf import get_config
from tornjango.exceptions import CometError, UnknownChannel

logger = logging.getLogger("tornjango.comet")


class Event(NamedTuple):
    """One of a batch; as the arguments of ``comet.publish``."""

    channel: str
    data: Any
    event: str | None = None
    users: Iterable[Any] | None = None
    groups: Iterable[str] | None = None


def publish(events: Iterable[Event], *, now: bool, wait: float | None) -> Position | None:
    drafts = [_draft(event) for event in events]
    return _send_or_hold(drafts, now, wait)


async def apublish(events: Iterable[Event], *, now: bool, wait: float | None) -> Position | None:
    drafts = [_draft(event) for event in events]
    connection = None if now else _connection_in_transaction()
    if connection is None:
        return await _send_and_wait(drafts, wait)
    connection.on_commit(partial(_send, drafts, wait))
    return None


def revoke(names: Iterable[str], *, now: bool, wait: float | None) -> Position | None:
    return _send_or_hold(_revocations(names), now, wait)


async def arevoke(names: Iterable[str], *, wait: float | None) -> Position | None:
    return await _send_and_wait(_revocations(names), wait)


def _revocations(names: Iterable[str]) -> list[Draft]:
    return [Draft(REVOKED, encode(REVOKED.name, _declared(name).name, None)) for name in names]


def _send_or_hold(drafts: Sequence[Draft], now: bool, wait: float | None) -> Position | None:
    connection = None if now else _connection_in_transaction()
    if connection is None:
        return _send(drafts, wait, now)
    connection.on_commit(partial(_send, drafts, wait))
    return None


def _send(drafts: Sequence[Draft], wait: float | None, now: bool = False) -> Position | None:
    """Waits for the broker where the caller can: in a thread, and in green code."""
    if not drafts:
        return None
    if green.active():
        return green.wait(_send_and_wait(drafts, wait))
    sent = get_hub().send(drafts, _patience(wait))
    if sent.done() or asyncio._get_running_loop() is None:
        return sent.result()
    if now:
        sent.add_done_callback(partial(_report, drafts))
        raise RuntimeError(
            "On an event loop, where a message is comes too late for publish(now=True): use await comet.apublish()."
        )
    sent.add_done_callback(partial(_report, drafts))
    return None


async def _send_and_wait(drafts: Sequence[Draft], wait: float | None) -> Position | None:
    """Cancelled, it has published all the same."""
    if not drafts:
        return None
    sent = get_hub().send(drafts, _patience(wait))
    if sent.done():
        return sent.result()
    try:
        return await asyncio.shield(asyncio.wrap_future(sent))
    except asyncio.CancelledError:
        sent.add_done_callback(partial(_report, drafts))
        raise


def _patience(wait: float | None) -> float:
    return get_config().COMET.PUBLISH_TIMEOUT if wait is None else wait


def _report(drafts: Sequence[Draft], sent: Future[Position]) -> None:
    """For what nobody waits for."""
    if (error := sent.exception()) is not None:
        names = ", ".join(sorted({draft.channel.name for draft in drafts}))
        logger.error("%d messages to %s were not published: %s", len(drafts), names, error)


def _draft(event: Event) -> Draft:
    target = _declared(event.channel)
    if event.channel.endswith(channels.COMPANION):
        raise CometError(
            f"{event.channel!r} tells who follows, and nothing else: publish to another channel."
        )
    body = encode(event.channel, event.data, event.event)
    _check_size(target, body)
    return Draft(target, body, _audience(event))


def _audience(event: Event) -> Audience | None:
    if event.users is None and event.groups is None:
        return None
    for given, what in ((event.users, "users"), (event.groups, "groups")):
        if isinstance(given, str):
            raise TypeError(f"{what}={given!r} must be a list of {what}, not a string.")
    users = frozenset(str(getattr(user, "pk", user)) for user in event.users or ())
    groups = frozenset(str(getattr(group, "name", group)) for group in event.groups or ())
    return Audience(users, groups)


def _declared(name: str) -> Channel:
    try:
        return channels.resolve(name).channel
    except UnknownChannel as error:
        declared = ", ".join(channels.patterns()) or "none"
        raise UnknownChannel(
            f"{error} Declare it with @comet.channel(...) in the channels.py of an installed app "
            f"(declared: {declared})."
        ) from None


def encode(channel: str, data: Any, event: str | None) -> bytes:
    """A message's body. Raises TypeError or ValueError for what is no JSON."""
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
