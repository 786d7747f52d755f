"""What goes on in all the processes of a project, for the page that shows it (``tornjango.status.urls``).

Each process tells of itself on a COMET channel, and only while somebody looks: the process that has a reader of that
channel asks, every two seconds, and all answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import secrets
import time
from collections.abc import Iterator
from typing import Any

from django.http import HttpRequest

from tornjango import comet
from tornjango.comet import channels
from tornjango.comet.brokers.base import Draft
from tornjango.comet.hub import Hub, get_hub
from tornjango.comet.log import Channel, Limits, Message
from tornjango.comet.publishing import encode
from tornjango.monitoring import Monitor

#: The channel of the reports, which staff may follow; `declare` makes it one.
CHANNEL = "tornjango:status"

#: How often those who look ask, in seconds, and how often a process answers at most.
EVERY = 2.0
SELDOM = 0.5

#: Channels that a report names: those with the newest messages.
CHANNELS = 15

_ASKED = Channel(f"{channels.INTERNAL}status", Limits(history=1, ttl=10, max_bytes=4096))


def declare() -> None:
    """Makes `CHANNEL` a channel, once; the URLs of the page do, so each process of the project has it."""
    if CHANNEL not in channels.patterns():
        comet.channel(CHANNEL, history=100, ttl=30)(is_staff)


async def is_staff(request: HttpRequest) -> bool:
    """Whether the page, and its channel, are for who sends this request."""
    user: Any = await request.auser() if hasattr(request, "auser") else None
    return user is not None and user.is_active and user.is_staff


def ask(hub: Hub) -> None:
    """Has every process report, within moments."""
    hub.send([Draft(_ASKED, encode(_ASKED.name, None, None))], EVERY)


@contextlib.contextmanager
def reporting(monitor: Monitor) -> Iterator[None]:
    """Inside, this process answers who asks for reports, if the project has the page; on the running event loop."""
    if CHANNEL not in channels.patterns():
        yield
        return
    reporter = Reporter(monitor)
    try:
        yield
    finally:
        reporter.close()


class Reporter:
    """This process's part in the page."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._hub = get_hub()
        self._loop = asyncio.get_running_loop()
        self._began = time.monotonic()
        self._last = 0.0
        self._id = secrets.token_hex(4)
        self._hub.listen(_ASKED, self._asked)
        self._timer = self._loop.call_later(EVERY, self._look)

    def close(self) -> None:
        self._timer.cancel()
        self._hub.unlisten(_ASKED, self._asked)

    def _look(self) -> None:
        """Asks, where this process has readers of the reports."""
        self._timer = self._loop.call_later(EVERY, self._look)
        if self._hub.waiters.count_of(CHANNEL):
            ask(self._hub)

    def _asked(self, message: Message) -> None:
        self._loop.call_soon_threadsafe(self._report)

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._last >= SELDOM:
            self._last = now
            comet.publish(CHANNEL, self.report(), now=self._hub.broker is None)

    def report(self) -> dict[str, Any]:
        return {
            **self._monitor.status(),
            "id": self._id,
            "host": platform.node(),
            "pid": os.getpid(),
            "uptime": round(time.monotonic() - self._began, 1),
            "every": EVERY,
            "newest": self._hub.newest(CHANNELS),
        }
