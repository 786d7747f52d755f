"""What a queryset gives, over whatever runs its SQL: an engine, or the transaction of the running task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, ParamSpec, TypeVar

from django.core.exceptions import SynchronousOnlyOperation
from django.db import connections

from tornjango import green
from tornjango.db import connection, pools
from tornjango.db.compiler import AnyQuerySet, Compiled, Params, compile, unevaluated
from tornjango.db.connection import InTurn
from tornjango.db.cursors import PoolConnection
from tornjango.db.engines.base import Engine, Result
from tornjango.db.prefetching import prefetch

__all__ = ["execute", "executor", "fetch", "here_or_green", "hydrate", "prefetch"]

P = ParamSpec("P")
T = TypeVar("T")

#: Rows made into objects before other tasks get their turn: a few milliseconds.
SLICE = 1000


def executor(alias: str) -> PoolConnection | InTurn | Engine:
    """Where a statement of the running task goes: into its transaction, if one is open, or to the pool.

    Raises TransactionManagementError inside a transaction of another task.
    """
    return connection.transaction(alias) or pools.get(alias)


async def execute(alias: str, sql: str, params: Params) -> Result:
    """A statement of the running task, by its `executor`.

    Through a cursor of Django's, where there is somebody to tell: the log, under DEBUG, or an ``execute_wrapper``.
    """
    target = executor(alias)
    wrapper = connection.of_task(alias)
    if wrapper is None:
        watched = isinstance(target, Engine) and target.wrapper.queries_logged and green.is_served()
    else:
        watched = wrapper.queries_logged or wrapper.execute_wrappers
    if watched:
        return await green.run(_through_cursor, alias, sql, params)
    return await target.execute(sql, params)


async def fetch(queryset: AnyQuerySet, alias: str) -> list[Any]:
    """What ``list(queryset)`` would give. The queryset itself is left as it was."""
    state: Any = queryset
    if not green.is_served():
        return await green.run(_evaluate, unevaluated(queryset, alias))
    if state._result_cache is None:
        objects = await _objects(queryset, alias)
    else:
        objects = list(state._result_cache)
    lookups = state._prefetch_related_lookups
    if lookups and objects and not state._prefetch_done:
        await prefetch(objects, lookups)
    return objects


async def hydrate(compiled: Compiled, result: Result) -> list[Any]:
    """The objects of ``result``; many of them in slices, between which other tasks have their turn."""
    columns = result.columns if compiled.names_columns else ()
    if len(result.rows) <= SLICE:
        return await here_or_green(compiled.hydrate, result.rows, columns)
    try:
        return await _in_slices(compiled.objects(result.rows, columns))
    except SynchronousOnlyOperation:
        return await green.run(compiled.hydrate, result.rows, columns)


async def _objects(queryset: AnyQuerySet, alias: str) -> list[Any]:
    compiled = await here_or_green(compile, queryset, alias)
    if compiled.sql is None:
        executor(alias)
        return []
    return await hydrate(compiled, await execute(alias, compiled.sql, compiled.params))


def _through_cursor(alias: str, sql: str, params: Params) -> Result:
    with connections[alias].cursor() as cursor:
        cursor.execute(sql, params)
        rows = [] if cursor.description is None else cursor.fetchall()
        return Result(rows, cursor.description, cursor.rowcount)


def _evaluate(queryset: Any) -> list[Any]:
    return list(queryset)


async def _in_slices(objects: Iterator[Any]) -> list[Any]:
    made: list[Any] = []
    while piece := list(islice(objects, SLICE)):
        made += piece
        await asyncio.sleep(0)
    return made


async def here_or_green(fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``fn(...)``; again in green code, if it turns out to want a database connection.

    Compiling hardly ever does, nor does making objects: a lookup that has the driver quote for it, a model whose
    ``from_db`` queries.
    """
    try:
        return fn(*args, **kwargs)
    except SynchronousOnlyOperation:
        return await green.run(fn, *args, **kwargs)
