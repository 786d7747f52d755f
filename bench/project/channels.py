from __future__ import annotations

from django.http import HttpRequest

from tornjango import comet


@comet.channel("bench")
async def can_read(request: HttpRequest) -> bool:
    return True


comet.channel("aside")(can_read)


@comet.channel("room-<int:pk>", history=10_000)
async def can_enter(request: HttpRequest, pk: int) -> bool:
    return True
