"""``bin/bench drill``: readers of COMET while workers are killed and replaced, and the broker is restarted under them.

Two workers, readers over three transports, and events in every room, each with the number after the one before. Every reader
sees its room's numbers without a hole, or is told of a gap: that is counted, and everything else is a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from bench import followers
from bench.followers import TRANSPORTS, Seen
from bench.servers import ROOT, BenchError, free_port
from bench.wire import parse, request_bytes
from tests.postgres import Postgres

WORKERS = 2
READERS_PER_ROOM = 20
#: Seconds between two disturbances; in the last ones there is none: what they break is to be seen.
EVERY, CALM = 12.0, 15.0
PUBLISHERS = 10
START_TIMEOUT = 60.0

POSTGRES, REDIS = "postgres", "redis"
BROKERS = POSTGRES, REDIS


@dataclasses.dataclass
class Drill:
    """What came of one broker's."""

    broker: str
    seconds: float
    readers: int = 0
    published: int = 0
    unsure: int = 0
    """Events of which nobody was told whether they were published: their worker was killed, or the broker away."""
    kills: int = 0
    reloads: int = 0
    restarts: int = 0
    seen: list[Seen] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)


class Publisher:
    """Publishes to its rooms in turn, each event when the one before has been answered."""

    def __init__(self, port: int, rooms: list[int]) -> None:
        self.port, self.rooms = port, rooms
        self.last = dict.fromkeys(rooms, 0)
        self.acknowledged: set[tuple[int, int]] = set()
        self.unsure = 0
        self.end = False

    async def run(self, every: float) -> None:
        start = time.monotonic() + random.uniform(0, every)
        for n in range(1 << 30):
            await asyncio.sleep(max(0, start + n * every - time.monotonic()))
            if self.end:
                return
            await self.publish(self.rooms[n % len(self.rooms)])

    async def publish(self, room: int) -> None:
        self.last[room] += 1
        try:
            status = await asyncio.wait_for(self.ask(room, self.last[room]), 30)
        except (OSError, EOFError, TimeoutError):
            status = 0
        if status == 200:
            self.acknowledged.add((room, self.last[room]))
        else:
            self.unsure += 1

    async def ask(self, room: int, number: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request_bytes(f"/publish/{room}/{number}/"))
            buffer = b""
            while (answer := parse(buffer)) is None:
                if not (data := await reader.read(1 << 16)):
                    raise EOFError
                buffer += data
            return answer.status
        finally:
            writer.close()


def run(broker: str, seconds: float, readers: int, rate: float) -> Drill:
    """Raises BenchError where the broker's server is missing."""
    with _servers(broker) as (env, restart), _served(env) as (server, port):
        return asyncio.run(_run(Drill(broker, seconds), server, port, restart, readers, rate))


async def _run(
    result: Drill,
    server: subprocess.Popen[bytes],
    port: int,
    restart: Callable[[], object],
    readers: int,
    rate: float,
) -> Drill:
    rooms = list(range(max(PUBLISHERS, readers // READERS_PER_ROOM)))
    with _readers(port, rooms, readers) as lines:
        for line in lines:
            if await asyncio.to_thread(line.recv) != "ready":
                raise BenchError("The readers did not start.")
        publishers = [Publisher(port, rooms[n::PUBLISHERS]) for n in range(PUBLISHERS)]
        running = [asyncio.create_task(one.run(PUBLISHERS / rate)) for one in publishers]
        await _disturb(result, server, restart)
        for publisher in publishers:
            publisher.end = True
        await asyncio.gather(*running)
        acknowledged = set().union(*(one.acknowledged for one in publishers))
        last: dict[int, int] = {}
        for room, number in acknowledged:
            last[room] = max(last.get(room, 0), number)
        for line in lines:
            line.send(last)
        result.seen = [await asyncio.to_thread(line.recv) for line in lines]
    result.published = len(acknowledged)
    result.unsure = sum(one.unsure for one in publishers)
    result.readers = sum(seen.readers for seen in result.seen)
    result.failures = _failures(result.seen, acknowledged)
    return result


def _failures(all_seen: list[Seen], acknowledged: set[tuple[int, int]]) -> list[str]:
    failures = [failure for seen in all_seen for failure in seen.failures]
    for seen in all_seen:
        for skip in seen.skips:
            lost = [
                number
                for number in range(skip.first, skip.last + 1)
                if (skip.room, number) in acknowledged
            ]
            if lost:
                failures.append(f"{seen.transport}: room {skip.room} lost {lost}")
    return failures


async def _disturb(
    result: Drill, server: subprocess.Popen[bytes], restart: Callable[[], object]
) -> None:
    end = time.monotonic() + result.seconds
    calm = min(CALM, result.seconds / 3)
    every = min(EVERY, result.seconds / 5)
    turn = 0
    while (left := end - time.monotonic()) > 0:
        await asyncio.sleep(min(every, left))
        if server.poll() is not None:
            raise BenchError(f"The server has ended, with {server.returncode}.")
        if end - time.monotonic() < calm:
            continue
        if turn % 3 == 0:
            workers = psutil.Process(server.pid).children()
            os.kill(random.choice(workers).pid, signal.SIGKILL)
            result.kills += 1
        elif turn % 3 == 1:
            server.send_signal(signal.SIGHUP)
            result.reloads += 1
        else:
            await asyncio.to_thread(restart)
            result.restarts += 1
        turn += 1


@contextlib.contextmanager
def _readers(port: int, rooms: list[int], count: int) -> Iterator[list[Connection]]:
    """A process for each transport."""
    context = multiprocessing.get_context("spawn")
    lines, processes = [], []
    for n, transport in enumerate(TRANSPORTS):
        ours, theirs = context.Pipe()
        mine = [rooms[reader % len(rooms)] for reader in range(n, count, len(TRANSPORTS))]
        process = context.Process(
            target=followers.run, args=(transport, port, mine, theirs), daemon=True
        )
        process.start()
        theirs.close()
        lines.append(ours)
        processes.append(process)
    try:
        yield lines
    finally:
        for process in processes:
            process.terminate()
            process.join()


@contextlib.contextmanager
def _servers(broker: str) -> Iterator[tuple[dict[str, str], Callable[[], object]]]:
    """The environment of the project, and what restarts its broker."""
    with (
        tempfile.TemporaryDirectory(prefix="drill-") as folder,
        contextlib.ExitStack() as stack,
    ):
        # PostgreSQL will not run as root, and must then find its data as somebody else.
        Path(folder).chmod(0o755)
        postgres = stack.enter_context(Postgres(Path(folder, "data"), tcp=False))
        postgres.create_database("drill")
        env = {
            "DJANGO_SETTINGS_MODULE": "bench.drill_project.settings",
            "DRILL_BROKER": broker,
            "DRILL_DB_HOST": str(postgres.socket),
            "DRILL_DB_PORT": str(postgres.port),
            "DRILL_DB_USER": postgres.user,
        }
        restart: Callable[[], object] = postgres.restart
        if broker == REDIS:
            redis = stack.enter_context(_redis())
            env["DRILL_REDIS"] = redis.url

            def restart() -> None:
                redis.stop()
                redis.start()

        _manage(env, "migrate", "--verbosity", "0")
        yield env, restart


@contextlib.contextmanager
def _redis() -> Iterator[Any]:
    try:
        from tests.redis_server import PROGRAM, REASON, Redis
    except ImportError as error:
        raise BenchError(f"The drill with Redis needs redis-py: {error}") from None
    if PROGRAM is None:
        raise BenchError(f"The drill with Redis {REASON}.")
    with Redis() as redis:
        redis.start()
        yield redis


def _manage(env: dict[str, str], *arguments: str) -> None:
    command = [sys.executable, "-m", "django", *arguments]
    done = subprocess.run(
        command, env=os.environ | env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


@contextlib.contextmanager
def _served(env: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    port = free_port()
    command = [sys.executable, "-m", "tornjango", "serve", f"127.0.0.1:{port}", "--noreload"]
    options = ["--workers", str(WORKERS), "--graceful-timeout", "5"]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [*command, *options],
            env=os.environ | env,
            cwd=ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            _wait_until_it_serves(server, port)
            yield server, port
        except BenchError as error:
            log.seek(0)
            raise BenchError(f"{error}\n{log.read()[-3000:].decode()}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait_until_it_serves(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while asyncio.run(_status(port)) != 200:
        if server.poll() is not None or time.monotonic() > deadline:
            raise BenchError("The server does not serve.")
        time.sleep(0.1)


async def _status(port: int) -> int:
    publisher = Publisher(port, [0])
    try:
        return await publisher.ask(1_000_000, 1)
    except (OSError, EOFError):
        return 0


def report(results: list[Drill]) -> str:
    return "\n\n".join(map(_report, results))


def _report(result: Drill) -> str:
    lines = [
        f"{result.broker}: {result.published:,} events in {result.seconds:.0f} s, and {result.unsure} that may have been published; "
        f"{result.readers:,} readers, {WORKERS} workers: {result.kills} kills, {result.reloads} reloads, "
        f"{result.restarts} restarts of the broker",
        f"{'':8}{'readers':>9}{'events read':>13}{'connections':>13}{'gaps':>6}{'p50, ms':>9}{'p99, ms':>9}{'worst, s':>10}",
    ]
    for seen in result.seen:
        delays = statistics.quantiles(seen.delays or [0, 0], n=100)
        lines.append(
            f"{seen.transport:8}{seen.readers:>9,}{seen.events:>13,}{seen.connections:>13,}{seen.gaps:>6}"
            f"{delays[49] * 1000:>9.1f}{delays[98] * 1000:>9.0f}{seen.worst_delay:>10.1f}"
        )
    lines.append(f"{len(result.failures)} failures")
    return "\n".join([*lines, *result.failures[:20]])


def as_json(result: Drill) -> dict[str, Any]:
    """Without what takes pages."""
    figures = dataclasses.asdict(result)
    for seen in figures["seen"]:
        del seen["delays"], seen["skips"]
    return figures
