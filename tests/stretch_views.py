"""What tests of sync middleware serve: middleware of every kind, and views that park behind it."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from asgiref.sync import markcoroutinefunction
from django.db import connection, transaction
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.template.response import TemplateResponse
from django.urls import path
from django.utils import translation
from django.utils.deprecation import MiddlewareMixin

from tests.views import gates, seen
from tornjango import DeferredResponse

local = threading.local()
stack = threading.local()
variable: contextvars.ContextVar[str] = contextvars.ContextVar("tests.variable", default="")

Answer = Callable[[HttpRequest], HttpResponse]


class Parked:
    """How many views are parked, and the most that ever were."""

    now = 0
    most = 0


def where() -> int:
    return threading.get_ident()


# Middleware


def plain(get_response: Answer) -> Answer:
    """Keeps nothing, and notes where it begins and ends."""

    def middleware(request: HttpRequest) -> HttpResponse:
        before = where()
        request.thread = before  # type: ignore[attr-defined]
        response = get_response(request)
        response["X-Same-Thread"] = str(where() == before)
        return response

    return middleware


def keeping(get_response: Answer) -> Answer:
    """As django-crum and its like: who asks is in a ``threading.local``, for models and logs to see."""

    def middleware(request: HttpRequest) -> HttpResponse:
        local.user = request.GET["user"]
        try:
            response = get_response(request)
            response["X-User"] = local.user
            return response
        finally:
            del local.user

    return middleware


def leaving(get_response: Answer) -> Answer:
    """Does not clean up after itself, and keeps only some users."""

    def middleware(request: HttpRequest) -> HttpResponse:
        if request.GET["user"] != "nobody":
            local.user = request.GET["user"]
        response = get_response(request)
        response["X-User"] = getattr(local, "user", "nobody")
        return response

    return middleware


def stacking(get_response: Answer) -> Answer:
    """Changes what is in a list that stays the same."""

    def middleware(request: HttpRequest) -> HttpResponse:
        users = vars(stack).setdefault("users", [])
        users.append(request.GET["user"])
        response = get_response(request)
        response["X-User"] = users.pop()
        return response

    return middleware


class Hooks(MiddlewareMixin):
    """As most third-party middleware is written: what one hook keeps, the view and the others see."""

    def process_request(self, request: HttpRequest) -> None:
        local.user = request.GET["user"]

    def process_view(self, request: HttpRequest, view: Any, args: Any, kwargs: Any) -> None:
        request.in_view_hook = local.user  # type: ignore[attr-defined]

    def process_exception(self, request: HttpRequest, exc: Exception) -> HttpResponse:
        return HttpResponse(f"mended for {local.user}: {exc}")

    def process_template_response(self, request: HttpRequest, response: Any) -> Any:
        response.context_data["user"] = (
            f"{local.user} in {where() == threading.main_thread().ident}"
        )
        return response

    def process_response(self, request: HttpRequest, response: HttpResponse) -> HttpResponse:
        response["X-User"] = local.user
        del local.user
        return response


def in_transaction(get_response: Answer) -> Answer:
    def middleware(request: HttpRequest) -> HttpResponse:
        with transaction.atomic():
            connection.ensure_connection()
            return get_response(request)

    return middleware


def carrying(get_response: Answer) -> Answer:
    """Context both ways: what it sets the view sees, and what the view sets it sees."""

    def middleware(request: HttpRequest) -> HttpResponse:
        variable.set(request.GET["user"])
        translation.activate(request.GET["language"])
        response = get_response(request)
        response["X-Variable"] = variable.get()
        response["X-Language"] = translation.get_language() or ""
        return response

    return middleware


def failing(get_response: Answer) -> Answer:
    def middleware(request: HttpRequest) -> HttpResponse:
        try:
            return get_response(request)
        finally:
            seen.append("finally")

    return middleware


def green(get_response: Answer) -> Answer:
    """For LOOP_MIDDLEWARE: queries before and after."""

    def middleware(request: HttpRequest) -> HttpResponse:
        with connection.cursor() as cursor:
            cursor.execute("select 1")
        response = get_response(request)
        with connection.cursor() as cursor:
            cursor.execute("select 2")
            response["X-Row"] = str(cursor.fetchone()[0])
        response["X-Thread"] = threading.current_thread().name
        return response

    return middleware


class AsyncOnly:
    sync_capable = False
    async_capable = True

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        response: HttpResponse = await self.get_response(request)
        response["X-Async-Only"] = threading.current_thread().name
        return response


# Views


async def park(request: HttpRequest) -> HttpResponse:
    variable.set(variable.get() + " in the view")
    language = translation.get_language() or ""
    Parked.now += 1
    Parked.most = max(Parked.most, Parked.now)
    gates["parked"].set()
    try:
        await gates["go"].wait()
    except asyncio.CancelledError:
        seen.append("cancelled")
        raise
    finally:
        Parked.now -= 1
    if "fail" in request.GET:
        raise ValueError("in the view")
    return HttpResponse(f"{request.GET['user']} {language}".strip())


def deferred_park(request: HttpRequest, response: DeferredResponse) -> None:
    async def later() -> None:
        response.finish(await park(request))

    return later()  # type: ignore[return-value]


def sync(request: HttpRequest) -> HttpResponse:
    same = where() == getattr(request, "thread", None)
    return HttpResponse(f"{getattr(local, 'user', '')} {same}".strip())


def sync_fails(request: HttpRequest) -> HttpResponse:
    raise ValueError(getattr(local, "user", ""))


def template(request: HttpRequest) -> TemplateResponse:
    return TemplateResponse(request, "tests/user_data.html", {})


async def async_template(request: HttpRequest) -> TemplateResponse:
    return TemplateResponse(request, "tests/user_data.html", {})


async def stream(request: HttpRequest) -> StreamingHttpResponse:
    async def parts() -> AsyncIterator[str]:
        yield "one "
        await gates["go"].wait()
        yield "two"

    return StreamingHttpResponse(parts())


urlpatterns = [
    path("park/", park),
    path("deferred-park/", deferred_park),
    path("sync/", sync),
    path("sync-fails/", sync_fails),
    path("template/", template),
    path("async-template/", async_template),
    path("stream/", stream),
]
