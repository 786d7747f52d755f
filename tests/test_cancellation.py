from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View

from tests.http_views import thread_gates
from tests.serving import Site, reached, serving, signals_seen, until
from tests.views import gates, seen
from tornjango import DeferredResponse
from tornjango.views import Kind, cancel_on_disconnect, kind_of


class Response(HttpResponse):
    def close(self) -> None:
        seen.append("closed")
        super().close()


async def parked() -> HttpResponse:
    gates["parked"].set()
    try:
        await gates["go"].wait()
    except asyncio.CancelledError:
        seen.append("cancelled")
        raise
    seen.append("went")
    return Response("went")


async def by_setting(request: HttpRequest) -> HttpResponse:
    return await parked()


@cancel_on_disconnect(False)
async def to_its_end(request: HttpRequest) -> HttpResponse:
    return await parked()


@cancel_on_disconnect(True)
async def cancelled(request: HttpRequest) -> HttpResponse:
    return await parked()


@cancel_on_disconnect(False)
def deferred(request: HttpRequest, response: DeferredResponse) -> None:
    response.on_close(lambda: seen.append("told"))

    async def later() -> None:
        response.finish(await parked())

    return later()  # type: ignore[return-value]


@method_decorator(cancel_on_disconnect(False), name="dispatch")
class ToItsEnd(View):
    async def get(self, request: HttpRequest) -> HttpResponse:
        return await parked()


def sync(request: HttpRequest) -> HttpResponse:
    thread_gates["parked"].set()
    thread_gates["go"].wait(10)
    # The request is open still.
    seen.append(f"went {request.read()!r}")
    return Response("went")


urlpatterns = [
    path("by-setting/", by_setting),
    path("to-its-end/", to_its_end),
    path("cancelled/", cancelled),
    path("deferred/", deferred),
    path("class/", ToItsEnd.as_view()),
    path("sync/", sync),
]


def slow(get_response: Any) -> Any:
    """Middleware that is busy before and after."""

    def middleware(request: HttpRequest) -> HttpResponse:
        thread_gates["parked"].set()
        thread_gates["go"].wait(10)
        response: HttpResponse = get_response(request)
        return response

    return middleware


@asynccontextmanager
async def left(where: str, **settings: Any) -> AsyncIterator[Site]:
    """A site that was asked, by a client that left when its request was under way."""
    options = {"ROOT_URLCONF": __name__, "MIDDLEWARE": [], **settings}
    async with serving(**options) as site, await site.connect() as client:
        await client.send(f"GET /{where}/ HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        if where == "sync" or settings.get("MIDDLEWARE"):
            await reached(thread_gates["parked"])
        else:
            await gates["parked"].wait()
        (handler,) = site.application.in_flight
        client.abort()
        await until(handler._cut.done)
        yield site
        gates["go"].set()
        thread_gates["go"].set()
        await until(lambda: not site.application.in_flight)
        assert (await site.request("/by-setting/")).status == 200


@pytest.mark.parametrize(
    ("where", "setting", "runs_on"),
    [
        ("by-setting", True, False),
        ("by-setting", False, True),
        ("to-its-end", True, True),
        ("cancelled", False, False),
        ("deferred", True, True),
        ("class", True, True),
    ],
)
@pytest.mark.gen_test
async def test_whether_a_view_runs_on_when_its_client_leaves(
    where: str, setting: bool, runs_on: bool
) -> None:
    with signals_seen() as names:
        async with left(where, TORNJANGO={"CANCEL_ON_DISCONNECT": setting}) as site:
            if runs_on:
                assert seen == []
                gates["go"].set()
            await until(lambda: not site.application.in_flight)
            assert seen == (["went", "closed"] if runs_on else ["cancelled"])
            assert names == ["started", "finished"]


@pytest.mark.gen_test
async def test_a_view_that_is_to_run_on_is_cancelled_when_the_server_stops() -> None:
    async with serving(ROOT_URLCONF=__name__, TORNJANGO={"GRACEFUL_TIMEOUT": 0.01}) as site:
        client = await site.connect()
        await client.send(b"GET /to-its-end/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await gates["parked"].wait()
        client.abort()
    assert seen == ["cancelled"]


@pytest.mark.gen_test
async def test_a_sync_view_that_has_begun_gets_to_its_end_and_its_response_is_closed() -> None:
    with signals_seen() as names:
        async with left("sync") as site:
            assert site.application.in_flight
            assert names == ["started"]
            thread_gates["go"].set()
            await until(lambda: not site.application.in_flight)
            assert seen == ["went b''", "closed"]
            assert names == ["started", "finished"]


@pytest.mark.gen_test
async def test_a_sync_view_that_waits_for_a_thread_does_not_begin() -> None:
    async with serving(ROOT_URLCONF=__name__, MIDDLEWARE=[], TORNJANGO={"THREADS": 1}) as site:
        pool = site.application.workers.pool
        busy = pool.submit(thread_gates["go"].wait, 10)
        async with await site.connect() as client:
            await client.send(b"GET /sync/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await until(lambda: pool._unfinished == 2)
        await until(lambda: not site.application.in_flight)
        thread_gates["go"].set()
        assert busy.result()
        assert (await site.request("/sync/")).status == 200
        assert seen == ["went b''", "closed"]


@pytest.mark.gen_test
async def test_middleware_that_is_busy_when_the_client_leaves_gets_to_the_view_which_is_cancelled() -> (
    None
):
    async with left("by-setting", MIDDLEWARE=[f"{__name__}.slow"]) as site:
        thread_gates["go"].set()
        await until(lambda: not site.application.in_flight)
        assert seen == ["cancelled"]


@pytest.mark.gen_test
async def test_a_view_that_waits_behind_middleware_is_cancelled_when_its_client_leaves() -> None:
    thread_gates["go"] = threading.Event()
    options: Any = {"ROOT_URLCONF": __name__, "MIDDLEWARE": [f"{__name__}.slow"]}
    async with serving(**options) as site, await site.connect() as client:
        thread_gates["go"].set()
        await client.send(b"GET /by-setting/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await gates["parked"].wait()
        client.abort()
        await until(lambda: not site.application.in_flight)
        assert seen == ["cancelled"]


def test_a_marked_view_is_the_kind_that_it_was() -> None:
    assert kind_of(to_its_end) is Kind.ASYNC
    assert kind_of(deferred) is Kind.DEFERRED
    assert kind_of(cancel_on_disconnect(False)(sync)) is Kind.SYNC
    thread = cancel_on_disconnect(True)(lambda request: HttpResponse("called"))
    assert thread(RequestFactory().get("/")).content == b"called"
