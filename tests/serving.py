"""Serves `tests.http_views` on the loop of a test."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from django.core.signals import request_finished, request_started
from django.test import override_settings

from tests import http_views, views
from tornjango.testing import LiveServer, RawClient, Response


class Site(LiveServer):
    async def connect(self) -> RawClient:
        return await RawClient.connect(self.port)

    async def request(self, target: str, **options: Any) -> Response:
        """One request on a connection of its own."""
        async with await self.connect() as client:
            return await client.request(target, **options)

    async def raw(self, data: bytes) -> bytes:
        """What is answered to ``data`` until the server closes the connection."""
        async with await self.connect() as client:
            await client.send(data)
            return await client.rest()


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Site]:
    """A server with these settings, and with all gates closed."""
    views.gates.update({name: asyncio.Event() for name in ("parked", "go", "closed")})
    views.Gone.event = asyncio.Event()
    views.seen.clear()
    http_views.thread_gates.update({name: threading.Event() for name in ("parked", "go", "closed")})
    with override_settings(**{"ROOT_URLCONF": "tests.http_views", **settings}):
        async with Site() as site:
            yield site


async def reached(event: threading.Event) -> None:
    """Waits for what another thread does, in a thread that is not the server's."""
    done = asyncio.get_running_loop().create_future()
    loop = asyncio.get_running_loop()

    def wait() -> None:
        event.wait(5)
        loop.call_soon_threadsafe(done.set_result, event.is_set())

    threading.Thread(target=wait).start()
    assert await done


async def until(condition: Callable[[], object]) -> None:
    """Lets the loop go round until something holds of which nothing tells."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


@contextmanager
def signals_seen() -> Iterator[list[str]]:
    """The names of the request signals, as somebody else's receivers see them."""
    names: list[str] = []

    def started(**kwargs: Any) -> None:
        names.append("started")

    def finished(**kwargs: Any) -> None:
        names.append("finished")

    request_started.connect(started)
    request_finished.connect(finished)
    try:
        yield names
    finally:
        request_started.disconnect(started)
        request_finished.disconnect(finished)
