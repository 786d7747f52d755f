from __future__ import annotations

from django.http import HttpRequest

from tornjango import comet

from .models import Blog


@comet.channel("readers:<int:pk>")
@comet.channel("entry:<int:pk>")
async def can_read(request: HttpRequest, pk: int) -> bool:
    """Whoever may see an entry may follow it: here everyone, provided there is such an entry."""
    return await Blog.objects.filter(pk=pk).aexists()
