from __future__ import annotations

from django.http import HttpRequest

from tornjango import comet


@comet.channel("bench")
async def can_read(request: HttpRequest) -> bool:
    return True
