"""``bin/bench parked``: what long-polls cost that only wait."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from bench.figures import table
from bench.pollers import Polls
from bench.servers import (
    BARE,
    DAPHNE,
    GRANIAN,
    ROOT,
    TORNJANGO,
    UVICORN,
    BenchError,
    Peer,
    Place,
    Server,
    serve,
)

PEERS = (TORNJANGO, BARE, UVICORN, GRANIAN, DAPHNE)
POLL = {
    "tornjango": "/comet/poll/?channel=bench&cursor=",
    "bare": "/bare/poll/?cursor=",
    "asgi": "/asgi/poll/?cursor=",
}
CYCLES = 3
WARM_UP = 100
# How long polls may take to arrive, and how long a server may take to notice that its clients left.
SETTLE = 60.0


@dataclasses.dataclass(frozen=True)
class Parked:
    server: str
    middleware: str
    polls: int
    threads: int
    """The most seen."""
    idle_mib: float
    """After a warm-up of a hundred polls, with none parked."""
    parked_mib: float
    kib_each: float
    """Of the first polls on new connections."""
    kib_each_later: float
    """After the last round of polls."""
    repoll_us: float
    """CPU of the server for one answer and the next poll on the same connection, parked again."""
    last_answered: float
    """Seconds from the request that publishes to the last poll's answer."""
    aside: float
    """Seconds until a reader of another channel had what was published right after; 0 where there are no channels."""
    still_held: int
    gone_seconds: float
    """From the clients' leaving until none was held, or until we stopped looking."""


class Pollers:
    """The client process of :mod:`bench.pollers`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def tell(self, command: str) -> dict[str, float]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the client process ended"}
        if "error" in answer:
            raise BenchError(f"{command}: {answer['error']}")
        return dict(answer)


class Watch:
    """The server while polls come and go: how many it holds, and the most threads seen."""

    def __init__(self, server: Server, peer: Peer) -> None:
        self.server = server
        self.status = f"/{peer.spelling}/status/"
        self.threads = server.threads()

    def held(self) -> int:
        self.threads = max(self.threads, self.server.threads())
        return int(json.loads(self.server.get(self.status, timeout=SETTLE))["parked"])

    def until(self, held: int) -> int:
        """Returns when the server holds so many, or after a while; and how many it then holds."""
        deadline = time.monotonic() + SETTLE
        while (now := self.held()) != held and time.monotonic() < deadline:
            time.sleep(0.1)
        return now

    def must_hold(self, held: int) -> None:
        if (now := self.until(held)) != held:
            raise BenchError(f"The server holds {now} polls, not {held}.\n{self.server.said()}")


def run(peer: Peer, place: Place, count: int) -> Parked:
    middleware = "none" if peer is BARE else "default"
    with serve(peer, place, middleware=middleware) as server:
        watch = Watch(server, peer)
        warm_up(server, peer, watch)
        idle = server.rss()
        with pollers(server, peer, count) as clients:
            clients.tell("park")
            watch.must_hold(count)
            parked = server.rss()
            cycles = [cycle(clients, watch, count) for _ in range(CYCLES)]
            later = server.rss()
            clients.tell("hang up")
            start = time.monotonic()
            still = watch.until(0)
            gone = time.monotonic() - start
    return Parked(
        server=peer.name,
        middleware=middleware,
        polls=count,
        threads=watch.threads,
        idle_mib=idle / 2**20,
        parked_mib=parked / 2**20,
        kib_each=(parked - idle) / count / 1024,
        kib_each_later=(later - idle) / count / 1024,
        repoll_us=statistics.median(cpu for cpu, _, _ in cycles) / count * 1e6,
        last_answered=statistics.median(seconds for _, seconds, _ in cycles),
        aside=statistics.median(seconds for _, _, seconds in cycles),
        still_held=still,
        gone_seconds=gone,
    )


def run_or_fail(peer: Peer, place: Place, count: int) -> Parked | str:
    """A peer that does not hold so many is no reason to end the others' measurements."""
    try:
        return run(peer, place, count)
    except (BenchError, OSError, ValueError) as error:
        if peer is TORNJANGO:
            raise
        return f"{peer.name} failed: {str(error).splitlines()[0]}"


def warm_up(server: Server, peer: Peer, watch: Watch) -> None:
    with pollers(server, peer, WARM_UP) as clients:
        clients.tell("park")
        watch.must_hold(WARM_UP)
        cycle(clients, watch, WARM_UP)
        clients.tell("hang up")
        watch.must_hold(0)


def cycle(clients: Pollers, watch: Watch, count: int) -> tuple[float, float, float]:
    """From parked to parked again: the server's CPU, and how long the last answer and one aside took, in seconds."""
    before = watch.server.cpu()
    told = clients.tell("publish")
    clients.tell("park")
    watch.must_hold(count)
    return watch.server.cpu() - before, told["seconds"], told["aside"]


@contextlib.contextmanager
def pollers(server: Server, peer: Peer, count: int) -> Iterator[Pollers]:
    cursor = json.loads(server.get(f"/{peer.spelling}/cursor/"))["cursor"]
    polls = Polls(server.port, count, cursor, POLL[peer.spelling], f"/{peer.spelling}/publish/")
    if peer.spelling == "tornjango":
        aside = json.loads(server.get("/tornjango/cursor/?channel=aside"))["cursor"]
        polls = dataclasses.replace(
            polls,
            aside="/comet/poll/?channel=aside&cursor=",
            aside_cursor=aside,
            publish_aside="/tornjango/publish/?channel=aside",
            greet="/tornjango/json/",
        )
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.pollers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with process:
        assert process.stdin
        process.stdin.write(json.dumps(dataclasses.asdict(polls)) + "\n")
        try:
            yield Pollers(process)
        finally:
            process.kill()


def report(results: list[Parked], failures: list[str]) -> str:
    lines: list[tuple[str, Callable[[Parked], str]]] = [
        ("threads", lambda r: f"{r.threads}"),
        ("memory idle, MiB", lambda r: f"{r.idle_mib:.1f}"),
        ("memory with all parked, MiB", lambda r: f"{r.parked_mib:.1f}"),
        ("each, KiB", lambda r: f"{r.kib_each:.1f}"),
        (f"each after {CYCLES} more polls, KiB", lambda r: f"{r.kib_each_later:.1f}"),
        ("CPU per re-poll, us", lambda r: f"{r.repoll_us:,.0f}"),
        ("one publish, last answered, s", lambda r: f"{r.last_answered:.2f}"),
        ("a second one aside, s", lambda r: f"{r.aside:.2f}" if r.aside else "-"),
        ("still held after all hung up", lambda r: f"{r.still_held}"),
        ("seconds until then", lambda r: f"{r.gone_seconds:.1f}"),
    ]
    header = [f"{results[0].polls:,} long-polls", *(r.server for r in results)]
    rows = [[name, *(text(r) for r in results)] for name, text in lines]
    rows.insert(0, ["middleware", *(r.middleware for r in results)])
    return "\n".join([table(header, rows), *failures])
