"""What templates query while they are rendered in green code: it works, one query after the other, and could be fewer.

In development each such place is told of once, in the log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from django.conf import settings
from django.db import connections
from django.db.models.fields.related_descriptors import (
    ForwardManyToOneDescriptor,
    ReverseOneToOneDescriptor,
)
from django.db.models.query import QuerySet, RawQuerySet
from django.db.models.query_utils import DeferredAttribute

from tornjango import green
from tornjango.templating import places

logger = logging.getLogger("tornjango.templates")

# Who is logged in, and what else a request brings by itself: no query of the view's could fetch it.
OF_THE_REQUEST = ("django.contrib.auth", "django.contrib.sessions", "django.contrib.messages")


@dataclasses.dataclass(frozen=True)
class Hint:
    """A place in a template, and what it queries for."""

    place: str
    text: str
    what: str
    advice: str


_told: set[Hint] = set()


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Logs what the block queries, in development and in green code."""
    if not settings.DEBUG or not green.active():
        yield
        return
    found: Counter[Hint] = Counter()
    with contextlib.ExitStack() as stack:
        for connection in connections.all():
            stack.enter_context(connection.execute_wrapper(_noting(found)))
        yield
    for hint, count in found.items():
        if hint not in _told:
            _told.add(hint)
            _tell(hint, count)


def _tell(hint: Hint, count: int) -> None:
    logger.warning(
        "%s in %s queried the database while it was rendered (%s), for %s. %s",
        hint.text,
        hint.place,
        "once" if count == 1 else f"{count} times on one page",
        hint.what,
        hint.advice,
    )


def _noting(found: Counter[Hint]) -> Callable[..., Any]:
    def note(execute: Callable[..., Any], *args: Any) -> Any:
        if (hint := _hint([*reversed([*_stack()])])) is not None:
            found[hint] += 1
        return execute(*args)

    return note


def _stack() -> Iterator[tuple[FrameType, int]]:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def _hint(frames: list[tuple[FrameType, int]]) -> Hint | None:
    modules = (str(frame.f_globals.get("__name__")) for frame, _ in frames)
    place = places.innermost(frames)
    if place is None or any(module.startswith(OF_THE_REQUEST) for module in modules):
        return None
    return Hint(str(place), place.text, *_what(frames))


def _what(frames: list[tuple[FrameType, int]]) -> tuple[str, str]:
    """What is queried for, and how it would have been there."""
    owners: list[Any] = [frame.f_locals.get("self") for frame, _ in frames]
    for owner in owners:
        if places.is_a(owner, ForwardManyToOneDescriptor):
            name = owner.field.name
            return f"{owner.field.model.__name__}.{name}", _related("select_related", name)
        if places.is_a(owner, ReverseOneToOneDescriptor):
            name = owner.related.get_accessor_name()
            return f"{owner.related.model.__name__}.{name}", _related("select_related", name)
        if places.is_a(owner, DeferredAttribute):
            field: Any = owner.field
            return (
                f"{field.model.__name__}.{field.name}",
                "The query behind it leaves that field out.",
            )
    for owner in reversed(owners):
        if places.is_a(owner, QuerySet, RawQuerySet):
            return _of_queryset(owner)
    return "a query of its own", "Query in the view."


def _of_queryset(queryset: Any) -> tuple[str, str]:
    name = queryset.model.__name__
    instance = queryset._hints.get("instance")
    if instance is None:
        return f"{name} objects", "Put the QuerySet itself into the context."
    what = f"{name} objects of one {type(instance).__name__}"
    return what, "Add prefetch_related() to the query behind it."


def _related(method: str, name: str) -> str:
    return f'Add {method}("{name}") to the query behind it.'
