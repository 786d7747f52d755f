"""COMET over HTTP: the long-poll and the event stream. Both speak of the same cursor, and of the same answer.

What a client names: ``channel``, repeated; ``cursor`` and ``grant``, of the answer before; ``client``, what it calls
itself; of a poll, ``wait=0``, to be answered at once, news or not. Of one that is given twice the last counts, and others
are passed over. A refusal is JSON: ``{"error": "..."}``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from django.core.handlers.wsgi import WSGIRequest
from django.db import connections, transaction
from django.http import HttpRequest, HttpResponse, JsonResponse, QueryDict, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.views.decorators.csrf import csrf_exempt

from tornjango import comet
from tornjango.comet import events
from tornjango.comet.readers import Reader
from tornjango.exceptions import CometError, Overloaded

logger = logging.getLogger("tornjango.comet")

#: Of a form that names channels, in bytes: it is parsed on the event loop.
MAX_FORM = 64 * 1024

# An answer is for one reader, once; and a proxy that collects it before passing it on would hold it back.
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

# What compresses holds back, too: a proxy (RFC 9111, 5.2.2.6), and until Django 6 its own GZipMiddleware, which keeps off
# what has an encoding. And each compressor has its window: it makes a stream take several times as much memory.
_STREAM_HEADERS = {
    **HEADERS,
    "Cache-Control": "no-store, no-transform",
    "Content-Encoding": "identity",
}

View = TypeVar("View", bound=Callable[..., Any])


def in_no_transaction(view: View) -> View:
    """With ATOMIC_REQUESTS, a parked request would keep the connection that its authoriser has asked."""
    for alias in connections:
        view = transaction.non_atomic_requests(using=alias)(view)
    return view


class _Asked(NamedTuple):
    channels: list[str]
    cursor: str | None
    grant: str | None
    client: str | None
    at_once: bool

    @classmethod
    def of(cls, fields: QueryDict) -> _Asked:
        one = fields.get
        at_once = one("wait") == "0"
        return cls(fields.getlist("channel"), one("cursor"), one("grant"), one("client"), at_once)


# A poll changes nothing, so it needs no CSRF token; and another site cannot read what it answers (CORS): JSON that is no
# script either. A site that wants that says so itself, in its middleware.
@in_no_transaction
@csrf_exempt
async def poll(request: HttpRequest) -> HttpResponse:
    """The long-poll: fields in the query of a GET, or in the form of a POST, for a long list of channels."""
    if request.method not in ("GET", "POST"):
        return not_allowed(request, "polls", "GET, POST")
    if (length := length_of(request)) > MAX_FORM:
        return refuse(413, f"The form has {length} bytes; the most is {MAX_FORM}.")
    asked = _Asked.of(request.GET if request.method == "GET" else request.POST)
    try:
        answer = await comet.wait(
            request,
            asked.cursor,
            *asked.channels,
            grant=asked.grant,
            client=asked.client,
            timeout=0 if asked.at_once else None,
        )
    except (CometError, Overloaded) as error:
        return _refuse_for(error)
    return HttpResponse(answer.json(), content_type="application/json", headers=HEADERS)


@in_no_transaction
async def sse(request: HttpRequest) -> HttpResponseBase:
    """The event stream: fields in the query of a GET; ``Last-Event-ID`` goes before ``cursor``."""
    if request.method != "GET":
        return not_allowed(request, "event streams", "GET")
    if isinstance(request, WSGIRequest):  # its server would wait for the end of it
        return refuse(501, "Under WSGI there are no event streams: poll, or serve with tornjango.")
    asked = _Asked.of(request.GET)
    # An EventSource that comes back has the cursor of its last event, and still the query of its first request.
    cursor = request.headers.get("Last-Event-ID") or asked.cursor
    try:
        reader = Reader(request, transport="sse", grant=asked.grant, client=asked.client)
        await reader.follow(asked.channels, cursor)
    except (CometError, Overloaded) as error:
        return _refuse_for(error)
    request.heeds_drain = True  # type: ignore[attr-defined]
    return StreamingHttpResponse(
        events.stream(reader), content_type="text/event-stream", headers=_STREAM_HEADERS
    )


def length_of(request: HttpRequest) -> int:
    try:
        return int(request.META.get("CONTENT_LENGTH") or 0)
    except ValueError:
        return 0


def _refuse_for(error: CometError | Overloaded) -> HttpResponse:
    if isinstance(error, Overloaded):
        return _refuse_for_now(error, error.retry_after)
    return refuse(error.status, str(error))


def _refuse_for_now(error: Exception, seconds: int) -> HttpResponse:
    # The reason names servers and settings: it is for the log.
    logger.warning("A reader of channels is answered 503: %s", error)
    reason = "The channels cannot be read at the moment. Please try again later."
    return refuse(503, reason, **{"Retry-After": str(seconds)})


def not_allowed(request: HttpRequest, what: str, methods: str) -> HttpResponse:
    reason = f"{request.method} is not for {what}; use {methods.replace(', ', ' or ')}."
    return refuse(405, reason, Allow=methods)


def refuse(status: int, reason: str, **headers: str) -> HttpResponse:
    return JsonResponse({"error": reason}, status=status, headers=HEADERS | headers)
