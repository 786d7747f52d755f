from __future__ import annotations

import time

from django.http import HttpRequest, HttpResponse
from django.urls import include, path

from tornjango import comet
from tornjango.exceptions import BrokerUnavailable


async def publish(request: HttpRequest, room: int, number: int) -> HttpResponse:
    """The event's number, and when it was published, by a clock that all processes of the machine share."""
    try:
        await comet.apublish(f"room:{room}", [number, time.monotonic()])
    except BrokerUnavailable as error:
        return HttpResponse(str(error), status=503)
    return HttpResponse("published")


urlpatterns = [
    path("publish/<int:room>/<int:number>/", publish),
    path("comet/", include("tornjango.comet.urls")),
]
