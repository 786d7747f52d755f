"""Clients of rooms, over any transport: ``python -m bench.comet_clients`` with :class:`Plan` as JSON on stdin.

Prints ``ready`` when every client follows its rooms, then publishes as the plan says (or, with ``rate`` 0, waits for what
others publish, until a line on stdin says how much that was), and prints :class:`Heard` as JSON. Every message carries
the time at which it was due, so that a server that holds up its publisher shows it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import struct
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

from bench.wire import WireError, parse, request_bytes

CONNECTING_AT_ONCE = 50
PUBLISHERS = 8
TIMEOUT = 60.0
# How long what is missing may still be on its way when the last message was published: peers lose messages.
QUIET = 5.0

# Whatever a transport wraps it in, perhaps as a string in a string.
_AT = re.compile(rb'at\\?": ?(\d+\.\d+)')


@dataclasses.dataclass(frozen=True)
class Plan:
    port: int
    transport: str
    """poll, sse or socket"""
    path: str
    """What ``channel=room-1&channel=room-2`` is put behind."""
    publish: str
    """The same, for ``channel`` and ``at``."""
    clients: int
    rooms: int
    follows: int
    """Rooms of each client, spread so that all rooms have as many members."""
    rate: float
    """Messages a second, to one room after the other; 0 where others publish."""
    seconds: float

    def rooms_of(self, client: int) -> list[str]:
        step = self.rooms // self.follows
        return [f"room-{(client + n * step) % self.rooms}" for n in range(self.follows)]


@dataclasses.dataclass
class Heard:
    published: int
    delivered: int
    lost: int
    answers: int
    """Polls answered, events or frames: fewer than were delivered where messages were coalesced."""
    last: float
    """Of this system's monotonic clock, when the last message came."""
    latencies: dict[int, int]
    """How many messages took so many tenths of a millisecond."""


class Client(asyncio.Protocol, ABC):
    """One connection, following its rooms."""

    transport: asyncio.Transport

    def __init__(self, fleet: Fleet, rooms: list[str]) -> None:
        self.fleet = fleet
        self.query = "&".join(f"channel={room}" for room in rooms)
        self.buffer = b""
        self.following: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self.fleet.fail(WireError(f"a connection broke: {exc or 'closed'}"))

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        try:
            self.read()
        except (WireError, ValueError, KeyError) as error:
            self.fleet.fail(error)

    def follows(self) -> None:
        if not self.following.done():
            self.following.set_result(None)

    @abstractmethod
    def begin(self) -> None:
        """Asks for the rooms."""

    @abstractmethod
    def read(self) -> None:
        """Takes whole answers off the buffer."""


class PollClient(Client):
    cursor = grant = ""

    def begin(self) -> None:
        path = f"{self.fleet.plan.path}{self.query}&cursor={quote(self.cursor)}"
        self.transport.write(request_bytes(path + (f"&grant={self.grant}" if self.grant else "")))

    def read(self) -> None:
        while (answer := parse(self.buffer)) is not None:
            self.buffer = self.buffer[answer.length :]
            if answer.status != 200:
                raise WireError(f"a poll is answered {answer}")
            said = json.loads(answer.body)
            self.cursor, self.grant = said["cursor"], said.get("grant", self.grant)
            self.begin()
            self.follows()
            self.fleet.take(answer.body)


class StreamClient(Client):
    """Server-Sent Events, whatever chunks they come in."""

    begun = False

    def begin(self) -> None:
        self.transport.write(request_bytes(self.fleet.plan.path + self.query))

    def read(self) -> None:
        if not self.begun:
            head, end, rest = self.buffer.partition(b"\r\n\r\n")
            if not end:
                return
            if not head.startswith(b"HTTP/1.1 200"):
                raise WireError(f"a stream is answered {head[:200]!r}")
            self.begun, self.buffer = True, rest
        # The sizes of chunks are lines of their own, which say nothing here.
        *events, self.buffer = self.buffer.replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            if b"data:" in event:
                self.follows()
                self.fleet.take(event)


class SocketClient(Client):
    """A WebSocket (RFC 6455) that only listens."""

    begun = False

    def begin(self) -> None:
        plan = self.fleet.plan
        self.transport.write(
            (
                f"GET {plan.path}{self.query} HTTP/1.1\r\nHost: 127.0.0.1:{plan.port}\r\n"
                f"Origin: http://127.0.0.1:{plan.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
            ).encode()
        )

    def read(self) -> None:
        if not self.begun:
            head, end, rest = self.buffer.partition(b"\r\n\r\n")
            if not end:
                return
            if not head.startswith(b"HTTP/1.1 101"):
                raise WireError(f"a handshake is answered {head[:200]!r}")
            self.begun, self.buffer = True, rest
        while (frame := unframe(self.buffer)) is not None:
            opcode, payload, length = frame
            self.buffer = self.buffer[length:]
            if opcode == 8:
                raise WireError(f"a WebSocket is closed: {payload!r}")
            if opcode == 1:
                self.follows()
                self.fleet.take(payload)


def unframe(buffer: bytes) -> tuple[int, bytes, int] | None:
    """Opcode, payload and size of the first frame of a server; None while bytes are missing."""
    if len(buffer) < 2:
        return None
    size, start = buffer[1] & 127, 2
    if size > 125:
        wide = ">H" if size == 126 else ">Q"
        start += struct.calcsize(wide)
        if len(buffer) < start:
            return None
        (size,) = struct.unpack_from(wide, buffer, 2)
    end = start + size
    return (buffer[0] & 15, buffer[start:end], end) if len(buffer) >= end else None


CLIENTS: dict[str, Callable[[Fleet, list[str]], Client]] = {
    "poll": PollClient,
    "sse": StreamClient,
    "socket": SocketClient,
}


class Publisher(asyncio.Protocol):
    """A connection over which one message after the other is published."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.buffer = b""
        self.answered: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if (answer := parse(self.buffer)) is not None and self.answered is not None:
            self.buffer = b""
            if answer.status == 200:
                self.answered.set_result(None)
            else:
                self.answered.set_exception(WireError(f"publishing is answered {answer}"))

    async def publish(self, path: str) -> None:
        self.answered = asyncio.get_running_loop().create_future()
        self.transport.write(request_bytes(path))
        await self.answered


class Fleet:
    """All clients, and what they have been told."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.latencies: Counter[int] = Counter()
        self.delivered = self.answers = 0
        self.last = 0.0
        self.clients: list[Client] = []
        self.ending = False
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.news = asyncio.Event()

    def take(self, body: bytes) -> None:
        now = asyncio.get_running_loop().time()
        times = _AT.findall(body)
        if not times:
            return
        self.answers += 1
        self.delivered += len(times)
        self.last = now
        for at in times:
            self.latencies[int((now - float(at)) * 10_000)] += 1
        self.news.set()

    def fail(self, error: Exception) -> None:
        if not self.ending and not self.failure.done():
            self.failure.set_exception(error)

    async def connect(self) -> None:
        """Returns when every client follows its rooms."""
        limit = asyncio.Semaphore(CONNECTING_AT_ONCE)
        joined = asyncio.gather(*(self._join(n, limit) for n in range(self.plan.clients)))
        await self._unless_failed(joined, TIMEOUT)

    async def _join(self, number: int, limit: asyncio.Semaphore) -> None:
        make = CLIENTS[self.plan.transport]
        async with limit:
            _, client = await asyncio.get_running_loop().create_connection(
                lambda: make(self, self.plan.rooms_of(number)), "127.0.0.1", self.plan.port
            )
            self.clients.append(client)
            await client.following

    async def publish(self) -> int:
        """As many as the plan says, each when it is due, or as soon as a publisher is free."""
        loop = asyncio.get_running_loop()
        count = round(self.plan.rate * self.plan.seconds)
        begin = loop.time()
        due = iter([(n, begin + n / self.plan.rate) for n in range(count)])

        async def run() -> None:
            _, publisher = await loop.create_connection(Publisher, "127.0.0.1", self.plan.port)
            for number, at in due:
                await asyncio.sleep(max(at - loop.time(), 0))
                room = number % self.plan.rooms
                await publisher.publish(f"{self.plan.publish}channel=room-{room}&at={at:.6f}")
            publisher.transport.close()

        await self._unless_failed(asyncio.gather(*(run() for _ in range(PUBLISHERS))), None)
        return count

    async def finish(self, published: int) -> Heard:
        """Waits for what is still on its way."""
        plan = self.plan
        expected = published * plan.clients * plan.follows // plan.rooms
        while self.delivered < expected:
            self.news.clear()
            try:
                await self._unless_failed(self.news.wait(), QUIET)
            except TimeoutError:
                break
        self.ending = True
        lost = expected - self.delivered
        latencies = dict(sorted(self.latencies.items()))
        return Heard(published, self.delivered, lost, self.answers, self.last, latencies)

    def hang_up(self) -> None:
        for client in self.clients:
            client.transport.close()

    async def _unless_failed(self, work: Awaitable[object], seconds: float | None) -> None:
        """Raises TimeoutError when it takes longer, and what `fail` was called with meanwhile."""
        task = asyncio.ensure_future(work)
        either: list[asyncio.Future[Any]] = [task, self.failure]
        done, _ = await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            task.cancel()
            raise TimeoutError(f"{self.delivered} messages, and then none for {seconds} s")
        for future in done:
            future.result()


async def main() -> None:
    loop = asyncio.get_running_loop()
    fleet = Fleet(Plan(**json.loads(sys.stdin.readline())))
    try:
        await fleet.connect()
        print("ready", flush=True)
        if fleet.plan.rate:
            published = await fleet.publish()
        else:
            published = int(await loop.run_in_executor(None, sys.stdin.readline))
        print(json.dumps(dataclasses.asdict(await fleet.finish(published))), flush=True)
    except (WireError, OSError, ValueError, KeyError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
