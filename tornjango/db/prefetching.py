"""Django's ``prefetch_related_objects``, but that the lookups of one level are queried for side by side.

What is found, and where it is put, is Django's own work, one level of one lookup at a time. Here is the order of the
steps: lookups that begin alike share their first step; those that begin differently need not wait for each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, NamedTuple

from django.core.exceptions import ObjectDoesNotExist
from django.db.models import Prefetch, prefetch_related_objects
from django.db.models.constants import LOOKUP_SEP
from django.db.models.query import (
    get_prefetcher,
    normalize_prefetch_lookups,
    prefetch_one_level,
)

from tornjango import green
from tornjango.db import connection

#: Queries that one call has under way at one time: others want connections, too.
SIDE_BY_SIDE = 4


async def prefetch(objects: Sequence[Any], lookups: Sequence[Any]) -> None:
    """``prefetch_related_objects(objects, *lookups)``. In a transaction, which has one connection, one after the other.

    Raises what Django raises for the first lookup that cannot be followed.
    """
    if not green.is_served() or connection.in_transaction():
        await green.run(prefetch_related_objects, objects, *lookups)
    elif objects:
        await _Prefetching(objects).level(objects, normalize_prefetch_lookups(lookups), 0)


class _Step(NamedTuple):
    """What one level of a lookup led to."""

    objects: Sequence[Any]
    #: The querysets' own prefetch_related.
    more: list[Prefetch[Any]]
    #: False where all that was led to had been there.
    queried: bool


class _Prefetching:
    def __init__(self, objects: Sequence[Any]) -> None:
        self.roots = objects
        self.turns = asyncio.Semaphore(SIDE_BY_SIDE)

    async def level(self, objects: Sequence[Any], lookups: list[Prefetch[Any]], level: int) -> None:
        branches: dict[str, list[Prefetch[Any]]] = {}
        for lookup in lookups:
            branches.setdefault(lookup.get_current_prefetch_to(level), []).append(lookup)
        await _side_by_side([self.branch(objects, them, level) for them in branches.values()])

    async def branch(
        self, objects: Sequence[Any], lookups: list[Prefetch[Any]], level: int
    ) -> None:
        """The first of the lookups takes the step for all of them, with its own queryset if it ends here."""
        first, *others = lookups
        step = await self.step(objects, first, level)
        for other in others:
            if not _goes_on(other, level):
                await self.again(objects, other, level, step.queried)
        deeper = [it for it in (first, *step.more, *others) if _goes_on(it, level)]
        if step.objects and deeper:
            await self.level(step.objects, deeper, level + 1)

    async def step(self, objects: Sequence[Any], lookup: Prefetch[Any], level: int) -> _Step:
        async with self.turns:
            return await green.run(_step, self.roots, objects, lookup, level)

    async def again(
        self, objects: Sequence[Any], lookup: Prefetch[Any], level: int, queried: bool
    ) -> None:
        if not queried:
            await self.step(objects, lookup, level)
        elif lookup.queryset is not None:
            raise ValueError(
                f"{lookup.prefetch_to!r} was prefetched already, by a lookup before this one and with a different "
                "queryset. You may need to adjust the ordering of your lookups."
            )


def _goes_on(lookup: Prefetch[Any], level: int) -> bool:
    return lookup.prefetch_through.count(LOOKUP_SEP) > level


def _step(roots: Sequence[Any], objects: Sequence[Any], lookup: Prefetch[Any], level: int) -> _Step:
    if not all(map(_may_keep, objects)):
        return _Step([], [], False)
    name = lookup.prefetch_through.split(LOOKUP_SEP)[level]
    to_attr, _ = lookup.get_current_to_attr(level)
    found_for: Any = get_prefetcher(next(iter(objects)), name, to_attr)
    prefetcher, _, found, is_fetched = found_for
    if not found or (prefetcher is None and not _goes_on(lookup, level)):
        # Raises the error that says what is wrong with it.
        prefetch_related_objects(roots, lookup)
        return _Step([], [], False)
    missing = prefetcher and [it for it in objects if not is_fetched(it)]
    if not missing:
        return _Step(list(_related(objects, name)), [], False)
    reached, more = prefetch_one_level(missing, prefetcher, lookup, level)
    prefix = lookup.get_current_prefetch_to(level)
    return _Step(reached, normalize_prefetch_lookups(more, prefix), True)


def _may_keep(instance: Any) -> bool:
    """Whether it has a place for what is prefetched; values have none."""
    if not hasattr(instance, "_prefetched_objects_cache"):
        try:
            instance._prefetched_objects_cache = {}
        except (AttributeError, TypeError):
            return False
    return True


def _related(objects: Sequence[Any], name: str) -> Iterator[Any]:
    """What the objects have already."""
    for instance in objects:
        prefetched = getattr(instance, "_prefetched_objects_cache", {})
        try:
            value = list(prefetched[name]) if name in prefetched else getattr(instance, name)
        except ObjectDoesNotExist:
            continue
        if isinstance(value, list):
            yield from value
        elif value is not None:
            yield value


async def _side_by_side(works: list[Coroutine[Any, Any, None]]) -> None:
    """Raises the error of the first that fails, in their order; those after it are cancelled."""
    if len(works) == 1:
        return await works[0]
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        for task in tasks:
            await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
