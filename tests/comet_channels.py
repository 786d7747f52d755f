"""Channels for the tests, declared once; every test publishes to names of its own."""

from __future__ import annotations

import asyncio
from typing import Any

from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest

from tornjango import comet


@comet.channel("open:<str:name>")
async def open_to_all(request: HttpRequest, name: str) -> bool:
    return True


@comet.channel("short:<str:name>", history=3)
async def short_history(request: HttpRequest, name: str) -> bool:
    return True


@comet.channel("small:<str:name>", max_bytes=300)
async def small_history(request: HttpRequest, name: str) -> bool:
    return True


@comet.channel("number:<int:number>")
def even_only(request: HttpRequest, number: int) -> bool:
    return number % 2 == 0


@comet.channel("header:<str:secret>")
async def by_header(request: HttpRequest, secret: str) -> bool:
    return request.headers.get("Secret") == secret


@comet.channel("raises:<str:name>")
def raising(request: HttpRequest, name: str) -> bool:
    raise {"missing": Http404, "denied": PermissionDenied, "broken": ZeroDivisionError}[name]


@comet.channel("wrapped:<str:answer>")
def wrapped(request: HttpRequest, answer: str) -> Any:
    """As a decorator that knows nothing of coroutines would leave it."""
    return open_if_yes(answer)


async def open_if_yes(answer: str) -> bool:
    return answer == "yes"


class ByInstance:
    async def __call__(self, request: HttpRequest, answer: str) -> bool:
        return answer == "yes"


comet.channel("instance:<str:answer>")(ByInstance())


async def until_parked(count: int) -> None:
    """Returns once so many readers wait; there is no event for what this watches."""
    while comet.status()["parked"] < count:  # noqa: ASYNC110
        await asyncio.sleep(0)


def by_name(request: HttpRequest, name: str) -> bool:
    """Sync, as what queries the database may be."""
    return name != "silent"


async def of_the_user(request: HttpRequest, name: str) -> bool:
    return (await request.auser()).get_username() == name


comet.channel("chat:<str:name>", publisher=by_name)(open_to_all)
comet.channel("own:<str:name>", publisher=of_the_user)(of_the_user)
comet.channel("wrapped-chat:<str:answer>", publisher=wrapped)(wrapped)
comet.channel("raising-chat:<str:name>", publisher=raising)(open_to_all)

#: Opened by a test: until then the authoriser of "slow" thinks.
thinking: dict[str, asyncio.Event] = {}


@comet.channel("slow:<str:name>")
async def slow(request: HttpRequest, name: str) -> bool:
    await thinking[name].wait()
    return True
