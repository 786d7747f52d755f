from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar, NamedTuple

from django.db import connections
from django.db.transaction import TransactionManagementError
from django.db.utils import NotSupportedError

from tornjango.db.compiler import Params, Row
from tornjango.db.engines.notices import Listener

#: How long a cancelled statement may take to end, in seconds, before its connection is given up.
CANCEL_TIMEOUT = 5.0

#: How long connecting may take, in seconds, where OPTIONS does not say; libpq itself would wait for ever.
CONNECT_TIMEOUT = 10.0


class Result(NamedTuple):
    """What a statement gave."""

    #: Empty for a statement that returns no rows.
    rows: list[Row]
    #: As in DB-API: a sequence for each column, beginning with its name; None for a statement that returns no rows.
    description: Sequence[Any] | None
    #: How many rows the statement returned or changed; -1 where there is no such number.
    rowcount: int
    #: The statement as it went to the server, where the driver tells; for logs.
    sent: bytes | None = None
    #: As in DB-API's cursor, where the driver has it.
    lastrowid: Any = None

    @property
    def columns(self) -> list[str]:
        return [column[0] for column in self.description or ()]


class Stream(ABC):
    """The rows of a query, fetched from the server as they are asked for."""

    #: As a Result's. May be None until rows were asked for.
    description: Sequence[Any] | None

    @abstractmethod
    async def fetch(self, size: int) -> list[Row]:
        """The next rows, at most ``size``; none when there are no more. Cancelled, the stream is of no more use."""

    @abstractmethod
    async def close(self) -> None:
        """Ends the query on the server; closing twice is harmless."""

    @abstractmethod
    def abandon(self) -> None:
        """``close`` for who cannot wait (a generator that is collected): it is done in the background."""


class Lease(ABC):
    """A connection of an engine that has one owner, and one transaction on it, begun already.

    It ends by ``commit``, ``rollback`` or ``abandon``, which give the connection back; then it is of no more use, and
    ending it again is harmless. One statement at a time: the owner sees to that.
    """

    @abstractmethod
    async def execute(self, sql: str, params: Params = None) -> Result:
        """Runs one statement in the transaction. Errors as of `Engine.execute`.

        Cancelled, the statement is cancelled on the server, and the lease remains good for what its owner still does
        to it: the next call waits until the statement has ended. When that takes more than CANCEL_TIMEOUT, or the
        connection is lost, so is the transaction; every later ``execute`` and ``commit`` raises OperationalError.
        """

    @abstractmethod
    async def stream(self, sql: str, params: Params = None) -> Stream:
        """The rows of a query in the transaction, by a server-side cursor; other statements may come between."""

    @abstractmethod
    async def commit(self) -> None:
        """Commits. Raises OperationalError when the connection is lost: whether it was committed is then unknown.

        Cancelled, it is carried to its end all the same, within CANCEL_TIMEOUT.
        """

    @abstractmethod
    async def rollback(self) -> None:
        """Rolls back. Where the connection is lost, so is the transaction, and nothing is raised."""

    @abstractmethod
    def abandon(self) -> None:
        """``rollback`` for who cannot wait: it is done in the background."""

    @abstractmethod
    async def mogrify(self, sql: str, params: Params) -> bytes:
        """``sql`` with ``params`` in it, quoted by the driver as for this connection."""

    async def context(self) -> Any:
        """As of `Engine.context`."""
        return None


class Engine(ABC):
    """The way queries reach one database.

    Whatever the engine: values come back as Django's own connection types them; errors are those of
    ``django.db.utils``, with the driver's as ``__cause__``; waiting for a connection is bounded, past which
    ``Overloaded`` is raised; a statement is sent once, whatever happens; a statement that is cancelled is cancelled on
    the server, and does not cost the engine a connection.
    """

    name: ClassVar[str]

    def __init__(self, alias: str) -> None:
        self.alias = alias
        #: A wrapper of Django's that never has a connection: for its settings and its operations.
        self.wrapper: Any = connections.create_connection(alias)

    async def open(self) -> None:  # noqa: B027
        """Makes sure that the database answers, or raises what keeps it from it. Not needed before a query."""

    async def close(self) -> None:  # noqa: B027
        """Closes all connections. Statements still running are cancelled. Closing twice is harmless."""

    @abstractmethod
    async def execute(self, sql: str, params: Params = None) -> Result:
        """Runs one statement, in autocommit. ``params`` of None leaves ``%`` in ``sql`` alone, as in Django.

        Raises TransactionManagementError for a statement that leaves a transaction open, which is rolled back.
        """

    @abstractmethod
    async def begin(self) -> Lease:
        """A transaction, with the isolation level that ``OPTIONS["isolation_level"]`` says, if it does."""

    @asynccontextmanager
    async def leased(self) -> AsyncIterator[Lease]:
        """A transaction that is rolled back at the end, unless it is committed before."""
        lease = await self.begin()
        try:
            yield lease
        finally:
            await lease.rollback()

    @abstractmethod
    async def stream(self, sql: str, params: Params = None) -> Stream:
        """The rows of a query, in a transaction of its own, which holds a connection until the stream is closed."""

    async def mogrify(self, sql: str, params: Params) -> bytes:
        """``sql`` with ``params`` in it, quoted by the driver."""
        async with self.leased() as lease:
            return await lease.mogrify(sql, params)

    async def context(self) -> Any:
        """What the driver's own functions take for a connection where they adapt values; None if it has no such thing.

        To be used at once: it belongs to a connection that may be lost later.
        """
        return None

    def listen(self, *channels: str) -> Listener:
        """What comes on channels of PostgreSQL's (LISTEN), over a connection beside the pool, which all listeners share.

        Raises ValueError for a name that is none of PostgreSQL's, and NotSupportedError on a database without channels.
        """
        raise NotSupportedError(
            f"Nobody can listen to database {self.alias!r}: its engine is {self.name!r}. Listening takes PostgreSQL, the "
            "engine momoko or psycopg, and a process with open pools: one that tornjango serves, or pools.open()."
        )

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """Numbers for people to read; at least ``engine``."""


def left_open(sql: str, alias: str) -> TransactionManagementError:
    """For a statement in autocommit after which a transaction is open."""
    return TransactionManagementError(
        f"{sql[:80]!r} left a transaction open on database {alias!r}; it is rolled back. "
        "A connection is held for one statement: for more, use db.atomic(), or transaction.atomic() in sync code."
    )
