"""Rendering for views on the loop: what a template will need is fetched first, so that rendering queries nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from django.http import HttpRequest

from tornjango import db, templates


async def arender(
    template: str | list[str],
    context: Mapping[str, Any] | None = None,
    request: HttpRequest | None = None,
    *,
    using: str | None = None,
) -> str:
    """A template as a string: ``render_to_string``, awaited.

    The querysets in ``context`` are fetched first, several at once side by side; so is the user who is logged in, since
    most templates show it. Raises ``TemplateQueryError`` where rendering would query for more.
    """
    context = dict(context or {})
    querysets = list(templates.querysets(context).values())
    await asyncio.gather(*map(_fill, querysets), _load_user(request))
    return templates.render(template, context, request, using=using)


async def _fill(queryset: Any) -> None:
    queryset._result_cache = await db.fetch(queryset)
    queryset._prefetch_done = True  # by the fetch


async def _load_user(request: HttpRequest | None) -> None:
    """Has ``request.user`` answer without a query. Somebody without a session needs none."""
    session = getattr(request, "session", None)
    if session is None or session.session_key is None or not hasattr(request, "auser"):
        return
    if not hasattr(request, "_cached_user"):
        request._cached_user = await request.auser()  # type: ignore[union-attr]
