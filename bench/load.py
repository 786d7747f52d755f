"""The load generator, in a process of its own: ``python -m bench.load`` with a :class:`Plan` as JSON on stdin.

Each connection sends its next request when it has its answer. Every answer is compared with what it must be, byte
for byte; the first that differs ends the run, since a fast wrong answer is no figure.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import statistics
import sys
from collections.abc import Iterator

from bench.wire import WireError, parse, request_bytes

#: A path, the cookie sent with the request or "", and the body that must come back.
Exchange = tuple[str, str, str]

# How long after the end of the run the last answers may take.
GRACE = 15.0


@dataclasses.dataclass(frozen=True)
class Plan:
    port: int
    exchanges: list[Exchange]
    """Requested in turn."""
    connections: int
    seconds: float
    host: str = "127.0.0.1"
    most: int = 1_000_000
    """Requests after which the run ends, whatever the time."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    requests: int
    seconds: float
    reconnects: int
    """Connections that the server closed after an answer, as HTTP allows it to."""
    p50: float
    p99: float
    """Milliseconds from request to answer."""
    error: str | None = None


class Run:
    """What the connections share: the requests still to send, the counts, and the end."""

    def __init__(self, plan: Plan, loop: asyncio.AbstractEventLoop) -> None:
        self.plan = plan
        self.loop = loop
        self.exchanges = _cycle(plan)
        self.latencies: list[float] = []
        self.sent = self.reconnects = 0
        self.open: set[Client] = set()
        self.over = False
        self.done: asyncio.Future[None] = loop.create_future()

    def stop(self) -> None:
        self.over = True
        if not self.open and not self.done.done():
            self.done.set_result(None)

    def fail(self, message: str) -> None:
        self.over = True
        if not self.done.done():
            self.done.set_exception(WireError(message))

    def abort(self) -> None:
        for client in self.open:
            client.transport.abort()

    def closed(self, client: Client) -> None:
        self.open.discard(client)
        if self.over:
            self.stop()

    async def connect(self) -> None:
        await self.loop.create_connection(lambda: Client(self), self.plan.host, self.plan.port)

    def reconnect(self) -> None:
        self.reconnects += 1
        self.loop.create_task(self.connect()).add_done_callback(self._connected)

    def _connected(self, task: asyncio.Task[None]) -> None:
        if error := task.exception():
            self.fail(f"could not connect again: {error}")


class Client(asyncio.Protocol):
    """One connection, with at most one request under way."""

    transport: asyncio.Transport

    def __init__(self, run: Run) -> None:
        self.run = run
        self.buffer = b""
        self.waiting: tuple[bytes, bytes] | None = None
        self.since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.run.open.add(self)
        self._next()

    def _next(self) -> None:
        if self.run.over or self.run.sent >= self.run.plan.most:
            self.run.over = True
            self.transport.close()
            return
        self.run.sent += 1
        self.waiting = next(self.run.exchanges)
        self.since = self.run.loop.time()
        self.transport.write(self.waiting[0])

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        try:
            answer = parse(self.buffer)
        except (WireError, ValueError) as error:
            return self.run.fail(f"{self._request()}: {error}")
        if answer is None:
            return
        if not self._right(answer.status, answer.body):
            return
        self.run.latencies.append(self.run.loop.time() - self.since)
        self.buffer = self.buffer[answer.length :]
        self.waiting = None
        # A server that closes does so by itself; connection_lost then opens the next one.
        if answer.keep_alive:
            self._next()

    def _right(self, status: int, body: bytes) -> bool:
        if self.waiting is None:
            self.run.fail(f"bytes that nothing asked for: {body[:80]!r}")
        elif status != 200:
            self.run.fail(f"{self._request()}: status {status}: {body[:200]!r}")
        elif body != self.waiting[1]:
            wanted = self.waiting[1]
            self.run.fail(f"{self._request()}: a wrong body: {body[:200]!r}, not {wanted[:200]!r}")
        else:
            return True
        return False

    def _request(self) -> str:
        return self.waiting[0].split(b" HTTP/1.1")[0].decode() if self.waiting else "no request"

    def connection_lost(self, exc: Exception | None) -> None:
        if self.waiting:
            self.run.fail(f"{self._request()}: the connection broke: {exc or 'closed'}")
        elif not self.run.over:
            self.run.reconnect()
        self.run.closed(self)


def _cycle(plan: Plan) -> Iterator[tuple[bytes, bytes]]:
    return itertools.cycle(
        [
            (request_bytes(path, cookie=cookie), body.encode())
            for path, cookie, body in plan.exchanges
        ]
    )


async def load(plan: Plan) -> Outcome:
    """Runs the plan. Raises WireError at the first wrong answer, TimeoutError when answers stay out."""
    loop = asyncio.get_running_loop()
    run = Run(plan, loop)
    start = loop.time()
    loop.call_later(plan.seconds, run.stop)
    try:
        async with asyncio.timeout(plan.seconds + GRACE):
            await asyncio.gather(*(run.connect() for _ in range(plan.connections)))
            await run.done
    finally:
        run.abort()
    seconds = loop.time() - start
    cuts = statistics.quantiles(run.latencies, n=100) if len(run.latencies) > 1 else [0.0] * 99
    return Outcome(len(run.latencies), seconds, run.reconnects, cuts[49] * 1e3, cuts[98] * 1e3)


def main() -> None:
    plan = Plan(**json.load(sys.stdin))
    try:
        outcome = asyncio.run(load(plan))
    except TimeoutError:
        outcome = Outcome(0, 0, 0, 0, 0, error=f"answers stayed out for {GRACE:.0f} s")
    except (WireError, OSError) as error:
        outcome = Outcome(0, 0, 0, 0, 0, error=str(error))
    json.dump(dataclasses.asdict(outcome), sys.stdout)


if __name__ == "__main__":
    main()
