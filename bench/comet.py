"""``bin/bench comet``: what it costs to have readers, and to tell them, beside others who do the same.

``parked``: long-polls that wait, as in ``bin/bench parked``. ``rooms``: CometD's load: a thousand clients, each in ten of a
hundred rooms, and how long a message takes to each. ``brokers``: what two publishing processes get through PostgreSQL or
Redis to readers of two workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping

from bench import parked
from bench.comet_clients import Heard, Plan
from bench.figures import ratio, table
from bench.servers import (
    BARE,
    ROOT,
    TORNJANGO,
    UVICORN,
    BenchError,
    Peer,
    Place,
    free_port,
    serve,
)

PARTS = ("parked", "rooms", "brokers")

TRANSPORTS = {"poll": "long-poll", "sse": "SSE", "socket": "WebSocket"}

# Long enough for many times, short enough for a line on the screen.
BAR = 40


def _peer_command(python: str, port: int) -> list[str]:
    return [
        *(python, "-m", "uvicorn", "--host", "127.0.0.1", "--port", str(port), "--no-access-log"),
        *("--workers", "1", "bench.project.comet_asgi:application"),
    ]


def _in_two(peer: Peer) -> Peer:
    """As it serves with two workers."""

    def command(python: str, port: int) -> list[str]:
        options = peer.command(python, port)
        if "--workers" in options:
            options[options.index("--workers") + 1] = "2"
            return options
        return [*options, "--workers", "2"]

    return dataclasses.replace(peer, command=command)


CHANNELS = Peer("channels", "Channels, uvicorn", "asgi", _peer_command, "peers")
EVENTSTREAM = Peer("eventstream", "django-eventstream, uvicorn", "asgi", _peer_command, "peers")


@dataclasses.dataclass(frozen=True)
class Way:
    """One server over one transport."""

    peer: Peer
    transport: str
    path: str
    publish: str

    @property
    def name(self) -> str:
        return f"{self.peer.name}, {TRANSPORTS[self.transport]}"


OURS = [
    Way(TORNJANGO, transport, f"/comet/{transport}/?", "/tornjango/say/?")
    for transport in TRANSPORTS
]
WAYS = [
    *OURS,
    Way(CHANNELS, "socket", "/channels/socket/?", "/channels/publish/?"),
    Way(EVENTSTREAM, "sse", "/eventstream/events/?", "/eventstream/publish/?"),
]


@dataclasses.dataclass(frozen=True)
class Pace:
    """How much of each."""

    polls: int
    clients: int
    rate: float
    seconds: float


FULL = Pace(polls=10_000, clients=1000, rate=20, seconds=15)
QUICK = Pace(polls=1000, clients=200, rate=20, seconds=3)

ROOMS, FOLLOWS = 100, 10


@dataclasses.dataclass(frozen=True)
class Told:
    """What the clients of rooms were told, and what it cost."""

    name: str
    published: int
    delivered: int
    lost: int
    answers: int
    cpu_us: float
    """Of the server, for each message delivered."""
    per_second: float
    """Messages delivered, until the last had come."""
    p50_ms: float
    p99_ms: float
    max_ms: float
    buckets: list[tuple[float, int]]
    """Messages that took up to so many milliseconds."""


def told(name: str, outcome: Heard, cpu: float, seconds: float) -> Told:
    counts = {int(tenths) / 10: count for tenths, count in outcome.latencies.items()}
    delivered = outcome.delivered
    if not delivered:
        raise BenchError(f"{name} delivered nothing of {outcome.published} messages.")
    return Told(
        name,
        outcome.published,
        delivered,
        outcome.lost,
        outcome.answers,
        cpu / delivered * 1e6,
        delivered / seconds,
        quantile(counts, 0.5),
        quantile(counts, 0.99),
        max(counts),
        buckets(counts),
    )


def quantile(counts: Mapping[float, int], share: float) -> float:
    """The least value that so many of the counted do not exceed."""
    left = sum(counts.values()) * share
    for value, count in sorted(counts.items()):
        left -= count
        if left <= 0:
            return value
    return max(counts)


def buckets(counts: Mapping[float, int]) -> list[tuple[float, int]]:
    """As an HDR histogram has them, their width grows with what they count: 1, 2, 5, 10, 20, ... milliseconds."""
    bounds = [step * 10**power for power in range(6) for step in (1, 2, 5)]
    found: dict[float, int] = {}
    for value, count in counts.items():
        bound = next((bound for bound in bounds if value < bound), bounds[-1])
        found[bound] = found.get(bound, 0) + count
    first, last = min(found), max(found)
    return [(bound, found.get(bound, 0)) for bound in bounds if first <= bound <= last]


def histogram(result: Told) -> str:
    most = max(count for _, count in result.buckets)
    lines = [f"{result.name}: how long messages took"]
    for bound, count in result.buckets:
        share = count / result.delivered
        lines.append(f"  < {bound:>6,.0f} ms {'#' * round(count / most * BAR):<{BAR}} {share:6.1%}")
    return "\n".join(lines)


# Rooms


def rooms(way: Way, place: Place, pace: Pace) -> Told:
    with serve(way.peer, place, middleware="default") as server:
        plan = Plan(
            port=server.port,
            transport=way.transport,
            path=way.path,
            publish=way.publish,
            clients=pace.clients,
            rooms=ROOMS,
            follows=FOLLOWS,
            rate=pace.rate,
            seconds=pace.seconds,
        )
        try:
            with clients(plan) as process:
                before, began = server.cpu(), time.monotonic()
                outcome = answer(process)
                cpu = server.cpu() - before
        except BenchError as error:
            raise BenchError(f"{way.name}: {error}\n{server.said()}") from None
    return told(way.name, outcome, cpu, outcome.last - began)


@contextlib.contextmanager
def clients(plan: Plan) -> Iterator[subprocess.Popen[str]]:
    """The client process, when every client follows its rooms. Raises BenchError."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.comet_clients"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with process:
        try:
            tell(process, json.dumps(dataclasses.asdict(plan)))
            _line(process)
            yield process
        finally:
            process.kill()


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    line = process.stdout.readline()
    if not line or line.startswith('{"error"'):
        raise BenchError(json.loads(line)["error"] if line else "The client process ended.")
    return line


def answer(process: subprocess.Popen[str]) -> Heard:
    return Heard(**json.loads(_line(process)))


# Brokers


@dataclasses.dataclass(frozen=True)
class Through:
    """A way whose messages come from other processes, through a broker."""

    way: Way
    broker: str
    publisher: str

    @property
    def name(self) -> str:
        return f"{self.way.name}, {self.broker}"


#: Publishing processes, and readers, each in a room of its own: what is measured is the way through the broker.
PUBLISHERS, READERS = 2, 20

THROUGH = [
    Through(OURS[2], "PostgreSQL", "tornjango"),
    Through(OURS[2], "Redis", "tornjango"),
    Through(WAYS[3], "Redis", "channels"),
    Through(WAYS[4], "Redis", "eventstream"),
]


def through(case: Through, place: Place, pace: Pace) -> Told:
    broker = "postgres" if case.broker == "PostgreSQL" else "redis"
    place = dataclasses.replace(place, env=place.env | {"BENCH_BROKER": broker})
    way = case.way
    with serve(_in_two(way.peer), place, middleware="default") as server:
        plan = Plan(
            port=server.port,
            transport=way.transport,
            path=way.path,
            publish="",
            clients=READERS,
            rooms=READERS,
            follows=1,
            rate=0,
            seconds=0,
        )
        try:
            with clients(plan) as process:
                before, began = server.cpu(), time.monotonic()
                tell(process, str(sum(publish(case, place, pace.seconds / 2))))
                outcome = answer(process)
                cpu = server.cpu() - before
        except BenchError as error:
            raise BenchError(f"{case.name}: {error}\n{server.said()}") from None
    return told(case.name, outcome, cpu, outcome.last - began)


def publish(case: Through, place: Place, seconds: float) -> list[int]:
    """How many messages each publishing process had published when it ended."""
    environment = case.way.peer.environment
    command = [place.python(environment), "-m", "bench.comet_publishers", case.publisher]
    processes = [
        subprocess.Popen(
            [*command, str(READERS), str(seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=place.environ(environment),
            cwd=ROOT,
        )
        for _ in range(PUBLISHERS)
    ]
    counts = []
    for process in processes:
        said, error = process.communicate()
        if process.returncode:
            raise BenchError(f"A publisher failed:\n{error[-2000:]}")
        counts.append(int(said))
    return counts


@contextlib.contextmanager
def redis(place: Place) -> Iterator[Place]:
    """A place with a Redis of its own. Raises BenchError where there is no redis-server."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        raise BenchError("It needs redis-server on the PATH (on Debian: apt install redis-server).")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        process = subprocess.Popen(
            [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder],
            stdout=subprocess.DEVNULL,
        )
        try:
            yield dataclasses.replace(
                place, env=place.env | {"BENCH_REDIS": f"redis://127.0.0.1:{port}"}
            )
        finally:
            process.terminate()
            process.wait()


def migrate(place: Place) -> None:
    """The PostgreSQL broker's table."""
    command = [place.python("momoko"), "-m", "django", "migrate", "--verbosity", "0"]
    done = subprocess.run(
        command, env=place.environ("momoko"), cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise BenchError(f"The migrations failed:\n{done.stderr[-2000:]}")


# All of it


@dataclasses.dataclass
class Results:
    parked: list[parked.Parked]
    rooms: list[Told]
    brokers: list[Told]
    failures: list[str]
    seconds: float = 0.0


def run(place: Place, parts: list[str], pace: Pace) -> Results:
    """Ours fail the run; a peer that fails is told in the report."""
    results = Results([], [], [], [])
    began = time.monotonic()
    if "parked" in parts:
        for peer in (TORNJANGO, BARE, UVICORN):
            outcome = parked.run_or_fail(peer, place, pace.polls)
            if isinstance(outcome, str):
                results.failures.append(outcome)
            else:
                results.parked.append(outcome)
    if {"rooms", "brokers"} & set(parts):
        with redis(place) as beside:
            if "rooms" in parts:
                for way in WAYS:
                    with _told(results, way.peer):
                        results.rooms.append(rooms(way, beside, pace))
            if "brokers" in parts:
                migrate(beside)
                for case in THROUGH:
                    with _told(results, case.way.peer):
                        results.brokers.append(through(case, beside, pace))
    results.seconds = time.monotonic() - began
    return results


@contextlib.contextmanager
def _told(results: Results, peer: Peer) -> Iterator[None]:
    try:
        yield
    except (BenchError, OSError, ValueError) as error:
        if peer is TORNJANGO:
            raise
        results.failures.append(f"{peer.name} failed: {str(error).splitlines()[0]}")
        print(error, file=sys.stderr)


def report(results: Results) -> str:
    texts = []
    if results.parked:
        texts.append(parked.report(results.parked, []))
        texts.append(_beside_bare(results.parked))
    if results.rooms:
        first = results.rooms[0]
        head = f"{first.published} messages to rooms"
        texts.append(_table(head, results.rooms))
        texts += map(histogram, results.rooms)
    if results.brokers:
        texts.append(_table("two workers, two publishers", results.brokers))
    texts += results.failures
    texts.append(f"All in {results.seconds / 60:.1f} minutes")
    return "\n\n".join(filter(None, texts))


def _beside_bare(results: list[parked.Parked]) -> str:
    found = {result.server: result for result in results}
    ours, bare = found.get(TORNJANGO.name), found.get(BARE.name)
    if ours is None or bare is None:
        return ""
    return (
        f"tornjango beside a bare Tornado handler: re-poll {ratio(ours.repoll_us, bare.repoll_us)}, "
        f"last answered {ratio(ours.last_answered, bare.last_answered)}, "
        f"memory {ratio(ours.kib_each, bare.kib_each)}"
    )


def _table(head: str, results: list[Told]) -> str:
    header = [head, "delivered", "lost", "each answer", "CPU each, us", "a second", "p50", "p99"]
    rows = [
        [
            *(result.name, f"{result.delivered:,}", f"{result.lost:,}"),
            f"{result.delivered / result.answers:.1f}",
            f"{result.cpu_us:,.0f}",
            f"{result.per_second:,.0f}",
            *(f"{value:,.0f} ms" for value in (result.p50_ms, result.p99_ms, result.max_ms)),
        ]
        for result in results
    ]
    return table([*header, "max"], rows)
