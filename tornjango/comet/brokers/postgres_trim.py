from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeAlias

from tornjango.comet.brokers import postgres_sql as sql

#: Seconds between two rounds, whichever process makes them.
PAUSE = 10.0

#: Rows that one statement removes.
ROWS = 5000

#: Messages that one looks at: first, at least and at most. What a message costs depends on how many channels share them, and
#: on how much those keep; so there are more or fewer, until a statement takes about STEP seconds.
FIRST, LEAST, MOST = 100, 10, 20_000
STEP = 0.5

Execute: TypeAlias = Callable[[str, dict[str, object]], list[Any]]


def trim(execute: Execute, pause: float) -> int:
    """Removes what channels have beyond their limits, by short statements; how many messages that were.

    Does nothing where a process did in the last ``pause`` seconds, or does it now.
    """
    turn = execute(sql.TRIM, {"pause": pause})
    if not turn:
        return 0
    removed = _all(execute, sql.TRIM_EXPIRED) + _beyond_limits(execute, turn[0][0])
    _all(execute, sql.TRIM_FLOORS)
    return removed


def _all(execute: Execute, statement: str) -> int:
    removed = 0
    step: int
    while True:
        [(step,)] = execute(statement, {"rows": ROWS})
        removed += step
        if step < ROWS:
            return removed


def _beyond_limits(execute: Execute, examined: int) -> int:
    removed, rows = 0, FIRST
    step: int
    while True:
        began = time.monotonic()
        [(upto, looked_at, step)] = execute(
            sql.TRIM_TO_LIMITS, {"examined": examined, "rows": rows}
        )
        removed += step
        if looked_at < rows:
            return removed
        examined = upto
        rows = _next_rows(rows, time.monotonic() - began)


def _next_rows(rows: int, took: float) -> int:
    if took > STEP:
        return max(rows // 2, LEAST)
    return min(rows * 2, MOST) if took < STEP / 2 else rows
