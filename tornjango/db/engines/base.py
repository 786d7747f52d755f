from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, ClassVar, NamedTuple, ParamSpec, TypeVar

from asgiref.sync import sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.db.models import prefetch_related_objects

from tornjango.db.compiler import AnyQuerySet, Compiled, Params, Row, compile

P = ParamSpec("P")
T = TypeVar("T")

# Rows made into objects before other tasks get their turn: a few milliseconds.
SLICE = 1000


class Result(NamedTuple):
    """What a statement gave; ``rows`` and ``columns`` are empty for one that returns no rows."""

    rows: list[Row]
    columns: list[str]
    rowcount: int


class Engine(ABC):
    """The way queries reach one database.

    Whatever the engine: values come back as Django's own connection types them; errors are those of
    ``django.db.utils``, with the driver's as ``__cause__``; waiting for a connection is bounded, past which
    ``Overloaded`` is raised; a statement is sent once, whatever happens; a statement that is cancelled does not cost
    the engine a connection.
    """

    name: ClassVar[str]

    def __init__(self, alias: str) -> None:
        self.alias = alias

    async def open(self) -> None:  # noqa: B027
        """Makes sure that the database answers, or raises what keeps it from it. Not needed before a query."""

    async def close(self) -> None:  # noqa: B027
        """Closes all connections. Statements still running are cancelled. Closing twice is harmless."""

    def share(self) -> None:  # noqa: B027
        """Makes ``django.db.connections[alias]`` the engine's, in this context: for event loops, in any task."""

    @abstractmethod
    async def execute(self, sql: str, params: Params = None) -> Result:
        """Runs one statement, in autocommit. ``params`` of None leaves ``%`` in ``sql`` alone, as in Django."""

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """Numbers for people to read; at least ``engine``."""

    async def fetch(self, queryset: AnyQuerySet) -> list[Any]:
        """What ``list(queryset)`` would give. The queryset itself is left as it was."""
        state: Any = queryset
        if state._result_cache is None:
            objects = await self._objects(queryset)
        else:
            objects = list(state._result_cache)
        lookups = state._prefetch_related_lookups
        if lookups and objects and not state._prefetch_done:
            await sync_to_async(prefetch_related_objects)(objects, *lookups)
        return objects

    async def _objects(self, queryset: AnyQuerySet) -> list[Any]:
        compiled = await here_or_in_thread(compile, queryset, self.alias)
        if compiled.sql is None:
            return []
        return await _hydrate(compiled, await self.execute(compiled.sql, compiled.params))


async def _hydrate(compiled: Compiled, result: Result) -> list[Any]:
    if len(result.rows) <= SLICE:
        return await here_or_in_thread(compiled.hydrate, result.rows, result.columns)
    try:
        return await _in_slices(compiled.objects(result.rows, result.columns))
    except SynchronousOnlyOperation:
        return await sync_to_async(compiled.hydrate)(result.rows, result.columns)


async def _in_slices(objects: Iterator[Any]) -> list[Any]:
    made: list[Any] = []
    while piece := list(islice(objects, SLICE)):
        made += piece
        await asyncio.sleep(0)
    return made


async def here_or_in_thread(fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``fn(...)``; again in a worker thread, if it turns out to want Django's own connection.

    Compiling hardly ever does, nor does making objects: a lookup that has the driver quote for it, a model whose
    ``from_db`` queries.
    """
    try:
        return fn(*args, **kwargs)
    except SynchronousOnlyOperation:
        return await sync_to_async(fn)(*args, **kwargs)
