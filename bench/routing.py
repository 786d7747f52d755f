"""``bin/bench routing``: finding the view of a path among many URL patterns, without HTTP, beside Django's resolver.

Run as a module it measures in its own process, and prints what it found as JSON.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.figures import table
from bench.servers import ROOT, BenchError

SIZES = (10, 10_000)
ROUNDS = 5
#: Of one measurement.
SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Lookups:
    """Of one resolver: microseconds of CPU for a path, by which pattern matches it."""

    first: float
    middle: float
    last: float
    none: float


@dataclasses.dataclass(frozen=True)
class Routing:
    patterns: int
    django: Lookups
    tornjango: Lookups
    import_seconds: float
    """Making the patterns, as importing a ``urls.py`` does."""
    index_seconds: float
    patterns_kib: int
    index_kib: int


def run(sizes: Sequence[int] = SIZES) -> list[Routing]:
    """Each size in a new process. Raises BenchError."""
    return [_ask(size) for size in sizes]


def _ask(size: int) -> Routing:
    command = [sys.executable, "-m", "bench.routing", str(size)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"Routing among {size} patterns failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    sides = {name: Lookups(**found[name]) for name in ("django", "tornjango")}
    return Routing(**{**found, **sides})


def report(results: Sequence[Routing]) -> str:
    header = ["CPU per path, microseconds"]
    for result in results:
        header += [f"Django, {result.patterns:,}", f"tornjango, {result.patterns:,}"]
    rows = [
        [NAMES[field.name], *(cell for result in results for cell in _cells(result, field.name))]
        for field in dataclasses.fields(Lookups)
    ]
    return "\n".join([table(header, rows), *map(_start, results)])


NAMES = {
    "first": "the first pattern matches",
    "middle": "the middle one",
    "last": "the last one",
    "none": "none: 404",
}


def _cells(result: Routing, name: str) -> list[str]:
    django, ours = getattr(result.django, name), getattr(result.tornjango, name)
    return [f"{django:,.1f}", f"{ours:,.1f}"]


def _start(result: Routing) -> str:
    return (
        f"{result.patterns:,} patterns: made in {result.import_seconds:.3f} s and {result.patterns_kib:,} KiB; "
        f"the index in {result.index_seconds:.3f} s and {result.index_kib:,} KiB."
    )


# In a process of its own


def measure(patterns: int) -> Routing:
    """Django has to be set up, with any URLconf."""
    from django.urls import URLResolver
    from django.urls.resolvers import RegexPattern

    from tornjango.resolving import Index

    before, started = _kib(), time.process_time()
    entries = _entries(patterns)
    made, patterns_kib = time.process_time() - started, _kib() - before
    resolver = URLResolver(RegexPattern(r"^/"), entries)
    before, started = _kib(), time.process_time()
    index = Index(resolver)
    indexed, index_kib = time.process_time() - started, _kib() - before
    return Routing(
        patterns=patterns,
        django=_lookups(resolver.resolve, patterns),
        tornjango=_lookups(index.resolve, patterns),
        import_seconds=made,
        index_seconds=indexed,
        patterns_kib=patterns_kib,
        index_kib=index_kib,
    )


def _entries(patterns: int) -> list[Any]:
    from django.urls import path

    def view(request: object) -> None: ...

    return [
        path(f"section{number}/<int:pk>/", view, name=f"n{number}") for number in range(patterns)
    ]


def _lookups(resolve: Callable[[str], Any], patterns: int) -> Lookups:
    numbers = {"first": 0, "middle": patterns // 2, "last": patterns - 1, "none": patterns}
    paths = {name: f"/section{number}/7/" for name, number in numbers.items()}
    return Lookups(**{name: _microseconds(resolve, path) for name, path in paths.items()})


def _microseconds(resolve: Callable[[str], Any], path: str) -> float:
    _resolve_for(0.02, resolve, path)  # regular expressions are compiled when they are first needed
    return statistics.median(_resolve_for(SECONDS / ROUNDS, resolve, path) for _ in range(ROUNDS))


def _resolve_for(seconds: float, resolve: Callable[[str], Any], path: str) -> float:
    from django.urls import Resolver404

    count, started = 0, time.process_time()
    while (passed := time.process_time() - started) < seconds or not count:
        for _ in range(10):
            try:  # noqa: SIM105  what is measured here should have little around it
                resolve(path)
            except Resolver404:
                pass
        count += 10
    return passed / count * 1e6


def _kib() -> int:
    """What this process holds of memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4


def main(patterns: int) -> None:
    import django
    from django.conf import settings

    settings.configure(ROOT_URLCONF=(), DATABASES={})
    django.setup()
    print(json.dumps(dataclasses.asdict(measure(patterns))))


if __name__ == "__main__":
    main(int(sys.argv[1]))
