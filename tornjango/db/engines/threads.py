from __future__ import annotations

from typing import Any

from asgiref.sync import sync_to_async
from django.db import connections

from tornjango.db.compiler import AnyQuerySet, Params, unevaluated
from tornjango.db.engines.base import Engine, Result


class ThreadsEngine(Engine):
    """Django's own connection, in a worker thread: for every database that has no engine of its own.

    Outside tornjango's server (Django's test client, a shell) it is the caller's own connection, open transaction
    included. A statement that was cancelled runs to its end in its thread; nobody waits for it.
    """

    name = "threads"

    def __init__(self, alias: str, config: Any = None) -> None:
        super().__init__(alias)

    async def begin(self) -> Any:
        raise NotImplementedError

    async def stream(self, sql: str, params: Params = None) -> Any:
        raise NotImplementedError

    async def execute(self, sql: str, params: Params = None) -> Result:
        return await sync_to_async(self._execute)(sql, params)

    async def _objects(self, queryset: AnyQuerySet) -> list[Any]:
        copy = unevaluated(queryset, self.alias)
        copy._prefetch_related_lookups = ()
        return await sync_to_async(_evaluate)(copy)

    async def open(self) -> None:
        await sync_to_async(self._connect)()

    def status(self) -> dict[str, Any]:
        return {"engine": self.name}

    def _connect(self) -> None:
        connections[self.alias].ensure_connection()

    def _execute(self, sql: str, params: Params) -> Result:
        with connections[self.alias].cursor() as cursor:
            cursor.execute(sql, params)
            if cursor.description is None:
                return Result([], None, cursor.rowcount)
            return Result(cursor.fetchall(), cursor.description, cursor.rowcount)


def _evaluate(queryset: Any) -> list[Any]:
    return list(queryset)
