"""What clients publish: where a channel lets them, as often as they may, and as JSON.

The rate is counted in each process: for the user who is logged in, and else for the address, of IPv6 the /64 that one
subscriber has. Not for the session: whoever wanted more would send another cookie with each message.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import math
from collections import OrderedDict
from inspect import isawaitable
from typing import Any, NamedTuple, NoReturn

from asgiref.sync import sync_to_async
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.middleware.csrf import CsrfViewMiddleware
from django.views.decorators.csrf import csrf_exempt

from tornjango.comet import channels, publishing
from tornjango.comet.publishing import Event
from tornjango.comet.views import HEADERS, in_no_transaction, length_of, not_allowed
from tornjango.conf import get_config
from tornjango.exceptions import (
    ChannelForbidden,
    CometError,
    Overloaded,
    TooManyMessages,
)
from tornjango.rates import Bucket

logger = logging.getLogger("tornjango.comet")

#: Beside the message itself, in bytes: what it is wrapped in.
ROOM = 16 * 1024

#: Of an event's name, in characters.
MAX_EVENT_LENGTH = 100

#: Clients whose rate is remembered; the one that has been quiet for longest is forgotten first.
CLIENTS = 10_000

_IPV6_SUBSCRIBER = 64


class Refusal(NamedTuple):
    """What a client is told of an error. ``retry_after`` is in seconds, and 0 where trying again is of no use."""

    status: int
    reason: str
    retry_after: int = 0


def refusal(error: Exception) -> Refusal | None:
    """None for what is no refusal, but a fault."""
    if isinstance(error, TooManyMessages):
        return Refusal(error.status, str(error), error.retry_after)
    if isinstance(error, Overloaded):
        # The reason names servers and settings: it is for the log.
        logger.warning("A client of channels is answered 503: %s", error)
        reason = "The channels cannot be reached at the moment. Please try again later."
        return Refusal(503, reason, error.retry_after)
    if isinstance(error, CometError):
        return Refusal(error.status, str(error))
    if isinstance(error, PermissionDenied):
        return Refusal(403, str(error) or "This is forbidden.")
    if isinstance(error, Http404):
        return Refusal(404, "There is no such thing.")
    return None


async def publish_for(request: HttpRequest, channel: Any, data: Any, event: Any = None) -> None:
    """Publishes for a client, over whatever transport, now; returns when no later reader can miss the message.

    Raises CometError with what the client did wrong, ChannelForbidden where it may not publish, TooManyMessages,
    BrokerUnavailable, Overloaded, and what the channel's publisher raises.
    """
    if not isinstance(channel, str) or not isinstance(event, str | None):
        raise CometError('"channel" must be a string, and so must "event", where there is one.')
    if event is not None and len(event) > MAX_EVENT_LENGTH:
        raise CometError(f"The event's name is longer than {MAX_EVENT_LENGTH} characters.")
    match = channels.resolve(channel)
    await _count(request)
    await _authorise(request, match)
    try:
        await publishing.apublish([Event(channel, data, event)], now=True, wait=None)
    except ValueError as error:  # too large, or no text in Unicode
        raise CometError(f"This message cannot be published to {channel!r}.") from error


async def _authorise(request: HttpRequest, match: channels.Match) -> None:
    publisher = match.declaration.publisher
    name = match.channel.name
    if publisher is None:
        raise ChannelForbidden(f"Clients may not publish to the channel {name!r}.")
    answer: Any
    if channels.waits_on_loop(publisher):
        answer = publisher(request, **match.kwargs)
    else:
        answer = await sync_to_async(publisher)(request, **match.kwargs)
    # As for authorisers: a sync wrapper around an async function answers with a coroutine, too.
    if not (await answer if isawaitable(answer) else answer):
        raise ChannelForbidden(f"This request may not publish to the channel {name!r}.")


def load_json(text: str | bytes) -> Any:
    """Raises CometError for what is no JSON, or more deeply nested than can be read."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CometError("This is not JSON.") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")  # RFC 8259, 6


# Rates


class Rates:
    """How often each client may still publish."""

    def __init__(self, rate: float, clients: int = CLIENTS) -> None:
        self.rate = rate
        self._clients = clients
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, client: str) -> float:
        """0 where it may publish now; else in how many seconds it may."""
        bucket = self._buckets.pop(client, None) or Bucket(self.rate, max(self.rate, 1))
        self._buckets[client] = bucket
        if len(self._buckets) > self._clients:
            self._buckets.popitem(last=False)
        return bucket.take()


_rates = Rates(5)


async def _count(request: HttpRequest) -> None:
    global _rates
    rate = get_config().COMET.PUBLISHES_PER_SECOND
    if _rates.rate != rate:
        _rates = Rates(rate)
    if seconds := _rates.take(await _client(request)):
        raise TooManyMessages(
            f"No more than {rate:g} messages a second can be published.",
            retry_after=math.ceil(seconds),
        )


async def _client(request: HttpRequest) -> str:
    user = await request.auser() if hasattr(request, "auser") else None
    if user is not None and user.is_authenticated:
        return f"user {user.pk}"
    address = request.META.get("REMOTE_ADDR") or ""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # a Unix socket has none
        return address
    if parsed.version == 6 and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, _IPV6_SUBSCRIBER), strict=False))
    return address


# Over HTTP


@in_no_transaction
@csrf_exempt  # not of the check, but of Django's own word on a failure: a page
async def publish(request: HttpRequest) -> HttpResponse:
    """Publishes one message: a POST of ``channel``, ``event`` and ``data``, as a JSON object, or as a form with ``data`` in JSON.

    Answers ``{"published": true}``, or ``{"error": "..."}``: 400 for what is no message, 403 without a CSRF token (in
    ``X-CSRFToken``, or the form) and where the channel has no ``publisher``, or that says no, 404, 413, and 429 and 503
    with ``Retry-After``.
    """
    if request.method != "POST":
        return not_allowed(request, "publishing", "POST")
    most = get_config().COMET.MAX_MESSAGE + ROOM
    if (length := length_of(request)) > most:
        return _answer(Refusal(413, f"The request has {length} bytes; the most is {most}."))
    if (forged := await _csrf_failure(request)) is not None:
        return _answer(Refusal(403, forged))
    try:
        await publish_for(request, **_message(request))
    except Exception as error:
        told = refusal(error)
        if told is None:
            raise
        return _answer(told)
    return JsonResponse({"published": True}, headers=HEADERS)


def _message(request: HttpRequest) -> dict[str, Any]:
    if request.content_type == "application/json":
        message = load_json(request.body)
    else:
        message = {
            name: request.POST[name] for name in ("channel", "event") if name in request.POST
        }
        if "data" in request.POST:
            message["data"] = load_json(request.POST["data"])
    return checked(message)


def checked(message: Any) -> dict[str, Any]:
    """The arguments of `publish_for`. Raises CometError."""
    names = {"channel", "data", "event"}
    if not isinstance(message, dict) or not {"channel", "data"} <= message.keys() <= names:
        raise CometError('A message is an object with "channel", "data", and maybe "event".')
    return message


class _Csrf(CsrfViewMiddleware):
    """Answers with the reason for a refusal, and not with a page."""

    def _reject(self, request: HttpRequest, reason: str) -> str:
        return reason


async def _csrf_failure(request: HttpRequest) -> str | None:
    """Why this POST is taken for another site's: also where the project has no CsrfViewMiddleware."""
    csrf: Any = _Csrf(lambda request: HttpResponse())

    def check() -> str | None:
        csrf.process_request(request)
        reason: str | None = csrf.process_view(request, _checked, (), {})
        return reason

    # The secret may be in the session, and so in the database.
    return await sync_to_async(check)()


def _checked(request: HttpRequest) -> None:
    """In the place of a view that is not exempt."""


def _answer(told: Refusal) -> HttpResponse:
    headers = {"Retry-After": str(told.retry_after)} if told.retry_after else {}
    return JsonResponse({"error": told.reason}, status=told.status, headers=HEADERS | headers)
