"""Streams a million rows and prints what it took: `python -m tests.stream_memory`, with DJANGO_SETTINGS_MODULE set."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import django
import psutil

ROWS = 1_000_000
WARM = 20_000


async def main() -> None:
    from tests.app.models import Blog
    from tests.database import opened
    from tornjango import db

    def rows(number: int) -> Any:
        return Blog.objects.raw(
            "select n as id, 'Blog number ' || n as name from generate_series(1, %s) n", [number]
        )

    process = psutil.Process()
    async with opened():
        async for _ in db.stream(rows(WARM)):
            pass
        before = process.memory_info().rss
        started, count, most = time.monotonic(), 0, 0
        async for blog in db.stream(rows(ROWS)):
            count += 1
            assert blog.pk == count
            if not count % 50_000:
                most = max(most, process.memory_info().rss)
        print(count, (most - before) // 1024, f"{time.monotonic() - started:.1f}")


if __name__ == "__main__":
    django.setup()
    asyncio.run(main())
