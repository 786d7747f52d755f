"""``bin/bench reload``: how long ``runserver`` takes to serve changed code, with and without streams that do not end."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.figures import table
from bench.servers import BenchError
from tests.projects import STREAMS, Project

STREAM_COUNT = 1000
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Reload:
    streams: int
    """Open when the code changes."""
    seconds: float
    """From the reloader's notice, which it gives once a second, to an answer of the new code; the median."""
    slowest: float
    rounds: int


def run(streams: int = STREAM_COUNT, rounds: int = ROUNDS) -> list[Reload]:
    """Without streams and with them, in turn. Raises BenchError."""
    samples: dict[int, list[float]] = {0: [], streams: []}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        project = Project(Path(folder))
        for _ in range(rounds):
            for count, seconds in samples.items():
                seconds.append(_measure(project, count))
    return [
        Reload(count, statistics.median(seconds), max(seconds), rounds)
        for count, seconds in samples.items()
    ]


def _measure(project: Project, streams: int) -> float:
    try:
        return _seconds(project, streams)
    except (AssertionError, OSError) as error:
        raise BenchError(f"A reload with {streams} streams failed: {error}") from error


def _seconds(project: Project, streams: int) -> float:
    """Of one reload, of a server of its own."""
    project.write("urls.py", STREAMS)
    with (
        project.running("manage.py", "runserver", "127.0.0.1:0") as server,
        contextlib.ExitStack() as opened,
    ):
        server.wait_until_it_serves()
        for _ in range(streams):
            opened.enter_context(server.open_stream())
        server.change(project.folder / "urls.py", STREAMS.replace("before", "after"))
        start = time.monotonic()
        server.wait_until_it_serves()
        if (answer := server.get("/")) != "after":
            raise BenchError(f"After the reload the answer is {answer!r}.")
        return time.monotonic() - start


def report(results: Sequence[Reload]) -> str:
    header = ["seconds from a change that is noticed to the new code's answer", "median", "slowest"]
    rows = [
        [f"{result.streams:,} streams", f"{result.seconds:.2f}", f"{result.slowest:.2f}"]
        for result in results
    ]
    return table(header, rows)
