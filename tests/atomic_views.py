"""Views for databases with ATOMIC_REQUESTS."""

from __future__ import annotations

import asyncio
from typing import Any

from django.db import transaction
from django.http import Http404, HttpRequest, HttpResponse
from django.urls import path
from django.utils.deprecation import MiddlewareMixin
from django.views import View
from django.views.decorators.csrf import csrf_exempt

from tests.app.models import Blog, Entry
from tornjango import DeferredResponse, db, deferred
from tornjango.exceptions import Overloaded
from tornjango.views import green

#: What the tests wait for, and set.
gates: dict[str, asyncio.Event] = {}
#: What views saw.
seen: list[Any] = []


class Mends(MiddlewareMixin):
    """Answers for views that raise ValueError."""

    def process_exception(self, request: HttpRequest, exc: Exception) -> HttpResponse | None:
        return HttpResponse("mended", status=500) if isinstance(exc, ValueError) else None


def end(request: HttpRequest) -> HttpResponse:
    """As the query string says."""
    match request.GET.get("end"):
        case "error":
            raise ValueError("the view's end")
        case "404":
            raise Http404
        case "overloaded":
            raise Overloaded("full")
    return HttpResponse("done")


def sync(request: HttpRequest) -> HttpResponse:
    Blog.objects.create(name="sync")
    return end(request)


@green
def sync_green(request: HttpRequest) -> HttpResponse:
    Blog.objects.create(name="green")
    seen.append(transaction.get_connection().in_atomic_block)
    return end(request)


async def asynchronous(request: HttpRequest) -> HttpResponse:
    await Blog.objects.acreate(name="async")
    async with db.atomic():
        await Blog.objects.acreate(name="nested")
    await asyncio.gather(*(Blog.objects.acreate(name=name) for name in ("one", "two")))
    await db.query("insert into app_blog (name) values ('raw')")
    seen.append(len(await db.fetch(Blog.objects.all())))
    return end(request)


async def orphan(request: HttpRequest) -> HttpResponse:
    """The constraint is looked at when the transaction is committed."""
    await Entry.objects.acreate(title="orphan", blog_id=1_000_000)
    return HttpResponse("too early")


def by_callbacks(request: HttpRequest, response: DeferredResponse) -> None:
    async def done(rows: list[Blog]) -> None:
        await Blog.objects.acreate(name="callback")
        db.execute_async(Blog.objects.all(), counted)

    def counted(rows: list[Blog]) -> None:
        seen.append(len(rows))
        response.finish(end(request))

    db.query("insert into app_blog (name) values ('raw')").add_callback(
        lambda rows: db.execute_async(Blog.objects.all(), done)
    )


def many_at_once(request: HttpRequest, response: DeferredResponse) -> None:
    """Ends with the last of ten."""
    left = 10

    async def done(rows: list[Blog]) -> None:
        nonlocal left
        async with db.atomic():
            await Blog.objects.acreate(name="kept")
        async with db.atomic():
            await Blog.objects.acreate(name="dropped")
            transaction.set_rollback(True)
        left -= 1
        if not left:
            response.finish(end(request))

    for _ in range(10):
        db.execute_async(Blog.objects.all(), done)


def answers_early(request: HttpRequest, response: DeferredResponse) -> None:
    db.query("insert into app_blog (name) select 'slow' from pg_sleep(0.2)").add_callback(print)
    response.finish("early")


@deferred(timeout=0.3)
async def too_late(request: HttpRequest, response: DeferredResponse) -> None:
    await Blog.objects.acreate(name="late")
    db.query("select pg_sleep(60) /* too late */").add_callback(print)


async def parks(request: HttpRequest, response: DeferredResponse) -> None:
    await Blog.objects.acreate(name="parked")
    db.query("select pg_sleep(60) /* parked */").add_callback(print)
    gates["parked"].set()


async def parks_async(request: HttpRequest) -> HttpResponse:
    await Blog.objects.acreate(name="parked")
    gates["parked"].set()
    await asyncio.gather(*(_sleeps() for _ in range(3)))
    return HttpResponse("too late")


async def _sleeps() -> None:
    await db.query("select pg_sleep(60) /* parked */")


@transaction.non_atomic_requests
async def apart(request: HttpRequest) -> HttpResponse:
    await Blog.objects.acreate(name="apart")
    return end(request)


class Mixed(View):
    def get(self, request: HttpRequest, response: DeferredResponse) -> None:
        db.query("insert into app_blog (name) values ('get')").add_callback(
            lambda rows: response.fail(ValueError("in get"))
        )

    def post(self, request: HttpRequest) -> HttpResponse:
        Blog.objects.create(name="post")
        raise ValueError("in post")


urlpatterns = [
    path("sync/", sync),
    path("green/", sync_green),
    path("async/", asynchronous),
    path("orphan/", orphan),
    path("callbacks/", by_callbacks),
    path("many/", many_at_once),
    path("early/", answers_early),
    path("late/", too_late),
    path("parks/", parks),
    path("parks-async/", parks_async),
    path("apart/", apart),
    path("mixed/", csrf_exempt(Mixed.as_view())),
]
