"""A queryset's objects in bounded memory, over a server-side cursor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from django.db import connections, transaction
from django.db.models.query import RawQuerySet
from django.db.transaction import TransactionManagementError

from tornjango import green
from tornjango.db import connection, fetching
from tornjango.db.compiler import AnyQuerySet, Params, compile, unevaluated
from tornjango.db.connection import InTurn
from tornjango.db.engines.base import Result, Stream
from tornjango.db.prefetching import prefetch


async def stream(queryset: AnyQuerySet, alias: str, chunk_size: int) -> AsyncGenerator[Any]:
    """The objects of a queryset; ``chunk_size`` rows are in memory at one time."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be 1 or more, not {chunk_size!r}.")
    if not green.is_served():
        chunks = _by_django(queryset, alias, chunk_size)
    elif connection.transaction(alias):
        chunks = _in_transaction(queryset, alias, chunk_size)
    else:
        chunks = _in_own_transaction(queryset, alias, chunk_size)
    try:
        async for chunk in chunks:
            for item in chunk:
                yield item
    finally:
        await chunks.aclose()


async def _in_transaction(
    queryset: AnyQuerySet, alias: str, chunk_size: int
) -> AsyncGenerator[list[Any]]:
    """The running task's. A task that collects what another one forgot cannot close the cursor: the transaction will."""
    task, own = asyncio.current_task(), connection.transaction(alias)
    compiled = await fetching.here_or_green(compile, queryset, alias)
    if compiled.sql is None:
        return
    source = await green.run(_declare, alias, compiled.sql, compiled.params)
    if isinstance(own, InTurn):
        source = own.stream(source)
    try:
        while rows := await source.fetch(chunk_size):
            objects = await fetching.hydrate(compiled, _result(rows, source))
            await _prefetch(queryset, objects)
            yield objects
            if connection.transaction(alias) is not own:
                raise TransactionManagementError(
                    f"db.stream() began in a transaction on database {alias!r} that is not open any more: "
                    "iterate to the end inside it, in the same task."
                )
    finally:
        if asyncio.current_task() is task and connection.transaction(alias) is own:
            await source.close()
        else:
            source.abandon()


async def _in_own_transaction(
    queryset: AnyQuerySet, alias: str, chunk_size: int
) -> AsyncGenerator[list[Any]]:
    """Its connection is for the prefetching, too: whoever holds one must not wait for another."""
    compiled = await fetching.here_or_green(compile, queryset, alias)
    if compiled.sql is None:
        return
    held = _Held(alias)
    try:
        with held.here():
            source = await green.run(_begin_and_declare, alias, compiled.sql, compiled.params)
        while True:
            with held.here():
                rows = await source.fetch(chunk_size)
                objects = await fetching.hydrate(compiled, _result(rows, source))
                await _prefetch(queryset, objects)
            if not rows:
                break
            yield objects
        with held.here():
            await green.run(_end, alias)
    finally:
        held.end()


async def _by_django(
    queryset: AnyQuerySet, alias: str, chunk_size: int
) -> AsyncGenerator[list[Any]]:
    """Over the caller's own connection, in a process that tornjango does not serve."""
    objects = _iterator(unevaluated(queryset, alias), chunk_size)
    try:
        while chunk := await green.run(_take, objects, chunk_size):
            if isinstance(queryset, RawQuerySet):
                await _prefetch(queryset, chunk)
            yield chunk
    finally:
        await green.run(objects.close)


class _Held:
    """What green code keeps for a generator: there while it runs, whichever task runs it, and not while it yields."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.resources: dict[Any, green.Resource] = {}

    @contextmanager
    def here(self) -> Iterator[None]:
        scope = green.Scope(asyncio.current_task(), green.current())
        scope.resources = self.resources
        green.enter(scope)
        try:
            yield
        finally:
            green.leave(scope)

    def end(self) -> None:
        """Rolls back, unless the transaction has ended."""
        wrapper: Any = self.resources.get(self.alias)
        if wrapper is not None and wrapper.in_transaction:
            del self.resources[self.alias]
            wrapper.connection.abandon()
        scope = green.Scope(None, None)
        scope.resources = self.resources
        scope.end()


def _begin_and_declare(alias: str, sql: str, params: Params) -> Stream:
    transaction.set_autocommit(False, alias)
    return _declare(alias, sql, params)


def _declare(alias: str, sql: str, params: Params) -> Stream:
    wrapper: Any = connections[alias]
    cursor = wrapper._cursor("stream")
    cursor.execute(sql, params)
    stream: Stream = cursor.cursor.detach()
    return stream


def _end(alias: str) -> None:
    """A query may call functions that write."""
    transaction.commit(alias)
    transaction.set_autocommit(True, alias)


def _result(rows: list[Any], source: Stream) -> Result:
    return Result(rows, source.description, len(rows))


async def _prefetch(queryset: Any, objects: list[Any]) -> None:
    if objects and queryset._prefetch_related_lookups:
        await prefetch(objects, queryset._prefetch_related_lookups)


def _iterator(queryset: Any, chunk_size: int) -> Any:
    if isinstance(queryset, RawQuerySet):
        return (it for it in queryset.iterator())
    return (it for it in queryset.iterator(chunk_size))


def _take(objects: Iterator[Any], size: int) -> list[Any]:
    return list(islice(objects, size))
