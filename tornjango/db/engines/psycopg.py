"""PostgreSQL by psycopg 3, below its connections and cursors: libpq on the event loop, values by psycopg's adapters.

Rows, errors and statements are those of the connection that Django would open with the same settings, ``OPTIONS``
``server_side_binding`` and ``prepare_threshold`` included. ``OPTIONS["pool"]`` and ``cursor_factory`` are for Django's own
connections, in worker threads and commands; here the pool is this one, and cursors are not used.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import psycopg
from django.db.utils import InterfaceError, OperationalError
from psycopg import pq
from psycopg._queries import PostgresQuery
from psycopg.pq.abc import PGresult

from tornjango.conf import Config
from tornjango.db.compiler import Params, Row
from tornjango.db.engines import base, lease
from tornjango.db.engines.aside import aside
from tornjango.db.engines.base import Result
from tornjango.db.engines.libpq import Link
from tornjango.db.engines.notices import Notice, NoticeConnection
from tornjango.db.engines.pool import Pool
from tornjango.db.engines.postgres import PostgresEngine
from tornjango.db.engines.psycopg_session import PsycopgSession
from tornjango.db.engines.psycopg_values import Values
from tornjango.db.engines.session import EXTENSION_TYPES

# Rows made of what the server sent before other tasks get their turn: a few milliseconds.
SLICE = 1000

IDLE = int(pq.TransactionStatus.IDLE)
INERROR = int(pq.TransactionStatus.INERROR)
IN_TRANSACTION = frozenset({int(pq.TransactionStatus.INTRANS), INERROR})


class PsycopgEngine(PostgresEngine["Connection"]):
    name = "psycopg"

    def __init__(self, alias: str, config: Config) -> None:
        super().__init__(alias, config)
        self._session = PsycopgSession(self.wrapper)
        self._made_pool: Pool[Connection] | None = None

    async def _acquire(self) -> Connection:
        if self._made_pool is None:
            self._made_pool = Pool(self._gate, self._connect)
        return await self._made_pool.acquire()

    def _release(self, connection: Connection) -> None:
        assert self._made_pool
        self._made_pool.release(connection)

    def _busy(self) -> Iterable[Connection]:
        return self._made_pool.busy if self._made_pool else ()

    async def _stop_connecting(self) -> None:
        if self._made_pool:
            await self._made_pool.close(InterfaceError)

    def _close_idle(self) -> None:
        """They were closed when the pool was, or when they were released."""

    def _counts(self) -> dict[str, int]:
        return self._made_pool.counts() if self._made_pool else {"free": 0, "connecting": 0}

    async def _connect_for_notices(self) -> NoticeConnection:
        with self.wrapper.wrap_database_errors:
            return _NoticeConnection(self.wrapper, await self._connect())

    async def _connect(self) -> Connection:
        limit = self._session.connect_timeout
        try:
            async with asyncio.timeout(limit):
                return await Connection.open(self._session)
        except TimeoutError:
            reason = f"The server did not answer in {limit:g} seconds."
        except (OSError, psycopg.OperationalError) as exc:
            reason = str(exc)
        raise psycopg.OperationalError(f"Cannot connect to database {self.alias!r}: {reason}")


class Connection(lease.Connection):
    """A connection as Django's own would be set up."""

    #: The one that runs, or ran last.
    statement: asyncio.Future[PGresult] | None = None

    def __init__(self, link: Link, values: Values) -> None:
        self.link = link
        self._values = values
        self._pgconn = link.pgconn
        self._query: PostgresQuery | None = None

    @classmethod
    async def open(cls, session: PsycopgSession) -> Connection:
        link = await Link.open(await aside(session.conninfo))
        try:
            connection = cls(link, session.values(link.pgconn))
            await connection._set_up(session)
        except BaseException:
            link.close()
            raise
        return connection

    async def _set_up(self, session: PsycopgSession) -> None:
        session.check_server(self._pgconn.server_version)
        timezone = self._pgconn.parameter_status(b"TimeZone") or b""
        for sql, params in session.statements(timezone.decode()):
            await self._execute(sql, params)
        if session.wants_extension_types:
            types = await self._execute(EXTENSION_TYPES, None)
            self._values.register_types(types.rows)

    @property
    def context(self) -> Any:
        """What psycopg's own functions take for a connection where they adapt values."""
        return self._values.context

    @property
    def farewell(self) -> str:
        return self.link.farewell

    @property
    def lost(self) -> bool:
        return self.link.lost

    @property
    def in_transaction(self) -> bool:
        return self._pgconn.transaction_status in IN_TRANSACTION

    @property
    def in_error(self) -> bool:
        return bool(self._pgconn.transaction_status == INERROR)

    def is_alive(self) -> bool:
        return self.link.is_alive()

    def is_idle(self) -> bool:
        return not self.link.lost and self._pgconn.transaction_status == IDLE

    def start(self, sql: str, params: Params) -> asyncio.Future[PGresult]:
        query = self._query = self._values.bind(sql, params)
        first = partial(self._values.first, query)
        self.statement = self.link.start(first, *self._values.steps(query))
        return self.statement

    def outcome(self, statement: asyncio.Future[Any]) -> asyncio.Future[Any]:
        """The future itself, for a statement runs on without it: a shield costs a tenth of a statement."""
        return statement

    async def result(self, outcome: PGresult) -> Result:
        assert self._query
        sent = self._query.query
        description = self._values.describe(outcome)
        if description is None:
            count = outcome.command_tuples
            return Result([], None, -1 if count is None else count, sent)
        return Result(await self._rows(outcome), description, outcome.ntuples, sent)

    async def _rows(self, result: PGresult) -> list[Row]:
        reader, total = self._values.reader(result), result.ntuples
        try:
            rows: list[Row] = reader.load_rows(0, min(total, SLICE), tuple)
            while len(rows) < total:
                await asyncio.sleep(0)
                rows += reader.load_rows(len(rows), min(total, len(rows) + SLICE), tuple)
            return rows
        finally:
            self._values.done()

    async def stop(self, statement: asyncio.Future[Any]) -> None:
        try:
            async with asyncio.timeout(base.CANCEL_TIMEOUT):
                await self.link.stop()
        except (TimeoutError, psycopg.Error):
            self.discard()

    def discard(self) -> None:
        self.link.close()

    async def mogrify(self, sql: str, params: Params) -> bytes:
        return self._values.mogrify(sql, params)

    async def _execute(self, sql: str, params: Params) -> Result:
        return await self.result(await self.start(sql, params))


class _NoticeConnection(NoticeConnection):
    def __init__(self, wrapper: Any, connection: Connection) -> None:
        self._wrapper = wrapper
        self._connection = connection
        self._notices: list[Notice] = []
        self._news: Callable[[], object] | None = None
        connection.link.on_notify = self._notified
        connection.link.on_lost = self._tell

    async def execute(self, sql: str) -> None:
        with self._wrapper.wrap_database_errors:
            await self._connection.start(sql, None)

    def watch(self, news: Callable[[], object]) -> None:
        self._news = news

    def unwatch(self) -> None:
        self._news = None

    def drain(self) -> list[Notice]:
        if self._connection.lost:
            raise OperationalError("The connection was lost.")
        notices, self._notices = self._notices, []
        return notices

    def close(self) -> None:
        self._connection.discard()

    def _notified(self, it: pq.PGnotify) -> None:
        self._notices.append(Notice(it.relname.decode(), it.extra.decode(), it.be_pid))
        self._tell()

    def _tell(self) -> None:
        if self._news is not None:
            self._news()
