"""Who may follow what. Which messages there are is to be found beside each ``comet.publish``."""

from __future__ import annotations

from django.http import HttpRequest

from tornjango import comet

from .models import Blog


async def anyone(request: HttpRequest, pk: int) -> bool:
    """Whoever may see an entry may follow it: here everyone, provided there is such an entry."""
    return await Blog.objects.filter(pk=pk).aexists()


# An entry's comments; its readers are told on "entry:7@presence".
comet.channel("entry:<int:pk>", presence=True)(anyone)

# That somebody is writing a comment, which their browsers say. It is of no interest a moment later.
comet.channel("typing:<int:pk>", history=20, ttl=10, max_bytes=4096, publisher=anyone)(anyone)


# How many comments there are: only the last count counts.
@comet.channel("count", latest=True)
# Cells of the wall, as they are painted.
@comet.channel("wall", history=2000)
async def everyone(request: HttpRequest) -> bool:
    return True


@comet.channel("import")
async def staff(request: HttpRequest) -> bool:
    user = await request.auser()
    return user.is_staff
