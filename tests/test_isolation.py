"""What one request leaves behind no other finds: neither the next one on its connection, nor those beside it."""

from __future__ import annotations

import asyncio
import contextvars
import json
from typing import Any

import pytest
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import get_script_prefix, get_urlconf, path, set_script_prefix, set_urlconf
from django.utils import timezone, translation

from tests.serving import serving
from tests.test_no_threads import MIDDLEWARE
from tornjango import DeferredResponse
from tornjango.testing import RawClient
from tornjango.views import green

variable: contextvars.ContextVar[str] = contextvars.ContextVar("isolated", default="clean")
CLEAN = {
    "variable": "clean",
    "language": "en-us",
    "zone": "Europe/Berlin",
    "prefix": "/",
    "urlconf": __name__,
}


def found() -> dict[str, Any]:
    return {
        "variable": variable.get(),
        "language": translation.get_language(),
        "zone": timezone.get_current_timezone_name(),
        "prefix": get_script_prefix(),
        "urlconf": get_urlconf(),
    }


def dirtied() -> dict[str, Any]:
    """What is found, before all of it is changed."""
    before = found()
    variable.set("dirty")
    translation.activate("de")
    timezone.activate("Asia/Tokyo")
    set_script_prefix("/dirty/")
    set_urlconf("tests.other_urls")
    return before


def sync(request: HttpRequest) -> HttpResponse:
    return JsonResponse(dirtied())


green_view = green(sync)


async def asynchronous(request: HttpRequest) -> HttpResponse:
    answer = JsonResponse(dirtied())
    await asyncio.sleep(0)
    assert found()["variable"] == "dirty"
    return answer


def deferred(request: HttpRequest, response: DeferredResponse) -> None:
    response.json(dirtied())


def middleware(get_response: Any) -> Any:
    """Sync, and as careless as the views."""

    def call(request: HttpRequest) -> HttpResponse:
        before = dirtied()
        set_urlconf(__name__)
        response: HttpResponse = get_response(request)
        response["X-Before"] = json.dumps(before)
        return response

    return call


urlpatterns = [
    path("sync/", sync),
    path("green/", green_view),
    path("async/", asynchronous),
    path("deferred/", deferred),
]
PATHS = ["/sync/", "/green/", "/async/", "/deferred/"]


async def ask(port: int) -> None:
    async with await RawClient.connect(port) as client:
        for _ in range(3):
            for target in PATHS:
                answer = await client.request(target)
                before = answer.header("X-Before")
                assert json.loads(before or answer.body) == CLEAN, target


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("others", [[], [f"{__name__}.middleware"]], ids=["django", "sync"])
@pytest.mark.gen_test
async def test_a_request_finds_nothing_of_another(threads: int, others: list[str]) -> None:
    options: Any = {"MIDDLEWARE": MIDDLEWARE[3:4] + others, "TORNJANGO": {"THREADS": threads}}
    async with serving(ROOT_URLCONF=__name__, **options) as site:
        await asyncio.gather(*(ask(site.port) for _ in range(4)))
    assert found() == {**CLEAN, "urlconf": None}
