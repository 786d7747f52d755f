from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from tornjango.comet.brokers import postgres_sql as sql

#: Seconds between two rounds, whichever process makes them.
PAUSE = 10.0

#: Rows that one statement removes, or looks at: it takes a few tens of milliseconds.
ROWS = 1000

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
    removed = 0
    step: int
    while True:
        [(upto, looked_at, step)] = execute(
            sql.TRIM_TO_LIMITS, {"examined": examined, "rows": ROWS}
        )
        removed += step
        if looked_at < ROWS:
            return removed
        examined = upto
