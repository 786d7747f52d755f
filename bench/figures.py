"""From measurements to what is printed: medians over rounds, ratios, text tables. No I/O."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence

# Below this share of its core a server was waiting for the client or for PostgreSQL.
BUSY = 0.9


@dataclasses.dataclass(frozen=True)
class Sample:
    """One server under one load, once."""

    requests: int
    seconds: float
    cpu: float
    """Seconds of user and system time of the server and its children."""
    p50: float
    p99: float
    reconnects: int = 0


@dataclasses.dataclass(frozen=True)
class Summary:
    """The medians of the rounds; times in the unit that the name says."""

    cpu_us: float
    spread: float
    """The dearest round against the cheapest: 1.0 is none."""
    per_second: float
    busy: float
    """The server's share of its core."""
    p50_ms: float
    p99_ms: float
    requests: int
    reconnects: int
    rounds: int


def summarize(samples: Sequence[Sample]) -> Summary:
    """Raises ValueError for no samples, or one without requests."""
    if not samples or not all(sample.requests for sample in samples):
        raise ValueError("no figure can be made of no requests")
    costs = [sample.cpu / sample.requests * 1e6 for sample in samples]
    return Summary(
        cpu_us=statistics.median(costs),
        spread=max(costs) / min(costs) if min(costs) else 1.0,
        per_second=statistics.median(s.requests / s.seconds for s in samples),
        busy=statistics.median(s.cpu / s.seconds for s in samples),
        p50_ms=statistics.median(s.p50 for s in samples),
        p99_ms=statistics.median(s.p99 for s in samples),
        requests=sum(s.requests for s in samples),
        reconnects=sum(s.reconnects for s in samples),
        rounds=len(samples),
    )


CellText = Callable[[Summary | None, Summary | None], str]
"""What a cell shows of a summary, beside the one it is compared with."""


def ratio(value: float, against: float | None) -> str:
    """How many times ``against``; nothing where there is nothing to compare with."""
    return f"x{value / against:.2f}" if against else ""


def cost_cell(summary: Summary | None, reference: Summary | None) -> str:
    if summary is None:
        return "-"
    against = ratio(summary.cpu_us, reference.cpu_us if reference else None)
    return f"{summary.cpu_us:,.0f} {against}".strip()


def rate_cell(summary: Summary | None, reference: Summary | None) -> str:
    if summary is None:
        return "-"
    against = ratio(summary.per_second, reference.per_second if reference else None)
    star = "" if summary.busy >= BUSY else "*"
    return f"{summary.per_second:,.0f}{star} {against}".strip()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be; the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def shares(counts: Mapping[str, int], total_us: float) -> list[tuple[str, float, float]]:
    """Samples by name as (name, share, microseconds), the largest first."""
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return [(name, count / total, count / total * total_us) for name, count in ordered]
