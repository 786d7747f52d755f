"""Rendering without a query in the middle of it.

On the event loop's thread a template that would query the database gets an error that names the place. Django's own
``SynchronousOnlyOperation`` would not do: ``{% if not entries.exists %}`` and some filters swallow every ``Exception``,
and the page would silently be wrong. So during a rendering the thread's database connections raise something that is
none. In a worker thread nothing of this happens: there a template may query as ever. In green code it may as well, and in
development `hints` tells of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from django.core.exceptions import SynchronousOnlyOperation
from django.core.paginator import Page
from django.db import connections
from django.db.models.query import QuerySet, RawQuerySet
from django.http import HttpRequest
from django.template.loader import get_template, select_template

from tornjango.templating import hints, places

# Where Django's database wrapper refuses to work on an event loop.
GUARDED = ("connect", "ensure_connection", "cursor", "chunked_cursor")


class QueryStarted(BaseException):
    """Not an ``Exception``, so that nothing on its way through a template takes it for one of its own."""


def render(
    template_name: str | Sequence[str],
    context: Mapping[str, Any] | None = None,
    request: HttpRequest | None = None,
    *,
    using: str | None = None,
) -> str:
    """The page as a string, as ``django.template.loader.render_to_string`` gives it; of several names the first found.

    ``context`` is not changed. ``using`` is the NAME of the only backend to ask. Raises TemplateDoesNotExist,
    TemplateSyntaxError, what the project's tags and context processors raise, and, on the event loop (but not in green
    code), a TemplateQueryError for a template or context processor that would query the database.
    """
    if isinstance(template_name, str):
        template = get_template(template_name, using=using)
    else:
        template = select_template(template_name, using=using)
    values = None if context is None else {**context}
    if not _on_event_loop():
        with hints.told():
            return template.render(values, request)
    try:
        with _no_queries():
            return template.render(values, request)
    except (QueryStarted, SynchronousOnlyOperation) as exc:
        raise places.explain(exc) from exc


def querysets(context: Mapping[str, Any] | None) -> dict[str, QuerySet[Any] | RawQuerySet[Any]]:
    """The QuerySets in ``context`` that have not been evaluated: its values, what is directly in a list, tuple or dict
    among them, and the objects of a paginator's page. One that stands at several places is given once.

    A key is what a template would write: ``entries``, ``boxes.0``, ``page_obj.object_list``.
    """
    found: dict[str, QuerySet[Any] | RawQuerySet[Any]] = {}
    seen: set[int] = set()
    for name, value in _values(context or {}):
        if isinstance(value, QuerySet | RawQuerySet) and id(value) not in seen:
            seen.add(id(value))
            if getattr(value, "_result_cache") is None:  # noqa: B009 RawQuerySet's stub lacks it.
                found[name] = value
    return found


def _values(context: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in context.items():
        yield name, value
        if isinstance(value, Page):
            yield f"{name}.object_list", value.object_list
        elif isinstance(value, dict):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        elif isinstance(value, list | tuple):
            yield from ((f"{name}.{index}", inner) for index, inner in enumerate(value))


def _on_event_loop() -> bool:
    """Whether Django would refuse a query here and now."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return not os.environ.get("DJANGO_ALLOW_ASYNC_UNSAFE")


def _refuse(*args: object, **kwargs: object) -> NoReturn:
    raise QueryStarted("A database query was started here, in the middle of rendering.")


REFUSALS = dict.fromkeys(GUARDED, _refuse)


@contextlib.contextmanager
def _no_queries() -> Iterator[None]:
    """Rendering neither waits nor changes thread, so what is set on this thread's connections is nobody else's."""
    wrappers = [vars(connection) for connection in connections.all()]
    before = [{name: own[name] for name in GUARDED if name in own} for own in wrappers]
    for own in wrappers:
        own.update(REFUSALS)
    try:
        yield
    finally:
        for own, saved in zip(wrappers, before, strict=True):
            for name in GUARDED:
                del own[name]
            own.update(saved)
