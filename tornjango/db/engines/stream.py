from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import count
from typing import Any

from tornjango.db.compiler import Params, Row
from tornjango.db.engines.base import Lease, Stream

_numbers = count(1)


class CursorLease(Lease):
    """A lease on PostgreSQL. Its streams are server-side cursors by SQL, which any driver can speak."""

    @property
    @abstractmethod
    def aborted(self) -> bool:
        """Whether the server would refuse all but a rollback: after an error, or when the connection is lost."""

    async def stream(self, sql: str, params: Params = None) -> Stream:
        return await CursorStream.declare(self, sql, params)


class CursorStream(Stream):
    """A cursor of PostgreSQL's: DECLARE, FETCH and CLOSE as statements of a lease.

    It lives as long as the lease's transaction, and a savepoint that is rolled back takes those along that were
    declared since. `of_query` makes one that has the lease to itself.
    """

    #: None until rows were asked for: the server does not tell before.
    description: Sequence[Any] | None = None

    def __init__(self, lease: CursorLease, name: str, *, owns_lease: bool) -> None:
        self._lease = lease
        self._name = name
        self._owns_lease = owns_lease
        self._failed = False
        self._closed = False

    @classmethod
    async def declare(
        cls, lease: CursorLease, sql: str, params: Params, *, owns_lease: bool = False
    ) -> CursorStream:
        """In the lease's transaction. Raises as ``lease.execute`` does for a statement that is no query."""
        name = f"tornjango_{next(_numbers)}"
        await lease.execute(f"DECLARE {name} NO SCROLL CURSOR FOR {sql}", params)
        return cls(lease, name, owns_lease=owns_lease)

    @classmethod
    async def of_query(cls, lease: CursorLease, sql: str, params: Params) -> CursorStream:
        """The lease ends with it: by a commit when it is closed, for a query may call functions that write; by a
        rollback when it failed, when it was cancelled, or abandoned, and when there is no cursor for want of a query.
        """
        try:
            return await cls.declare(lease, sql, params, owns_lease=True)
        except BaseException:
            lease.abandon()
            raise

    async def fetch(self, size: int) -> list[Row]:
        failed, self._failed = self._failed, True
        result = await self._lease.execute(f"FETCH FORWARD {size:d} FROM {self._name}")
        self._failed = failed
        self.description = result.description
        return result.rows

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if not self._owns_lease:
            await self._close_cursor()
        elif self._failed:
            await self._lease.rollback()
        else:
            await self._lease.commit()

    def abandon(self) -> None:
        """A cursor in somebody's transaction is left to end with that."""
        if not self._closed and self._owns_lease:
            self._lease.abandon()
        self._closed = True

    async def _close_cursor(self) -> None:
        if self._failed or self._lease.aborted:
            # The statement would fail as well; the rollback that must follow does without it.
            return
        # A savepoint may have taken the cursor along, and closing one that is not there aborts the transaction.
        found = await self._lease.execute(
            "SELECT 1 FROM pg_catalog.pg_cursors WHERE name = %s", [self._name]
        )
        if found.rows:
            await self._lease.execute(f"CLOSE {self._name}")
