"""``a``-prefixed twins of what Django renders with: what a template will need is fetched first, without blocking."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from django.http import HttpRequest, HttpResponse

from tornjango import db, templates


async def arender(
    request: HttpRequest,
    template_name: str | list[str],
    context: Mapping[str, Any] | None = None,
    content_type: str | None = None,
    status: int | None = None,
    using: str | None = None,
) -> HttpResponse:
    """Django's ``render``, for async views; see ``arender_to_string``."""
    content = await arender_to_string(template_name, context, request, using=using)
    return HttpResponse(content, content_type, status)


async def arender_to_string(
    template_name: str | list[str],
    context: Mapping[str, Any] | None = None,
    request: HttpRequest | None = None,
    *,
    using: str | None = None,
) -> str:
    """Django's ``render_to_string``, awaited.

    The querysets in ``context`` are fetched first, several at once side by side; so is the user who is logged in, since
    most templates show it. Raises ``TemplateQueryError`` where rendering would query for more.
    """
    context = dict(context or {})
    querysets = templates.querysets(context).values()
    await asyncio.gather(*map(_fill, querysets), _load_user(request))
    return templates.render(template_name, context, request, using=using)


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
