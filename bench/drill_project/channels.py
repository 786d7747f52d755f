from __future__ import annotations

from django.http import HttpRequest

from tornjango import comet


@comet.channel("room:<int:number>")
async def room(request: HttpRequest, number: int) -> bool:
    return True
