"""Python's values in statements and results, as psycopg's cursors put them there. No I/O.

A cursor of psycopg's makes all its helpers anew for each statement. Here a connection keeps them, for that is most of
what a statement costs; they are renewed when the session's time zone or encoding has changed, which they remember.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from psycopg import Column, InternalError, OperationalError, pq
from psycopg._queries import PostgresClientQuery, PostgresQuery
from psycopg.adapt import AdaptersMap, Transformer
from psycopg.errors import error_from_result
from psycopg.pq.abc import PGconn, PGresult
from psycopg.rows import tuple_row
from psycopg.types import TypeInfo
from psycopg.types.hstore import register_hstore

from tornjango.db.compiler import Params
from tornjango.db.engines.libpq import Send, ends_connection
from tornjango.db.engines.psycopg_prepared import Prepared

TUPLES_OK = int(pq.ExecStatus.TUPLES_OK)
FATAL_ERROR = int(pq.ExecStatus.FATAL_ERROR)
GOOD = frozenset({pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK, pq.ExecStatus.EMPTY_QUERY})


class Context:
    """What psycopg asks of a connection where it only adapts values."""

    row_factory = staticmethod(tuple_row)

    def __init__(self, pgconn: PGconn, adapters: AdaptersMap) -> None:
        self.pgconn = pgconn
        self.adapters = AdaptersMap(adapters)

    @property
    def connection(self) -> Context:
        return self


class Values:
    """How values of one connection go in and out. ``server_side`` sends parameters apart from the statement.

    ``prepare_threshold`` says how often such a statement runs before it is prepared on the server; None is never.
    """

    def __init__(
        self,
        pgconn: PGconn,
        adapters: AdaptersMap,
        *,
        server_side: bool = False,
        prepare_threshold: int | None = None,
    ) -> None:
        self.context: Any = Context(pgconn, adapters)
        self._pgconn = pgconn
        self._query_class = PostgresQuery if server_side else PostgresClientQuery
        self._prepared = (
            None
            if prepare_threshold is None or not server_side
            else Prepared(pgconn, prepare_threshold)
        )
        self._renew()

    def bind(self, sql: Any, params: Params) -> PostgresQuery:
        """Raises psycopg's errors for values that it cannot adapt, and for placeholders that do not fit them."""
        query = self._query_class(self._transformer)
        query.convert(sql, params)
        return query

    def mogrify(self, sql: Any, params: Params) -> bytes:
        query = PostgresClientQuery(self._transformer)
        query.convert(sql, params)
        sent: bytes = query.query
        return sent

    def steps(self, query: PostgresQuery) -> list[Send]:
        """What is to be sent for a statement, one after the other; the last one has its results."""
        if self._prepared is not None and (steps := self._prepared.steps(query)):
            return steps
        if self._query_class is PostgresClientQuery or not query.params:
            # The simple protocol, which takes several commands in a statement.
            return [partial(self._pgconn.send_query, query.query)]
        return [
            partial(
                self._pgconn.send_query_params,
                query.query,
                query.params,
                param_types=query.types,
                param_formats=query.formats,
            )
        ]

    def first(self, query: PostgresQuery, results: Sequence[PGresult]) -> PGresult:
        """The result that a cursor of psycopg's would show. Raises the server's errors."""
        for result in results:
            if result.status not in GOOD:
                self._raise(result)
        if not results:
            raise InternalError("got no result from the query")
        if self._prepared is not None:
            self._prepared.ran(query, results)
        if self._session_parameters() != self._session:
            self._renew()
        return results[0]

    def reader(self, result: PGresult) -> Any:
        """Has ``load_rows(first, last, tuple)``. To be given to `done` when all are loaded."""
        self._transformer.set_pgresult(result)
        return self._transformer

    def done(self) -> None:
        """The memory of the result is not needed any more."""
        self._transformer.set_pgresult(None)

    def describe(self, result: PGresult) -> Description | None:
        if result.status != TUPLES_OK and not result.nfields:
            return None
        return Description(result, self.context.adapters, self._transformer.encoding)

    def register_types(self, types: Iterable[tuple[str, int, int]]) -> None:
        """As ``django.contrib.postgres.signals`` does: names, OIDs and those of arrays of hstore and citext."""
        for name, oid, array_oid in types:
            if name == "hstore":
                register_hstore(TypeInfo(name, oid, array_oid), self.context)
            else:
                TypeInfo(name, 0, array_oid).register(self.context)
        self._renew()

    def _renew(self) -> None:
        self._transformer: Any = Transformer(self.context)
        self._session = self._session_parameters()

    def _session_parameters(self) -> tuple[bytes | None, bytes | None]:
        status = self._pgconn.parameter_status
        return status(b"TimeZone"), status(b"client_encoding")

    def _raise(self, result: PGresult) -> None:
        if result.status == FATAL_ERROR:
            error = error_from_result(result, encoding=self._transformer.encoding)
            if ends_connection(result) and not isinstance(error, OperationalError):
                # psycopg goes by the reason: to have idled for too long in a transaction is an InternalError.
                raise OperationalError(str(error)) from error
            raise error
        name = pq.ExecStatus(result.status).name
        raise InternalError(f"unexpected result status from query: {name}")


class Description(Sequence[Column]):
    """A cursor's description, whose columns are made when somebody looks, for hardly anybody does."""

    def __init__(self, result: PGresult, adapters: AdaptersMap, encoding: str) -> None:
        columns = range(result.nfields)
        self._columns: list[tuple[bytes | None, int, int, int]] = [
            (result.fname(i), result.ftype(i), result.fmod(i), result.fsize(i)) for i in columns
        ]
        # What psycopg's Column asks of a cursor and of its result.
        self.adapters = adapters
        self._encoding = encoding

    @property
    def pgresult(self) -> Description:
        return self

    def __len__(self) -> int:
        return len(self._columns)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        cursor: Any = self
        return Column(cursor, index % len(self))

    def fname(self, index: int) -> bytes | None:
        return self._columns[index][0]

    def ftype(self, index: int) -> int:
        return self._columns[index][1]

    def fmod(self, index: int) -> int:
        return self._columns[index][2]

    def fsize(self, index: int) -> int:
        return self._columns[index][3]
