"""The ``a``-prefixed twin of a shortcut of Django's that would wait."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.http import HttpRequest, HttpResponse

from tornjango import rendering


async def arender(
    request: HttpRequest,
    template_name: str | list[str],
    context: Mapping[str, Any] | None = None,
    content_type: str | None = None,
    status: int | None = None,
    using: str | None = None,
) -> HttpResponse:
    """Django's ``render``, for async views: querysets in ``context``, and the user, are fetched without blocking first."""
    content = await rendering.arender(template_name, context, request, using=using)
    return HttpResponse(content, content_type, status)
