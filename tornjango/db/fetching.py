"""What a queryset gives, over whatever runs its SQL: an engine, or the transaction of the running task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, ParamSpec, TypeVar

from django.core.exceptions import SynchronousOnlyOperation
from django.db.models import prefetch_related_objects

from tornjango import asyncdjango
from tornjango.db import connection, pools
from tornjango.db.compiler import AnyQuerySet, Compiled, compile, unevaluated
from tornjango.db.connection import InTurn, PoolConnection
from tornjango.db.engines.base import Engine, Result

P = ParamSpec("P")
T = TypeVar("T")

#: Rows made into objects before other tasks get their turn: a few milliseconds.
SLICE = 1000


def executor(alias: str) -> PoolConnection | InTurn | Engine:
    """Where a statement of the running task goes: into its transaction, if one is open, or to the pool.

    Raises TransactionManagementError inside a transaction of another task.
    """
    return connection.transaction(alias) or pools.get(alias)


async def fetch(queryset: AnyQuerySet, alias: str) -> list[Any]:
    """What ``list(queryset)`` would give. The queryset itself is left as it was."""
    state: Any = queryset
    if not pools.is_open():
        return await asyncdjango.run(_evaluate, unevaluated(queryset, alias))
    if state._result_cache is None:
        objects = await _objects(queryset, alias)
    else:
        objects = list(state._result_cache)
    lookups = state._prefetch_related_lookups
    if lookups and objects and not state._prefetch_done:
        await prefetch(objects, lookups)
    return objects


async def prefetch(objects: list[Any], lookups: Sequence[Any]) -> None:
    """Django's ``prefetch_related_objects``."""
    await asyncdjango.run(prefetch_related_objects, objects, *lookups)


async def hydrate(compiled: Compiled, result: Result) -> list[Any]:
    """The objects of ``result``; many of them in slices, between which other tasks have their turn."""
    if len(result.rows) <= SLICE:
        return await _here_or_green(compiled.hydrate, result.rows, result.columns)
    try:
        return await _in_slices(compiled.objects(result.rows, result.columns))
    except SynchronousOnlyOperation:
        return await asyncdjango.run(compiled.hydrate, result.rows, result.columns)


async def _objects(queryset: AnyQuerySet, alias: str) -> list[Any]:
    compiled = await _here_or_green(compile, queryset, alias)
    target = executor(alias)
    if compiled.sql is None:
        return []
    return await hydrate(compiled, await target.execute(compiled.sql, compiled.params))


def _evaluate(queryset: Any) -> list[Any]:
    return list(queryset)


async def _in_slices(objects: Iterator[Any]) -> list[Any]:
    made: list[Any] = []
    while piece := list(islice(objects, SLICE)):
        made += piece
        await asyncio.sleep(0)
    return made


async def _here_or_green(fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``fn(...)``; again in green code, if it turns out to want a database connection.

    Compiling hardly ever does, nor does making objects: a lookup that has the driver quote for it, a model whose
    ``from_db`` queries.
    """
    try:
        return fn(*args, **kwargs)
    except SynchronousOnlyOperation:
        return await asyncdjango.run(fn, *args, **kwargs)
