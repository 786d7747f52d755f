"""Asks for pages and prints what stays: `python -m tests.request_memory COUNT`, with DJANGO_SETTINGS_MODULE set.

Async, deferred and sync views, a page rendered, a 404 and a stream, behind startproject's middleware, with the garbage
collector off. The first tenth is not counted: caches fill then.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys

import django
import psutil
from django.test import override_settings

PATHS = ("/status/200/", "/deferred/1/", "/sync/", "/rendered/", "/not-there/", "/streams-sync/")
CLIENTS = 4


async def ask(port: int, count: int) -> None:
    from tornjango.testing import RawClient

    async with await RawClient.connect(port) as client:
        for number in range(count):
            answer = await client.request(PATHS[number % len(PATHS)])
            assert answer.status in (200, 404)


async def main(count: int) -> None:
    from tests.serving import serving

    process = psutil.Process()
    async with serving() as site:
        for share in (count // 10, count - count // 10):
            before = process.memory_info().rss
            each = share // CLIENTS
            await asyncio.gather(*(ask(site.port, each) for _ in range(CLIENTS)))
        grown = process.memory_info().rss - before
        print(count, grown // 1024, before // 1024, process.num_threads())


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    django.setup()
    gc.disable()
    with override_settings(TORNJANGO={"THREADS": 4}):
        asyncio.run(main(int(sys.argv[1])))
