"""``bin/bench``: the peers beside each other, in interleaved rounds."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections import defaultdict

from bench import figures, queries
from bench.load import Exchange, Outcome, Plan
from bench.servers import BARE, OURS, PEERS, ROOT, UVICORN, BenchError, Peer, Place, Server, serve

VIEWS = {
    "json": "JSON",
    "row": "one row -> JSON, aget",
    "fetch": "one row -> JSON, db.fetch",
    "prepared": "one row -> JSON, prepared",
    "twenty": "20 rows -> JSON, 20 aget",
    "2009": "the 2009 view",
    "page": "page for who is logged in",
    "orm": "one row -> JSON, sync view",
    "green": "one row -> JSON, @green",
}
MIDDLEWARE = {"none": "no middleware", "default": "default middleware"}
CELLS = {
    "none": ("json", "row", "fetch", "prepared", "twenty", "2009"),
    "default": ("json", "row", "orm", "green", "page"),
}

# For a row of the table where only tornjango has a view: what that stands beside, of the peers.
BESIDE = {"fetch": "row", "prepared": "row", "green": "orm"}

Answers = dict[str, list[Exchange]]
Cell = tuple[str, str]
Samples = dict[tuple[str, Cell], list[figures.Sample]]


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long everything takes."""

    rounds: int
    seconds: float
    warm_up: float
    connections: int
    fresh: bool = True
    """New processes each round: the luck of one in memory and hashing is not the next one's."""

    def warmed(self) -> Pace:
        """For the next measurement of the same processes."""
        return self if self.fresh else dataclasses.replace(self, warm_up=0.0)


def compare(
    place: Place, answers: Answers, pace: Pace, peers: list[Peer]
) -> tuple[Samples, queries.Counts]:
    """Views over HTTP, and queries alone. Raises BenchError at the first wrong answer of any server."""
    samples: Samples = defaultdict(list)
    counts: queries.Counts = defaultdict(list)
    environments = queries.environments(peers)
    with contextlib.ExitStack() as stack:
        running: list[tuple[Peer, str, Server]] = []
        for number in range(pace.rounds):
            print(f"round {number + 1} of {pace.rounds}", file=sys.stderr, flush=True)
            running = running or _start(stack, place, peers)
            for peer, middleware, server in running:
                for view in views_of(peer, middleware):
                    sample = measure(server, peer, answers[view], pace)
                    samples[peer.name, (view, middleware)].append(sample)
            queries.measure(place, environments, pace, counts)
            pace = pace.warmed()
            if pace.fresh:
                stack.close()
                running = []
    return samples, counts


def _start(
    stack: contextlib.ExitStack, place: Place, peers: list[Peer]
) -> list[tuple[Peer, str, Server]]:
    """Idle, they cost next to nothing, and each is measured by its own clock."""
    return [
        (peer, middleware, stack.enter_context(serve(peer, place, middleware=middleware)))
        for middleware in CELLS
        for peer in peers
        if views_of(peer, middleware)
    ]


def views_of(peer: Peer, middleware: str) -> tuple[str, ...]:
    if peer is BARE:
        return ("json",) if middleware == "none" else ()
    if peer in OURS:
        return CELLS[middleware]
    return tuple(view for view in CELLS[middleware] if view not in BESIDE)


def least_middleware(view: str) -> str:
    return next(name for name, views in CELLS.items() if view in views)


def measure(server: Server, peer: Peer, answers: list[Exchange], pace: Pace) -> figures.Sample:
    exchanges = [(f"/{peer.spelling}/{path}", cookie, body) for path, cookie, body in answers]
    plan = Plan(server.port, exchanges, pace.connections, pace.warm_up)
    if pace.warm_up:
        run_load(plan, peer, server)
    before = server.cpu()
    outcome = run_load(dataclasses.replace(plan, seconds=pace.seconds), peer, server)
    return figures.Sample(
        requests=outcome.requests,
        seconds=outcome.seconds,
        cpu=server.cpu() - before,
        p50=outcome.p50,
        p99=outcome.p99,
        reconnects=outcome.reconnects,
    )


def run_load(plan: Plan, peer: Peer, server: Server) -> Outcome:
    """In a process of its own; what it does before and after the requests costs the server nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.load"],
        input=json.dumps(dataclasses.asdict(plan)),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if done.returncode:
        raise BenchError(f"The load generator failed:\n{done.stderr}")
    outcome = Outcome(**json.loads(done.stdout))
    if outcome.error:
        raise BenchError(f"{peer.name}: {outcome.error}\nThe server said:\n{server.said()}")
    return outcome


def report(samples: Samples) -> str:
    summaries = {key: figures.summarize(value) for key, value in samples.items()}
    cells = [(view, middleware) for middleware, views in CELLS.items() for view in views]
    names = [peer.name for peer in PEERS if any(peer.name == name for name, _ in samples)]
    header = ["", *names]

    def summary(name: str, cell: Cell) -> figures.Summary | None:
        beside = BESIDE.get(cell[0], cell[0]), cell[1]
        return summaries.get((name, cell)) or (
            summaries.get((name, beside)) if name not in {peer.name for peer in OURS} else None
        )

    def line(cell: Cell, cell_text: figures.CellText) -> list[str]:
        reference = summary(UVICORN.name, cell)
        texts = [cell_text(summary(name, cell), reference) for name in names]
        return [f"{VIEWS[cell[0]]}, {MIDDLEWARE[cell[1]]}", *texts]

    def lines(cell_text: figures.CellText) -> list[list[str]]:
        return [line(cell, cell_text) for cell in cells]

    return "\n".join(
        [
            "CPU per request, microseconds (and against uvicorn)",
            figures.table(header, lines(figures.cost_cell)),
            "",
            "Requests a second (and against uvicorn)",
            figures.table(header, lines(figures.rate_cell)),
            "* less than 90% of its core: the client, PostgreSQL or other work on this machine was the limit",
            "",
            _quality(list(summaries.values())),
        ]
    )


def _quality(summaries: list[figures.Summary]) -> str:
    worst = max(summary.spread for summary in summaries)
    return (
        f"{sum(s.requests for s in summaries):,} requests measured, 0 errors (each answer was compared "
        "byte for byte with Django's own; one wrong answer ends the run), "
        f"{sum(s.reconnects for s in summaries)} reconnects.\n"
        f"Medians of {summaries[0].rounds} rounds; the dearest round at most x{worst:.2f} of the cheapest."
    )


def as_json(samples: Samples) -> list[dict[str, object]]:
    return [
        {
            "server": name,
            "view": cell[0],
            "middleware": cell[1],
            **dataclasses.asdict(figures.summarize(value)),
            "samples": [dataclasses.asdict(sample) for sample in value],
        }
        for (name, cell), value in samples.items()
    ]
