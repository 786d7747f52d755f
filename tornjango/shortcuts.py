"""``a``-prefixed twins of Django's shortcuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from django.http import HttpRequest, HttpResponse

from tornjango import templates


async def arender(
    request: HttpRequest,
    template_name: str | Sequence[str],
    context: Mapping[str, Any] | None = None,
    content_type: str | None = None,
    status: int | None = None,
    using: str | None = None,
) -> HttpResponse:
    """Django's ``render``, for async views: what the template queries does not block; see ``templates.arender``."""
    content = await templates.arender(template_name, context, request, using=using)
    return HttpResponse(content, content_type, status)
