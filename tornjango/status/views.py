from __future__ import annotations

import asyncio
from typing import Any

from django.apps import apps
from django.contrib.auth.views import redirect_to_login
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import reverse

from tornjango import comet, status
from tornjango.comet.hub import get_hub
from tornjango.shortcuts import arender

#: How long `numbers` waits for the processes' reports, in seconds.
PATIENCE = 0.5


async def page(request: HttpRequest) -> HttpResponse:
    """The page, in the admin's look where the admin is installed. Anonymous visitors are asked to log in, others are refused."""
    if refused := await _refused(request):
        return refused
    admin = apps.is_installed("django.contrib.admin")
    context: dict[str, Any] = {
        "title": "Server status",
        "base": "admin/base_site.html" if admin else "tornjango/status_base.html",
        "follow": {
            "channel": status.CHANNEL,
            "cursor": comet.cursor(status.CHANNEL),
            "url": reverse("status:comet:poll").removesuffix("poll/"),
        },
    }
    if admin:
        context |= await _admin_context(request)
    status.ask(get_hub())
    return await arender(request, "tornjango/status.html", context)


async def numbers(request: HttpRequest) -> HttpResponse:
    """What each process that answers within half a second tells of itself, as ``{"processes": [...]}``; for staff."""
    if refused := await _refused(request):
        return refused
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE
    cursor = comet.cursor(status.CHANNEL)
    status.ask(get_hub())
    found: dict[str, Any] = {}
    while (left := deadline - loop.time()) > 0:
        answer = await comet.wait(None, cursor, status.CHANNEL, timeout=left)
        found |= {message.data["id"]: message.data for message in answer.messages}
        cursor = answer.cursor
    headers = {"Cache-Control": "no-store"}
    return JsonResponse({"processes": list(found.values())}, headers=headers)


async def _refused(request: HttpRequest) -> HttpResponse | None:
    await comet.ready()
    if await status.is_staff(request):
        return None
    user = await request.auser()
    if user.is_authenticated or not apps.is_installed("django.contrib.admin"):
        raise PermissionDenied("The status page is for staff.")
    return redirect_to_login(request.get_full_path(), reverse("admin:login"))


async def _admin_context(request: HttpRequest) -> dict[str, Any]:
    from django.contrib import admin

    from tornjango import green

    return await green.run(admin.site.each_context, request)
