"""What a request leaves behind: nothing that needs the garbage collector."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.contrib.auth.models import AnonymousUser
from django.http import HttpRequest, HttpResponse
from django.urls import path

from tests import views
from tests.serving import Site, serving, until
from tests.test_no_threads import MIDDLEWARE
from tornjango.testing import RawClient

PATHS = {
    "async": "/status/200/",
    "sync": "/sync/",
    "deferred": "/deferred/1/",
    "deferred-marked": "/marked/",
    "rendered": "/rendered/",
    "callback": "/sets-language/",
    "timed-out": "/never-ends/",
    "sync-stream": "/streams-sync/",
    "file": "/watched-file/?length=10",
    "not-found": "/not-there/",
    "redirected": "/redirected/",
    "session": "/session/",
    "raises": "/raises/",
    "raises-deferred": "/fails-in-view/",
    "raises-callback": "/fails-in-callback/",
}


@contextmanager
def garbage() -> Iterator[list[Any]]:
    """What only the collector would have found in the block; types and counts of it, at the end."""
    found: list[Any] = []
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        found.extend(gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def ended(site: Site) -> None:
    await until(lambda: not site.application.in_flight)


async def settle(site: Site, client: RawClient) -> None:
    """Asks for something else on the same connection: it has forgotten the request before, then."""
    await client.request("/status/204/")
    await ended(site)


@pytest.mark.parametrize(
    "middleware",
    [[], MIDDLEWARE, [*MIDDLEWARE, "tests.stretch_views.plain"]],
    ids=["bare", "django", "sync"],
)
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.gen_test
async def test_a_request_leaves_no_cycle(
    database: None, name: str, middleware: list[str], error_log: list[Any]
) -> None:
    async with serving(MIDDLEWARE=middleware) as site, await site.connect() as client:
        for _ in range(2):
            await client.request(PATHS[name])
            await settle(site, client)
        error_log.clear()
        with garbage() as found:
            await client.request(PATHS[name])
            error_log.clear()
            await settle(site, client)
        assert Counter(type(it).__qualname__ for it in found) == {}


@pytest.mark.parametrize("others", [[], ["tests.stretch_views.plain"]], ids=["django", "sync"])
@pytest.mark.parametrize("path", ["/parks-async/", "/parks/", "/streams/", "/sleeps-in-database/"])
@pytest.mark.gen_test
async def test_a_request_whose_client_has_left_leaves_no_cycle(
    path: str, others: list[str]
) -> None:
    async with serving(MIDDLEWARE=MIDDLEWARE + others) as site:

        async def leave() -> None:
            views.gates["parked"].clear()
            async with await site.connect() as client:
                await client.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                if path == "/streams/":
                    await client.head()
                else:
                    await views.gates["parked"].wait()
            await ended(site)

        await leave()
        with garbage() as found:
            await leave()
            await site.request("/status/204/")
        ours = [
            it for it in found if type(it).__module__.startswith(("tornjango", "django", "tests"))
        ]
        assert [repr(it) for it in ours] == []


class Kept:
    """What a view keeps of its request, for later."""

    request: Any


async def keeps(request: HttpRequest) -> HttpResponse:
    Kept.request = request
    return HttpResponse("kept")


urlpatterns = [path("keeps/", keeps)]


@pytest.mark.gen_test
async def test_a_request_that_is_kept_has_its_user_still(database: None) -> None:
    async with serving(ROOT_URLCONF=__name__, MIDDLEWARE=MIDDLEWARE) as site:
        assert (await site.request("/keeps/")).body == b"kept"
        await ended(site)
        assert isinstance(await Kept.request.auser(), AnonymousUser)
        assert Kept.request.user.is_anonymous
        del Kept.request
    async with serving(ROOT_URLCONF=__name__, MIDDLEWARE=[]) as site:
        await site.request("/keeps/")
        await ended(site)
        assert not hasattr(Kept.request, "user")
        del Kept.request


@pytest.mark.slow
def test_memory_does_not_grow_with_the_requests_that_were_answered(database: None) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.request_memory", "1200"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    _, grown, _, _ = map(int, run.stdout.split())
    assert grown < 3 * 1024  # KiB: one of each request that stays would be 20 KiB at least
