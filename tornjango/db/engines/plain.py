from __future__ import annotations

from typing import Any

from asgiref.sync import sync_to_async
from django.db import connections

from tornjango.db.compiler import Params
from tornjango.db.engines.base import Engine, Lease, Result, Stream


class PlainEngine(Engine):
    """Django's own connection of the caller, in a process that tornjango does not serve."""

    name = "plain"

    async def execute(self, sql: str, params: Params = None) -> Result:
        return await sync_to_async(self._execute)(sql, params)

    async def begin(self) -> Lease:
        raise NotImplementedError

    async def stream(self, sql: str, params: Params = None) -> Stream:
        raise NotImplementedError

    def status(self) -> dict[str, Any]:
        return {"engine": self.name}

    def _execute(self, sql: str, params: Params) -> Result:
        with connections[self.alias].cursor() as cursor:
            cursor.execute(sql, params)
            rows = [] if cursor.description is None else cursor.fetchall()
            return Result(rows, cursor.description, cursor.rowcount)
