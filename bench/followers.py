"""The readers of ``bin/bench drill``, in processes of their own: each follows a room, and misses nothing, or says so."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlencode

from tornado.websocket import WebSocketClosedError, websocket_connect

from bench.wire import WireError, parse, request_bytes

POLL, SSE, SOCKET = "poll", "sse", "socket"
TRANSPORTS = POLL, SSE, SOCKET

#: Seconds that a client waits before it comes back: a random part of it, of twice as much after each failure.
FIRST_PAUSE, LAST_PAUSE = 0.2, 5.0
#: Without a byte for so long (heartbeats come every 20 s) a connection is taken for dead.
SILENCE = 40.0
#: One delay in so many is kept.
SAMPLE = 10


@dataclasses.dataclass
class Skip:
    """Events that a reader has not seen, and was told nothing of: wrong, if they were published."""

    room: int
    first: int
    last: int


@dataclasses.dataclass
class Seen:
    """What the readers of one process have seen."""

    transport: str
    readers: int
    events: int = 0
    connections: int = 0
    gaps: int = 0
    skips: list[Skip] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    worst_delay: float = 0.0
    delays: list[float] = dataclasses.field(default_factory=list)


class Broken(Exception):
    """The connection, or the server behind it, is gone: come back."""

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


class Follower:
    def __init__(self, seen: Seen, port: int, room: int) -> None:
        self.seen, self.port, self.room = seen, port, room
        self.cursor = ""
        self.grant = ""
        #: The number of the last event; None after a gap.
        self.last: int | None = 0
        self.changed = asyncio.Event()

    async def run(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                self.seen.connections += 1
                async for answer in getattr(self, self.seen.transport)():
                    self.take(answer)
                    pause = FIRST_PAUSE
                    if answer["retry"]:
                        raise Broken("the server stops", answer["retry"] / 1000)
            except (Broken, OSError, EOFError, TimeoutError, WebSocketClosedError) as error:
                wait = getattr(error, "pause", None)
                await asyncio.sleep(random.uniform(0, pause) if wait is None else wait)
                pause = min(pause * 2, LAST_PAUSE)
            except Exception as error:
                self.seen.failures.append(f"{self.seen.transport}: {error!r}")
                raise

    def take(self, answer: dict[str, Any]) -> None:
        if answer["gaps"]:
            self.seen.gaps += 1
            self.last = None
        for message in answer["messages"]:
            self.hear(*message["data"])
        self.cursor = answer["cursor"]
        self.grant = answer.get("grant", self.grant)
        self.changed.set()

    def hear(self, number: int, published: float) -> None:
        seen = self.seen
        if self.last is not None and number != self.last + 1:
            if number <= self.last:
                seen.failures.append(f"{seen.transport}: {number} after {self.last}")
            else:
                seen.skips.append(Skip(self.room, self.last + 1, number - 1))
        self.last = number
        seen.events += 1
        delay = time.monotonic() - published
        seen.worst_delay = max(seen.worst_delay, delay)
        if seen.events % SAMPLE == 0:
            seen.delays.append(delay)

    def query(self) -> str:
        fields = {"channel": f"room:{self.room}", "cursor": self.cursor, "grant": self.grant}
        return urlencode({name: value for name, value in fields.items() if value})

    async def poll(self) -> AsyncIterator[dict[str, Any]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            while True:
                writer.write(request_bytes(f"/comet/poll/?{self.query()}"))
                buffer = b""
                while (answer := parse(buffer)) is None:
                    buffer += await _some(reader)
                if answer.status == 503:
                    raise Broken("503")
                yield _answer(answer.status, answer.body)
                if not answer.keep_alive:
                    return
        finally:
            writer.close()

    async def sse(self) -> AsyncIterator[dict[str, Any]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request_bytes(f"/comet/sse/?{self.query()}"))
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SILENCE)
            if b" 503 " in head.splitlines()[0]:
                raise Broken("503")
            if b" 200 " not in head.splitlines()[0]:
                raise WireError(head.splitlines()[0].decode())
            buffer = b""
            while True:
                buffer += await _chunk(reader)
                *events, buffer = buffer.split(b"\n\n")
                for event in events:
                    for line in event.split(b"\n"):
                        if line.startswith(b"data:"):
                            yield _answer(200, line.removeprefix(b"data:"))
        finally:
            writer.close()

    async def socket(self) -> AsyncIterator[dict[str, Any]]:
        url = f"ws://127.0.0.1:{self.port}/comet/socket/?{self.query()}"
        try:
            connection = await asyncio.wait_for(websocket_connect(url), SILENCE)
        except Exception as error:
            # Tornado's HTTPClientError of a 503, and whatever a socket may raise.
            raise Broken(repr(error)) from error
        try:
            while True:
                frame = await asyncio.wait_for(connection.read_message(), SILENCE)
                if frame is None:
                    raise Broken(f"closed {connection.close_code}")
                answer = json.loads(frame)
                if "error" in answer and answer.get("status") == 503:
                    raise Broken(answer["error"])
                yield _answer(200, frame)
        finally:
            connection.close()


def _answer(status: int, body: bytes | str) -> dict[str, Any]:
    answer = json.loads(body)
    if status != 200 or "cursor" not in answer:
        raise WireError(f"status {status}: {answer}")
    return answer  # type: ignore[no-any-return]


async def _some(reader: asyncio.StreamReader) -> bytes:
    data = await asyncio.wait_for(reader.read(1 << 16), SILENCE)
    if not data:
        raise Broken("closed")
    return data


async def _chunk(reader: asyncio.StreamReader) -> bytes:
    size = int(await asyncio.wait_for(reader.readline(), SILENCE) or b"0", 16)
    if not size:
        raise Broken("the stream ended")
    return (await reader.readexactly(size + 2))[:-2]


def run(transport: str, port: int, rooms: list[int], line: Connection) -> None:
    """A process: says "ready" when all its readers have a cursor; is told each room's last event; answers with `Seen`."""
    asyncio.run(_run(Seen(transport, len(rooms)), port, rooms, line))


async def _run(seen: Seen, port: int, rooms: list[int], line: Connection) -> None:
    followers = [Follower(seen, port, room) for room in rooms]
    tasks = []
    for follower in followers:
        tasks.append(asyncio.create_task(follower.run()))
        await asyncio.sleep(0.002)
    for follower in followers:
        await follower.changed.wait()
    line.send("ready")
    last: dict[int, int] = await asyncio.to_thread(line.recv)
    for follower in followers:
        wanted = last.get(follower.room, 0)
        if not await _reaches(follower, wanted):
            seen.failures.append(f"{seen.transport}: {wanted} never came, only {follower.last}")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    line.send(seen)


async def _reaches(follower: Follower, number: int) -> bool:
    """What came in a gap has been told, too."""
    deadline = time.monotonic() + SILENCE
    while follower.last is not None and follower.last < number:
        follower.changed.clear()
        try:
            await asyncio.wait_for(follower.changed.wait(), deadline - time.monotonic())
        except TimeoutError:
            return False
    return True
