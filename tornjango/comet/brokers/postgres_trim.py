from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tornjango.comet.brokers import postgres_sql as sql

#: Seconds between two rounds, whichever process makes them.
PAUSE = 10.0

#: Messages that one statement looks at: a few tens of milliseconds at most.
ROWS = 1000


def rounds(execute: Callable[[str, dict[str, object]], list[Any]]) -> Iterator[int | None]:
    """Removes what channels have beyond their limits, for ever, one short statement at each step.

    Gives how many rows the step has removed; None when there is nothing to do for PAUSE seconds, or another process does it.
    """
    while True:
        turn = execute(sql.TRIM, {"pause": PAUSE})
        if turn:
            yield from _expired(execute)
            yield from _beyond_limits(execute, turn[0][0])
            yield from _old_floors(execute)
        yield None


def _expired(execute: Callable[[str, dict[str, object]], list[Any]]) -> Iterator[int]:
    removed = ROWS
    while removed == ROWS:
        [(removed,)] = execute(sql.TRIM_EXPIRED, {"rows": ROWS})
        yield removed


def _beyond_limits(
    execute: Callable[[str, dict[str, object]], list[Any]], examined: int
) -> Iterator[int]:
    looked_at = ROWS
    while looked_at == ROWS:
        [(upto, looked_at, removed)] = execute(
            sql.TRIM_TO_LIMITS, {"examined": examined, "rows": ROWS}
        )
        examined = upto
        yield removed


def _old_floors(execute: Callable[[str, dict[str, object]], list[Any]]) -> Iterator[int]:
    removed = ROWS
    while removed == ROWS:
        [(removed,)] = execute(sql.TRIM_FLOORS, {"rows": ROWS})
        yield 0
