from __future__ import annotations

import asyncio
import errno
import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.serving import reached
from tornjango import reading
from tornjango.reading import AT_HAND, Reader

CONTENT = os.urandom(3 * AT_HAND + 17)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "stored"
    path.write_bytes(CONTENT)
    return path


async def whole(reader: Reader) -> bytes:
    parts = []
    while part := await reader.read():
        parts.append(part)
    return b"".join(parts)


class InThreads:
    """Counts the reads that went to a thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._aside = reading._aside
        monkeypatch.setattr(reading, "_aside", self.read)

    async def read(self, *args: Any) -> bytes:
        self.count += 1
        return await self._aside(*args)


@pytest.mark.gen_test
async def test_what_is_in_memory_is_read_without_a_thread(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = InThreads(monkeypatch)
    with stored.open("rb") as file:
        assert await whole(Reader(file)) == CONTENT
    assert await whole(Reader(io.BytesIO(CONTENT))) == CONTENT
    assert threads.count == 0


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EOPNOTSUPP])
@pytest.mark.gen_test
async def test_what_would_have_to_be_waited_for_is_read_in_threads(
    error: int, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = InThreads(monkeypatch)

    def fails(*args: Any) -> int:
        raise OSError(error, "not now")

    monkeypatch.setattr(os, "preadv", fails)
    with stored.open("rb") as file:
        file.read(5)
        assert await whole(Reader(file, skip=5, length=AT_HAND)) == CONTENT[10 : 10 + AT_HAND]
    assert threads.count == 1


@pytest.mark.gen_test
async def test_a_system_that_cannot_tell_reads_in_threads(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_NO_WAIT", None)
    threads = InThreads(monkeypatch)
    with stored.open("rb") as file:
        assert await whole(Reader(file, skip=7, length=20)) == CONTENT[7:27]
    assert threads.count == 1


@pytest.mark.gen_test
async def test_a_file_that_ends_early_is_read_to_its_end(stored: Path) -> None:
    with stored.open("rb") as file:
        assert await whole(Reader(file, skip=10, length=10 * len(CONTENT))) == CONTENT[10:]


@pytest.mark.gen_test
async def test_what_was_written_and_not_flushed_is_read(tmp_path: Path) -> None:
    with (tmp_path / "both").open("w+b") as file:
        file.write(b"abc")
        assert await whole(Reader(file, skip=0)) == b""
        file.seek(0)
        file.write(b"x")
        assert await whole(Reader(file)) == b"bc"


@pytest.mark.gen_test
async def test_a_read_that_is_cancelled_ends_with_its_thread() -> None:
    begun, go = threading.Event(), threading.Event()

    class Slow:
        def read(self, size: int) -> bytes:
            begun.set()
            go.wait(10)
            return b""

    task = asyncio.create_task(Reader(Slow()).read())
    await reached(begun)
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
