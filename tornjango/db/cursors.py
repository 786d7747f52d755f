"""A connection and its cursors as in DB-API, for green code: where the driver's would be, is an engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, Self

from django.db.utils import Error, InterfaceError, NotSupportedError, ProgrammingError

from tornjango import green
from tornjango.db.compiler import Params, Row
from tornjango.db.engines.base import Engine, Lease, Result, Stream

#: What psycopg's own functions, of which Django calls some, ask of a connection where they adapt values.
OF_CONTEXT = frozenset({"adapters", "pgconn", "row_factory"})

NO_RESULT = Result([], None, -1)


class PoolConnection:
    """Stands where a wrapper of Django's has the driver's connection. What waits is for green code, save `execute`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.autocommit = True
        self.closed = False
        self.lease: Lease | None = None
        #: What stands for it with the tasks that share its transaction, where they do.
        self.in_turn: Any = None

    async def execute(self, sql: str, params: Params = None) -> Result:
        """As an engine's: in the transaction, unless in autocommit."""
        if self.closed:
            raise InterfaceError("connection already closed")
        if self.autocommit:
            return await self.engine.execute(sql, params)
        return await (self.lease or await self.begun()).execute(sql, params)

    async def stream(self, sql: str, params: Params = None) -> Stream:
        if self.autocommit:
            return await self.engine.stream(sql, params)
        return await (self.lease or await self.begun()).stream(sql, params)

    async def mogrify(self, sql: str, params: Params) -> bytes:
        return await (self.lease or self.engine).mogrify(sql, params)

    def cursor(self, name: str | None = None, **options: Any) -> Cursor | ServerCursor:
        return ServerCursor(self) if name else Cursor(self)

    def set_autocommit(self, autocommit: bool) -> None:
        if autocommit and self.lease is not None:
            raise ProgrammingError("autocommit cannot be set in the middle of a transaction")
        self.autocommit = autocommit

    def commit(self) -> None:
        lease, self.lease = self.lease, None
        if lease is not None:
            green.wait(lease.commit())

    def rollback(self) -> None:
        lease, self.lease = self.lease, None
        if lease is not None:
            green.wait(lease.rollback())

    def close(self) -> None:
        """A transaction that is open is rolled back."""
        self.closed = True
        self.abandon()

    def abandon(self) -> None:
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.abandon()

    async def begun(self) -> Lease:
        """The transaction, which begins with its first statement."""
        if self.closed:
            raise InterfaceError("connection already closed")
        if self.lease is None:
            self.lease = await self.engine.begin()
        return self.lease

    @property
    def connection(self) -> Self:
        """psycopg's functions that adapt values ask whatever they are given for a connection."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name in OF_CONTEXT:
            context = green.wait((self.lease or self.engine).context())
            if context is not None:
                return getattr(context, name)
        if name == "getlimit" and self.engine.wrapper.vendor == "sqlite":
            return self._sqlite_limit
        raise AttributeError(
            f"{name!r}: in green code a database connection is one of many of a pool, and not the driver's own. "
            "Use cursors; or a sync view, in a worker thread."
        )

    def _sqlite_limit(self, category: int) -> int:
        """Every connection of the engine tells its wrapper; one is opened if none has been yet."""
        if "limits" not in vars(self.engine.wrapper):
            green.wait(self.engine.open())
        limit: int = self.engine.wrapper.limits[category]
        return limit


class Cursor:
    """A cursor as in DB-API, for green code. Its rows are here when ``execute`` returns."""

    arraysize = 1
    name = None

    def __init__(self, connection: PoolConnection) -> None:
        self.connection = connection
        self.closed = False
        self._set(NO_RESULT)

    def _set(self, result: Result) -> None:
        self.description = result.description
        self.rowcount = result.rowcount
        self._sent = result.sent
        self._failed: tuple[str, Params] | None = None
        self.lastrowid = result.lastrowid
        self._rows: list[Row] | None = None if result.description is None else result.rows
        self._next = 0

    def execute(self, sql: str, params: Params = None) -> Self:
        self._check_open()
        self._set(NO_RESULT)
        try:
            self._set(green.wait(self.connection.execute(sql, params)))
        except Error:
            self._failed = sql, params
            raise
        return self

    def executemany(self, sql: str, param_list: Sequence[Params]) -> None:
        count = 0
        for params in param_list:
            self.execute(sql, params)
            count += max(self.rowcount, 0)
        self._set(NO_RESULT._replace(rowcount=count, sent=self.query))

    def callproc(self, name: str, params: Sequence[Any] = ()) -> Sequence[Any]:
        self.execute(f"SELECT * FROM {name}({', '.join(['%s'] * len(params))})", list(params))
        return params

    @property
    def query(self) -> bytes | None:
        """The last statement as it was sent. After an error it is made for who asks: the log of queries."""
        if self._failed is not None:
            with contextlib.suppress(Error):
                self._sent = self.mogrify(*self._failed)
            self._failed = None
        return self._sent

    @property
    def _query(self) -> Self:
        """Where Django's log looks for the ``query`` of a cursor of psycopg's."""
        return self

    def mogrify(self, sql: str, params: Params = None) -> bytes:
        return green.wait(self.connection.mogrify(sql, params))

    def fetchone(self) -> Row | None:
        rows = self.fetchmany(1)
        return rows[0] if rows else None

    def fetchmany(self, size: int | None = None) -> list[Row]:
        start = self._next
        rows = self._fetched()[start : start + (self.arraysize if size is None else size)]
        self._next = start + len(rows)
        return rows

    def fetchall(self) -> list[Row]:
        rows = self._fetched()
        rows = rows[self._next :] if self._next else rows
        self._next += len(rows)
        return rows

    def __iter__(self) -> Iterator[Row]:
        while (row := self.fetchone()) is not None:
            yield row

    def close(self) -> None:
        self.closed = True
        self._rows = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.closed:
            raise InterfaceError("cursor already closed")

    def _fetched(self) -> list[Row]:
        self._check_open()
        if self._rows is None:
            raise ProgrammingError("no results to fetch")
        return self._rows


class ServerCursor:
    """A server-side cursor, for green code: its rows come as they are fetched."""

    arraysize = 1
    itersize = 2000
    rowcount = -1
    lastrowid = query = _query = None

    def __init__(self, connection: PoolConnection) -> None:
        self.connection = connection
        self.closed = False
        self._scope = green.current()
        self._stream: Stream | None = None

    @property
    def description(self) -> Sequence[Any] | None:
        return None if self._stream is None else self._stream.description

    def execute(self, sql: str, params: Params = None) -> Self:
        self._stream = green.wait(self.connection.stream(sql, params))
        return self

    def executemany(self, sql: str, param_list: Sequence[Params]) -> NoReturn:
        raise NotSupportedError("A server-side cursor runs one query.")

    def fetchone(self) -> Row | None:
        rows = self.fetchmany(1)
        return rows[0] if rows else None

    def fetchmany(self, size: int | None = None) -> list[Row]:
        if self._stream is None:
            raise ProgrammingError("no results to fetch")
        return green.wait(self._stream.fetch(self.arraysize if size is None else size))

    def fetchall(self) -> list[Row]:
        return list(self)

    def __iter__(self) -> Iterator[Row]:
        while rows := self.fetchmany(self.itersize):
            yield from rows

    def detach(self) -> Stream:
        """What `execute` began; whoever calls this closes it."""
        stream, self._stream = self._stream, None
        assert stream is not None
        return stream

    def close(self) -> None:
        """May be called by whoever collects a generator: then it does not wait."""
        self.closed = True
        stream, self._stream = self._stream, None
        if stream is None:
            return
        if green.active() and green.current() is self._scope:
            green.wait(stream.close())
        else:
            stream.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
