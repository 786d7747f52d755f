"""One-row queries without HTTP: ``python -m bench.ways SECONDS WARM_UP`` prints what each way of this environment cost.

As many tasks as the load generator has connections ask at once, in one process, over eight connections to the database.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import django

from bench.project.fill import PKS

TASKS = 20
CONNECTIONS = 8


class Way(NamedTuple):
    name: str
    queries: int
    """That one call makes, beginning with the row it is called for."""
    call: Callable[[int], Awaitable[Any]]


@dataclasses.dataclass(frozen=True)
class Count:
    """What some calls of a way cost, of the whole process with all its threads."""

    way: str
    queries: int
    calls: int
    cpu: float
    seconds: float


async def count(way: Way, seconds: float) -> Count:
    """Raises ValueError at the first wrong row."""
    end = time.perf_counter() + seconds

    async def ask(task: int) -> int:
        for calls, pk in enumerate(itertools.cycle(PKS[task:])):
            if time.perf_counter() >= end:
                return calls
            found = await way.call(pk)
            if way.queries and found.pk != pk:
                raise ValueError(f"{way.name}: row {found.pk}, not {pk}")
        raise AssertionError("a cycle has no end")

    start, cpu = time.perf_counter(), time.process_time()
    calls = sum(await asyncio.gather(*map(ask, range(TASKS))))
    cpu, passed = time.process_time() - cpu, time.perf_counter() - start
    return Count(way.name, way.queries, calls, cpu, passed)


@asynccontextmanager
async def _request() -> AsyncIterator[None]:
    """What Django's ASGI handler has around a view: a thread of its own, and signals that open and close connections."""
    from asgiref.sync import ThreadSensitiveContext
    from django.core.signals import request_finished, request_started

    async with ThreadSensitiveContext():
        await request_started.asend(sender=None, scope={})
        yield
        await request_finished.asend(sender=None)


async def _empty(pk: int) -> None:
    async with _request():
        pass


async def _one(pk: int) -> Any:
    from bench.project.models import Blog

    async with _request():
        return await Blog.objects.aget(pk=pk)


async def _twenty(pk: int) -> Any:
    from bench.project.models import Blog

    async with _request():
        blogs = [await Blog.objects.aget(pk=pk + n) for n in range(20)]
    return blogs[0]


@asynccontextmanager
async def django_ways() -> AsyncIterator[list[Way]]:
    """Under the conditions of Django's ASGI handler; a request without a query is there to be taken off."""
    yield [Way("empty", 0, _empty), Way("one", 1, _one), Way("twenty", 20, _twenty)]


@asynccontextmanager
async def tornjango_ways() -> AsyncIterator[list[Way]]:
    from bench.project.models import Blog
    from tornjango import db
    from tornjango.db import pools

    by_pk = db.prepare(lambda pk: Blog.objects.filter(pk=pk))

    async def aget(pk: int) -> Blog:
        return await Blog.objects.aget(pk=pk)

    async def fetch(pk: int) -> Blog:
        return (await db.fetch(Blog.objects.filter(pk=pk)))[0]

    async def prepared(pk: int) -> Blog:
        return await by_pk.get(pk=pk)

    pools.open()
    try:
        await pools.connect()
        yield [Way("aget", 1, aget), Way("fetch", 1, fetch), Way("prepared", 1, prepared)]
    finally:
        await pools.close()


async def measure(seconds: float, warm_up: float) -> list[Count]:
    async with tornjango_ways() if find_spec("tornado") else django_ways() as ways:
        counts = []
        for way in ways:
            await count(way, warm_up)
            counts.append(await count(way, seconds))
        return counts


def run(work: Coroutine[Any, Any, list[Count]]) -> list[Count]:
    """On the loop that the server would have: uvicorn takes uvloop where it finds it."""
    factory = import_module("uvloop").new_event_loop if find_spec("uvloop") else None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)


def main(seconds: str, warm_up: str) -> None:
    os.environ["BENCH_CONNECTIONS"] = str(CONNECTIONS)
    django.setup()
    counts = run(measure(float(seconds), float(warm_up)))
    json.dump([dataclasses.asdict(one) for one in counts], sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
