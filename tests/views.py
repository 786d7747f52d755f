"""The views that tests ask for: one of every kind, and what can go wrong in each."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

from django.contrib.auth.decorators import login_required
from django.db import connection
from django.http import (
    FileResponse,
    HttpRequest,
    HttpResponse,
    JsonResponse,
    StreamingHttpResponse,
)
from django.utils import translation
from django.views import View
from tornado.web import RequestHandler
from tornado.websocket import WebSocketHandler

from tests.app.models import Blog, Entry
from tornjango import DeferredResponse, db, deferred
from tornjango.exceptions import Overloaded
from tornjango.shortcuts import arender

#: What views tell the tests that look at them from inside.
seen: list[Any] = []
#: Views park on these, and tests wake them; made anew by the fixture ``gates``.
gates: dict[str, asyncio.Event] = {}


class Gone:
    """Set when a parked view is cancelled."""

    event: asyncio.Event


def where() -> str:
    return threading.current_thread().name


def sync(request: HttpRequest, **kwargs: Any) -> HttpResponse:
    return JsonResponse({"kind": "sync", "thread": where(), "kwargs": kwargs})


async def asynchronous(request: HttpRequest, **kwargs: Any) -> HttpResponse:
    return JsonResponse({"kind": "async", "thread": where(), "kwargs": kwargs})


def by_name(request: HttpRequest, response: DeferredResponse, **kwargs: Any) -> None:
    response.json({"kind": "deferred", "thread": where(), "kwargs": kwargs})


@deferred
def marked(request: HttpRequest, answer: DeferredResponse, **kwargs: Any) -> None:
    answer.json({"kind": "deferred", "thread": where(), "kwargs": kwargs})


async def async_deferred(request: HttpRequest, response: DeferredResponse) -> None:
    await asyncio.sleep(0)
    response.json({"kind": "deferred", "thread": where()})


def group_named_response(request: HttpRequest, response: str) -> HttpResponse:
    return JsonResponse({"kind": "sync", "thread": where(), "response": response})


class Mixed(View):
    """Deferred where it waits, sync where it does not."""

    def get(self, request: HttpRequest, response: DeferredResponse, pk: int) -> None:
        response.json({"kind": "deferred", "thread": where(), "pk": pk})

    def post(self, request: HttpRequest, pk: int) -> HttpResponse:
        return JsonResponse({"kind": "sync", "thread": where(), "pk": pk})


class OwnHead(View):
    def get(self, request: HttpRequest, response: DeferredResponse) -> None:
        response.finish("got")

    def head(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(headers={"X-Head": where()})


class Marked(View):
    @deferred
    def get(self, request: HttpRequest, response: DeferredResponse) -> None:
        response.json({"kind": "deferred", "thread": where()})

    async def post(self, request: HttpRequest) -> HttpResponse:
        return JsonResponse({"kind": "async", "thread": where()})


@login_required
def turned_away(request: HttpRequest, response: DeferredResponse) -> None:
    response.finish("for members")


# What a deferred response can do


def dressed(request: HttpRequest, response: DeferredResponse) -> None:
    response.status_code = 201
    response["X-Header"] = "yes"
    response.set_cookie("a", "1")
    response.delete_cookie("b")
    response.write("one ")
    response.write(b"two")
    response.finish(" three")


def rendered(request: HttpRequest, response: DeferredResponse) -> None:
    response.render("tests/entries.html", {"entries": Entry.objects.order_by("pk")})


def redirected(request: HttpRequest, response: DeferredResponse) -> None:
    response.set_cookie("a", "1")
    response.redirect("sync-named", pk=7)


def sent_file(request: HttpRequest, response: DeferredResponse) -> None:
    response["X-Header"] = "yes"
    response.send_file(request.GET["path"], as_attachment="attach" in request.GET)


def finishes_twice(request: HttpRequest, response: DeferredResponse) -> None:
    response.finish("one")
    response.finish("two")


def fails_in_view(request: HttpRequest, response: DeferredResponse) -> None:
    raise ValueError("in the view")


def fails_in_callback(request: HttpRequest, response: DeferredResponse) -> None:
    def done(rows: Any) -> None:
        raise ValueError("in the callback")

    db.query("select 1").add_callback(done)


def fails_by_hand(request: HttpRequest, response: DeferredResponse) -> None:
    response.fail(ValueError("by hand"))


@deferred(timeout=0.05)
def never_ends(request: HttpRequest, response: DeferredResponse) -> None:
    pass


def returns_nonsense(request: HttpRequest, response: DeferredResponse) -> Any:
    return "a string"


def parks(request: HttpRequest, response: DeferredResponse) -> None:
    response.on_close(Gone.event.set)
    gates["parked"].set()


async def parks_async(request: HttpRequest) -> HttpResponse:
    gates["parked"].set()
    try:
        await gates["go"].wait()
    except asyncio.CancelledError:
        Gone.event.set()
        raise
    return HttpResponse("went")


def sleeps_in_database(request: HttpRequest, response: DeferredResponse) -> None:
    db.query("select pg_sleep(60) /* slept in */").add_callback(lambda rows: response.finish())
    gates["parked"].set()


def sets_language(request: HttpRequest, response: DeferredResponse) -> None:
    translation.activate("de")

    def done(rows: Any) -> None:
        response.finish(translation.get_language() or "")

    db.query("select 1").add_callback(done)


def overloaded(request: HttpRequest) -> HttpResponse:
    raise Overloaded("the queue is full", retry_after=3)


# What a request can bring, and a response take


async def echo(request: HttpRequest) -> HttpResponse:
    names = ("method", "path", "path_info", "scheme")
    about: dict[str, Any] = {name: getattr(request, name) for name in names}
    meta = {k: v for k, v in request.META.items() if isinstance(v, str)}
    about |= {"META": meta, "GET": dict(request.GET.lists()), "COOKIES": request.COOKIES}
    return JsonResponse(about)


async def body(request: HttpRequest) -> HttpResponse:
    return HttpResponse(request.body)


async def form(request: HttpRequest) -> HttpResponse:
    files = {name: [f.name, f.size] for name, f in request.FILES.items()}
    return JsonResponse({"POST": dict(request.POST.lists()), "FILES": files})


async def streams_async(request: HttpRequest) -> StreamingHttpResponse:
    async def parts() -> AsyncIterator[bytes]:
        try:
            yield b"one "
            await gates["go"].wait()
            yield b"two"
        finally:
            seen.append("closed")

    return StreamingHttpResponse(parts())


def streams_sync(request: HttpRequest) -> StreamingHttpResponse:
    def parts() -> Iterator[bytes]:
        try:
            for number in range(int(request.GET.get("parts", 3))):
                seen.append(where())
                yield f"{number} ".encode() * int(request.GET.get("times", 1))
        finally:
            seen.append("closed")

    return StreamingHttpResponse(parts())


def file(request: HttpRequest) -> FileResponse:
    return FileResponse(open(request.GET["path"], "rb"))


async def status(request: HttpRequest, code: int) -> HttpResponse:
    return HttpResponse("content", status=code)


async def cookies(request: HttpRequest) -> HttpResponse:
    response = HttpResponse()
    response.set_cookie("a", "1")
    response.set_cookie("b", "2", httponly=True)
    return response


def session(request: HttpRequest) -> HttpResponse:
    request.session["count"] = request.session.get("count", 0) + 1
    return HttpResponse(str(request.session["count"]))


async def language(request: HttpRequest) -> HttpResponse:
    return HttpResponse(translation.get_language() or "")


class Plain(RequestHandler):
    """A Tornado handler among URL patterns."""

    def initialize(self, greeting: str = "hello") -> None:
        self.greeting = greeting

    def get(self, name: str) -> None:
        self.write(f"{self.greeting} {name}")


class Socket(WebSocketHandler):
    def on_message(self, message: str | bytes) -> None:
        self.write_message(message)


def user(request: HttpRequest, response: DeferredResponse) -> None:
    response.render("tests/user.html")


async def user_async(request: HttpRequest) -> HttpResponse:
    return await arender(request, "tests/user.html")


def creates_and_fails(request: HttpRequest) -> HttpResponse:
    Blog.objects.create(name="to be rolled back")
    if connection.in_atomic_block:
        seen.append("created in a transaction")
    raise ValueError("created")
