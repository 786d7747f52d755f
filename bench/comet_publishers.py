"""A process of the project that only publishes: ``python -m bench.comet_publishers WAY ROOMS SECONDS``.

``WAY`` is tornjango, channels or eventstream. Prints how many messages it has published when the time is over: by
``TASKS`` at once, each of which publishes its next message when the broker has the one before.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Awaitable, Callable

import django

TASKS = 16


def _tornjango() -> Callable[[str, float], Awaitable[object]]:
    from tornjango import comet

    return lambda room, at: comet.apublish(room, {"at": at})


def _channels() -> Callable[[str, float], Awaitable[object]]:
    from bench.project.comet_peers import say

    return say


def _eventstream() -> Callable[[str, float], Awaitable[object]]:
    from django_eventstream import send_event

    return lambda room, at: asyncio.to_thread(send_event, room, "message", {"at": at})


WAYS = {"tornjango": _tornjango, "channels": _channels, "eventstream": _eventstream}


async def publish(say: Callable[[str, float], Awaitable[object]], rooms: int, until: float) -> int:
    numbers = itertools.count()
    counts = await asyncio.gather(*(_one(say, rooms, until, numbers) for _ in range(TASKS)))
    return sum(counts)


async def _one(
    say: Callable[[str, float], Awaitable[object]],
    rooms: int,
    until: float,
    numbers: itertools.count[int],
) -> int:
    published = 0
    while (now := time.monotonic()) < until:
        await say(f"room-{next(numbers) % rooms}", now)
        published += 1
    return published


if __name__ == "__main__":
    django.setup()
    way, rooms, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    print(asyncio.run(publish(WAYS[way](), rooms, time.monotonic() + seconds)), flush=True)
