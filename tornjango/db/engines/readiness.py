from __future__ import annotations

import asyncio


async def ready(fd: int, *, write: bool) -> None:
    """Returns when the file can be written to, or else read from, without waiting."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    add = loop.add_writer if write else loop.add_reader
    remove = loop.remove_writer if write else loop.remove_reader
    add(fd, _set, future)
    try:
        await future
    finally:
        remove(fd)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
