from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import count
from typing import Protocol

from psycopg import pq
from psycopg.pq.abc import PGconn, PGresult

from tornjango.db.engines.libpq import Send

#: Statements that a connection keeps prepared, and as many more that it counts. As many as psycopg.
KEPT = 100

# After these a prepared statement may mean something else, or nothing. psycopg looks for the same ones.
_UNSETTLING = re.compile(rb"(?:DROP|ALTER|ROLLBACK|DISCARD ALL|DEALLOCATE ALL)\b").match
_IN_ERROR = int(pq.TransactionStatus.INERROR)


class Bound(Protocol):
    """A statement with its parameters, as libpq wants them."""

    query: bytes
    params: Sequence[bytes | bytearray | memoryview | None] | None
    types: tuple[int, ...]
    formats: Sequence[pq.Format] | None


class Prepared:
    """Which statements one connection prepares on the server: those that ran ``threshold`` times."""

    def __init__(self, pgconn: PGconn, threshold: int) -> None:
        self._pgconn = pgconn
        self._threshold = threshold
        self._counts: OrderedDict[tuple[bytes, tuple[int, ...]], int] = OrderedDict()
        self._names: OrderedDict[tuple[bytes, tuple[int, ...]], bytes] = OrderedDict()
        self._numbers = count()
        self._stale: list[bytes] = []

    def steps(self, bound: Bound) -> list[Send] | None:
        """What runs the statement, step by step, if it is prepared or is to be; else None."""
        key = bound.query, bound.types
        name = self._names.get(key)
        if name is not None:
            self._names.move_to_end(key)
            return [*self._tidying(), partial(self._send, name, bound)]
        if self._counts.get(key, 0) < self._threshold:
            return None
        name = b"tornjango_%d" % next(self._numbers)
        prepare = partial(self._pgconn.send_prepare, name, bound.query, param_types=bound.types)
        return [*self._tidying(), prepare, partial(self._send_new, name, bound)]

    def ran(self, bound: Bound, results: Sequence[PGresult]) -> None:
        """To be told of each statement that succeeded."""
        if any(_UNSETTLING(result.command_status or b"") for result in results):
            self.clear()
        elif len(results) == 1 and (key := (bound.query, bound.types)) not in self._names:
            # One command: the server prepares no more.
            self._counts[key] = self._counts.get(key, 0) + 1
            self._counts.move_to_end(key)
            if len(self._counts) > KEPT:
                self._counts.popitem(last=False)

    def clear(self) -> None:
        self._counts.clear()
        self._stale += self._names.values()
        self._names.clear()

    def _send(self, name: bytes, bound: Bound) -> None:
        self._pgconn.send_query_prepared(name, bound.params, param_formats=bound.formats)

    def _send_new(self, name: bytes, bound: Bound) -> None:
        key = bound.query, bound.types
        self._counts.pop(key, None)
        self._names[key] = name
        if len(self._names) > KEPT:
            self._stale.append(self._names.popitem(last=False)[1])
        self._send(name, bound)

    def _tidying(self) -> list[Send]:
        if not self._stale or self._pgconn.transaction_status == _IN_ERROR:
            # Then it would fail, and the statement after it not be sent, which may be a ROLLBACK.
            return []
        stale, self._stale = self._stale, []
        sql = b";".join(b"DEALLOCATE " + name for name in stale)
        return [partial(self._pgconn.send_query, sql)]
