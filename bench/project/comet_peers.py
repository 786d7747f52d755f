"""The peers of COMET as their documentation has them: Channels' consumer with its groups, and django-eventstream.

What they are asked is what tornjango is: ``channel``, repeated, in the query; and ``channel`` and ``at`` to publish.
"""

from __future__ import annotations

from urllib.parse import parse_qs

import django_eventstream.views
from channels.generic.websocket import AsyncWebsocketConsumer
from channels.layers import get_channel_layer
from django.http import HttpRequest, JsonResponse
from django.urls import path


class Room(AsyncWebsocketConsumer):
    """A member of the rooms that its query names."""

    async def connect(self) -> None:
        self.rooms = parse_qs(self.scope["query_string"].decode())["channel"]
        for room in self.rooms:
            await self.channel_layer.group_add(room, self.channel_name)
        await self.accept()
        await self.send(text_data="{}")

    async def disconnect(self, code: int) -> None:
        for room in self.rooms:
            await self.channel_layer.group_discard(room, self.channel_name)

    async def said(self, event: dict[str, str]) -> None:
        await self.send(text_data=event["text"])


async def say(room: str, at: float) -> None:
    text = f'{{"channel": "{room}", "data": {{"at": {at:.6f}}}}}'
    await get_channel_layer().group_send(room, {"type": "said", "text": text})


async def publish_to_group(request: HttpRequest) -> JsonResponse:
    await say(request.GET["channel"], float(request.GET["at"]))
    return JsonResponse({})


def publish_event(request: HttpRequest) -> JsonResponse:
    # Sync, for send_event waits for Redis.
    django_eventstream.send_event(
        request.GET["channel"], "message", {"at": float(request.GET["at"])}
    )
    return JsonResponse({})


urlpatterns = [
    path("channels/publish/", publish_to_group),
    path("eventstream/events/", django_eventstream.views.events),
    path("eventstream/publish/", publish_event),
]
