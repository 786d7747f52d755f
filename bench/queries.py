"""``bin/bench queries``: one-row queries without HTTP, tornjango's engines beside Django's ASGI handler."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol

from bench.figures import ratio, table
from bench.servers import PSYCOPG, ROOT, TORNJANGO, UVICORN, BenchError, Environment, Peer, Place
from bench.ways import CONNECTIONS, TASKS, Count

Key = tuple[Environment, str]
Counts = dict[Key, list[Count]]

NAMES: dict[Key, str] = {
    ("peers", "one"): "Django under ASGI, one aget in a request",
    ("peers", "twenty"): "Django under ASGI, 20 aget in a request",
    ("momoko", "aget"): "momoko, aget",
    ("momoko", "fetch"): "momoko, db.fetch",
    ("momoko", "prepared"): "momoko, prepared",
    ("psycopg", "aget"): "psycopg 3, aget",
    ("psycopg", "fetch"): "psycopg 3, db.fetch",
    ("psycopg", "prepared"): "psycopg 3, prepared",
}
REFERENCE: Key = ("peers", "one")
EMPTY: Key = ("peers", "empty")


class Times(Protocol):
    """Of a `compare.Pace`."""

    @property
    def seconds(self) -> float: ...
    @property
    def warm_up(self) -> float: ...
    @property
    def rounds(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Figure:
    """The medians of the rounds, for one query."""

    cpu_us: float
    per_second: float


def environments(peers: Iterable[Peer]) -> list[Environment]:
    return [peer.environment for peer in peers if peer in (TORNJANGO, PSYCOPG, UVICORN)]


def run(place: Place, chosen: Sequence[Environment], pace: Times) -> Counts:
    counts: Counts = defaultdict(list)
    for number in range(pace.rounds):
        print(f"round {number + 1} of {pace.rounds}", file=sys.stderr, flush=True)
        measure(place, chosen, pace, counts)
    return counts


def measure(place: Place, chosen: Sequence[Environment], pace: Times, counts: Counts) -> None:
    """One round, each environment in a new process on the servers' core."""
    for environment in chosen:
        for count in _ask(place, environment, pace):
            counts[environment, count.way].append(count)


def _ask(place: Place, environment: Environment, pace: Times) -> list[Count]:
    times = (str(pace.seconds), str(pace.warm_up or 0.1))
    done = subprocess.run(
        [place.python(environment), "-m", "bench.ways", *times],
        env=place.environ(environment),
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=place.keep_to_core,
    )
    if done.returncode:
        raise BenchError(f"Queries by {environment} failed:\n{done.stderr[-3000:]}")
    return [Count(**one) for one in json.loads(done.stdout)]


def figures(counts: Counts) -> dict[Key, Figure]:
    """What a request costs without a query, is taken off one with queries."""
    empty = _median([one.cpu / one.calls for one in counts.get(EMPTY, ())])
    return {
        key: Figure(
            cpu_us=_median(
                [(one.cpu / one.calls - _base(key, empty)) / one.queries for one in counts[key]]
            )
            * 1e6,
            per_second=_median([one.calls * one.queries / one.seconds for one in counts[key]]),
        )
        for key in NAMES
        if key in counts
    }


def _base(key: Key, empty: float) -> float:
    return empty if key[0] == EMPTY[0] else 0.0


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def report(counts: Counts) -> str:
    found = figures(counts)
    reference = found.get(REFERENCE)
    lines = [
        [
            NAMES[key],
            f"{figure.cpu_us:,.0f}",
            ratio(figure.cpu_us, reference.cpu_us if reference else None),
            f"{figure.per_second:,.0f}",
        ]
        for key, figure in found.items()
    ]
    header = ["CPU per one-row query, microseconds", "us", "", "a second"]
    return "\n".join([table(header, lines), *_notes(counts)])


def _notes(counts: Counts) -> list[str]:
    conditions = f"In one process without HTTP, {TASKS} at once over {CONNECTIONS} connections."
    if EMPTY not in counts:
        return [conditions]
    empty = _median([one.cpu / one.calls for one in counts[EMPTY]]) * 1e6
    return [
        conditions,
        f"Of Django's, the {empty:,.0f} us are taken off that its ASGI handler spends on threads and signals "
        "around a view without a query.",
    ]


def as_json(counts: Counts) -> list[dict[str, object]]:
    return [
        {
            "environment": key[0],
            "way": key[1],
            **dataclasses.asdict(figure),
            "samples": [dataclasses.asdict(count) for count in counts[key]],
        }
        for key, figure in figures(counts).items()
    ]
