"""``bin/bench soak``: mixed load while workers are replaced, killed, and left by their clients."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Iterable

from bench.load import Exchange
from bench.servers import Peer, Place, Server, serve
from bench.wire import Answer, WireError, parse, request_bytes

WORKERS = 2
TIMEOUT = 30.0
#: Clients of each kind at one time.
BROWSERS, VISITORS, LEAVERS = 6, 2, 3
#: How long a client looks at an answer, at most, in seconds.
PAUSE = 0.02
#: The first part of a soak is without disturbance, to see whether memory grows.
CALM = 0.4
RELOAD_EVERY, KILL_EVERY, LOOK_EVERY = 15.0, 40.0, 2.0
#: For how long after a kill a broken connection is a killed request; in seconds.
KILLED_WITHIN = 1.0

TORNJANGO = Peer(
    "tornjango",
    "tornjango",
    "tornjango",
    lambda python, port: [
        *(python, "-m", "tornjango", "serve", f"127.0.0.1:{port}", "--noreload"),
        *("--workers", str(WORKERS), "--graceful-timeout", "5"),
    ],
)


@dataclasses.dataclass
class Soak:
    seconds: float = 0
    requests: int = 0
    connections: int = 0
    retried: int = 0
    """Requests sent again on a new connection, since the kept one was closed before a byte of an answer
    (RFC 9112, 9.3.1): that is not a failure."""
    left: int = 0
    """Clients that left in the middle: of a parked request, a download, an upload."""
    reloads: int = 0
    kills: int = 0
    killed: int = 0
    """Requests that broke within a second after a kill."""
    failures: list[str] = dataclasses.field(default_factory=list)
    calm_mib: list[float] = dataclasses.field(default_factory=list)
    """The server's memory before the first reload, master and workers together."""
    rough_mib: list[float] = dataclasses.field(default_factory=list)


class Clients:
    """They go on until ``end`` is set."""

    def __init__(self, port: int, exchanges: list[Exchange], result: Soak) -> None:
        self.port = port
        self.exchanges = exchanges
        self.result = result
        self.end = asyncio.Event()
        self.kill_time = float("-inf")
        self.random = random.Random(2009)

    async def run(self) -> None:
        kinds = [self.browse] * BROWSERS + [self.visit] * VISITORS + [self.leave] * LEAVERS
        await asyncio.gather(*(kind() for kind in kinds))

    async def browse(self) -> None:
        """Keeps its connection for as long as the server does."""
        connection = Connection(self)
        for exchange in self._chosen():
            await connection.exchange(exchange)
            await self._pause()
        connection.close()

    async def visit(self) -> None:
        """A connection for every request."""
        for exchange in self._chosen():
            connection = Connection(self)
            await connection.exchange(exchange)
            connection.close()
            await self._pause()

    async def leave(self) -> None:
        """Asks for something long, and is gone."""
        heads = [
            request_bytes("/asgi/poll/"),
            request_bytes("/tornjango/download/"),
            request_bytes("/tornjango/json/").replace(
                b"\r\n\r\n", b"\r\nContent-Length: 5000000\r\n\r\n" + b"x" * 500_000
            ),
        ]
        for head in itertools.cycle(heads):
            if self.end.is_set():
                return
            with contextlib.suppress(OSError):  # it leaves either way
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.write(head)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(10_000), self.random.random() * 0.3)
                writer.transport.abort()
                self.result.left += 1
            await asyncio.sleep(self.random.random() * 0.1)

    def _chosen(self) -> Iterable[Exchange]:
        while not self.end.is_set():
            yield self.random.choice(self.exchanges)

    async def _pause(self) -> None:
        await asyncio.sleep(self.random.random() * PAUSE)

    def broke(self, exchange: Exchange, error: object) -> None:
        if time.monotonic() - self.kill_time < KILLED_WITHIN:
            self.result.killed += 1
        else:
            self.result.failures.append(f"{exchange[0]}: {error}")


class Connection:
    """One at a time; a new one when the server has closed it."""

    def __init__(self, clients: Clients) -> None:
        self.clients = clients
        self.writer: asyncio.StreamWriter | None = None

    async def exchange(self, exchange: Exchange) -> None:
        """Asks once, and once more where HTTP lets a client."""
        result = self.clients.result
        kept = self.writer is not None
        try:
            try:
                await self._ask(exchange)
            except _ClosedBeforeItsAnswer:
                if not kept:
                    raise
                result.retried += 1
                await self._ask(exchange)
        except (OSError, WireError, EOFError, TimeoutError) as error:
            self.close()
            self.clients.broke(exchange, repr(error))
        result.requests += 1

    async def _ask(self, exchange: Exchange) -> None:
        path, cookie, wanted = exchange
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.clients.port)
            self.clients.result.connections += 1
        self.writer.write(request_bytes(path, cookie=cookie))
        answer = await asyncio.wait_for(self._answer(), TIMEOUT)
        if answer.status != 200 or answer.body.decode() != wanted:
            raise WireError(f"status {answer.status}: {answer.body[:100]!r}")
        if not answer.keep_alive:
            self.close()

    async def _answer(self) -> Answer:
        buffer = b""
        while (answer := parse(buffer)) is None:
            try:
                data = await self.reader.read(1 << 16)
            except ConnectionError:
                data = b""
            if not data:
                self.close()
                raise EOFError(f"after {len(buffer)} bytes") if buffer else _ClosedBeforeItsAnswer
            buffer += data
        return answer

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


class _ClosedBeforeItsAnswer(EOFError):
    pass


def run(place: Place, exchanges: list[Exchange], minutes: float) -> Soak:
    with serve(TORNJANGO, place, middleware="default") as server:
        return asyncio.run(_run(server, exchanges, minutes * 60))


async def _run(server: Server, exchanges: list[Exchange], seconds: float) -> Soak:
    result = Soak(seconds=seconds)
    clients = Clients(server.port, exchanges, result)
    start = time.monotonic()
    running = asyncio.create_task(clients.run())
    reload, kill = Timer(RELOAD_EVERY), Timer(KILL_EVERY)
    async for passed in _until(start + seconds, running):
        calm = passed < seconds * CALM
        (result.calm_mib if calm else result.rough_mib).append(server.rss() / 2**20)
        # Not in the last seconds: what they break is to be seen.
        if calm or passed > seconds - 8:
            continue
        if kill(passed):
            os.kill(random.choice(server.process.children()).pid, signal.SIGKILL)
            clients.kill_time = time.monotonic()
            result.kills += 1
        elif reload(passed):
            server.popen.send_signal(signal.SIGHUP)
            result.reloads += 1
    clients.end.set()
    await running
    return result


async def _until(end: float, running: asyncio.Task[None]) -> AsyncIterator[float]:
    start = time.monotonic()
    while time.monotonic() < end:
        await asyncio.wait({running}, timeout=LOOK_EVERY)
        if running.done():  # with an error, then
            await running
        yield time.monotonic() - start


class Timer:
    """True once in so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.last = seconds, 0.0

    def __call__(self, passed: float) -> bool:
        if passed - self.last < self.seconds:
            return False
        self.last = passed
        return True


def report(result: Soak) -> str:
    calm, rough = result.calm_mib, result.rough_mib
    lines = [
        f"{result.requests:,} requests on {result.connections:,} connections in {result.seconds:.0f} s, "
        f"{result.requests / result.seconds:.0f} a second; each answer compared byte for byte",
        f"{result.left:,} clients left in the middle; {result.reloads} reloads, {result.kills} kills of {WORKERS} workers",
        f"{result.killed} requests broke with their worker; {result.retried} were sent again on a new connection",
        f"{len(result.failures)} failed otherwise",
        f"memory, MiB, before the first reload: {_course(calm)}; from then on: {_course(rough)}",
    ]
    return "\n".join(lines + result.failures[:20])


def _course(values: list[float]) -> str:
    if not values:
        return "-"
    shown = values[:: max(1, len(values) // 8)]
    return " ".join(f"{value:.0f}" for value in shown) + f" (at most {max(values):.0f})"
