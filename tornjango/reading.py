"""Open files, read a piece at a time without holding up the event loop."""

from __future__ import annotations

import asyncio
import io
import os
import stat
from collections.abc import Callable
from typing import Any

from asgiref.sync import sync_to_async

#: What is read at a time, on the loop and in a thread, in bytes. A client that takes it slowly costs that much memory; a
#: thread costs ten times as much CPU as 64 KiB that are in memory do.
AT_HAND = 64 * 1024
ASIDE = 256 * 1024

#: Linux: read what is in the page cache, and fail where the disk would have to be waited for.
_NO_WAIT: int | None = getattr(os, "RWF_NOWAIT", None)


class Reader:
    """Reads an open file from where it stands: on the loop what the system has in memory, the rest in worker threads."""

    def __init__(self, file: Any, *, skip: int = 0, length: int | None = None) -> None:
        """``skip`` bytes are passed over, for which ``file`` has to be seekable; ``length`` bytes are read, or all."""
        self._file = file
        self._skip = skip
        self._left = length
        source = _source(file)
        self._in_memory = type(source) is io.BytesIO
        self._descriptor = None if _NO_WAIT is None else _descriptor(source)
        self._position = 0 if self._descriptor is None else file.tell() + skip

    async def read(self) -> bytes:
        """The next bytes; empty at the end. Raises what reading the file raises.

        Where it is cancelled it ends when the thread has, so that nothing is closed under it.
        """
        chunk = self._at_hand(self._at_most(AT_HAND))
        if chunk is None:
            chunk = await _aside(self._wait_for, self._at_most(ASIDE))
        self._position += len(chunk)
        if self._left is not None:
            self._left -= len(chunk)
        return chunk

    def _at_most(self, size: int) -> int:
        return size if self._left is None else min(size, self._left)

    def _at_hand(self, size: int) -> bytes | None:
        if not size:
            return b""
        if self._in_memory:
            return self._read(size)
        if self._descriptor is None or _NO_WAIT is None:
            return None
        buffer = bytearray(size)
        try:
            count = os.preadv(self._descriptor, [buffer], self._position, _NO_WAIT)
        except OSError:  # not in memory, or a file system that cannot tell: reading it in a thread shows what it is
            return None
        return bytes(memoryview(buffer)[:count])

    def _wait_for(self, size: int) -> bytes:
        if self._descriptor is not None:
            return os.pread(self._descriptor, size, self._position)
        return self._read(size)

    def _read(self, size: int) -> bytes:
        if self._skip:
            self._file.seek(self._skip, io.SEEK_CUR)
            self._skip = 0
        chunk: bytes = self._file.read(size)
        return chunk


def _source(file: Any) -> Any:
    """What ``file`` reads from. Django's ``File`` hands on the read of the file it is about; one that decrypts does not."""
    return getattr(file.read, "__self__", None)


def _descriptor(source: Any) -> int | None:
    """Of a file on the disk, whose bytes are read as they are there; None for anything else."""
    if type(source) is io.BufferedRandom:
        source.flush()
    raw = source.raw if type(source) in (io.BufferedReader, io.BufferedRandom) else source
    if type(raw) is not io.FileIO or not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
        return None
    return raw.fileno()


async def _aside(read: Callable[[int], bytes], size: int) -> bytes:
    reading = asyncio.ensure_future(sync_to_async(read)(size))
    try:
        return await asyncio.shield(reading)
    except asyncio.CancelledError:
        await asyncio.wait({reading})
        if not reading.cancelled():
            reading.exception()
        raise
