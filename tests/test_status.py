"""The page that shows what goes on, and its numbers."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from django.conf import settings
from django.contrib import admin
from django.contrib.auth.models import User
from django.test import AsyncClient, override_settings
from django.urls import include, path

from tests import comet_channels  # noqa: F401 (declares the channels)
from tests.serving import Site, serving
from tornjango import comet, status

urlpatterns = [
    path("admin/", admin.site.urls),
    path("status/", include("tornjango.status.urls")),
]


@asynccontextmanager
async def status_site(**options: Any) -> AsyncIterator[Site]:
    async with serving(ROOT_URLCONF=__name__, **options) as site:
        yield site


async def cookie_of(user: User) -> list[tuple[str, str]]:
    client = AsyncClient()
    await client.aforce_login(user)
    name = settings.SESSION_COOKIE_NAME
    return [("Cookie", f"{name}={client.cookies[name].value}")]


async def staff() -> list[tuple[str, str]]:
    return await cookie_of(await User.objects.acreate(username="ann", is_staff=True))


@pytest.mark.gen_test
async def test_strangers_are_asked_to_log_in_and_others_are_refused(database: None) -> None:
    visitor = await cookie_of(await User.objects.acreate(username="bob"))
    async with status_site() as site:
        for target in ("/status/", "/status/json/"):
            answer = await site.request(target)
            assert answer.status == 302
            assert answer.header("Location") == f"/admin/login/?next={target}"
            assert (await site.request(target, headers=visitor)).status == 403
        poll = f"/status/comet/poll/?channel={status.CHANNEL}"
        assert (await site.request(poll)).status == 403


@pytest.mark.gen_test
async def test_without_the_admin_strangers_are_refused(database: None) -> None:
    apps = [app for app in settings.INSTALLED_APPS if app != "django.contrib.admin"]
    with override_settings(INSTALLED_APPS=apps):
        headers = await staff()
        async with serving(ROOT_URLCONF="tests.status_urls") as site:
            assert (await site.request("/status/")).status == 403
            answer = await site.request("/status/", headers=headers)
    assert answer.status == 200
    assert b"<h1>Server status</h1>" in answer.body


@pytest.mark.gen_test
async def test_the_page_is_the_admins_and_knows_where_to_follow(database: None) -> None:
    headers = await staff()
    async with status_site() as site:
        answer = await site.request("/status/", headers=headers)
    page = answer.body.decode()
    assert (answer.status, "Django administration" in page) == (200, True)
    follow = json.loads(
        page.partition('id="tornjango-follow" type="application/json">')[2].partition("<")[0]
    )
    assert (follow["channel"], follow["url"]) == (status.CHANNEL, "/status/comet/")


@pytest.mark.gen_test
async def test_json_tells_of_this_process(database: None) -> None:
    headers = await staff()
    comet.publish("open:busy", {"text": "Hello"})
    async with status_site(TORNJANGO={"THREADS": 3}) as site:
        answer = await site.request("/status/json/", headers=headers)
    (process,) = json.loads(answer.body)["processes"]
    assert (process["pid"], process["status"]) == (os.getpid(), "ok")
    assert process["workers"]["size"] == 3
    assert process["comet"]["broker"] == "memory"
    busy = {channel["name"]: channel for channel in process["newest"]}["open:busy"]
    assert (busy["readers"], busy["rate"]) == (0, 1)
    assert not [name for name in busy["name"] if name.startswith("~")]


@pytest.mark.gen_test
async def test_a_process_tells_of_itself_while_somebody_looks(database: None) -> None:
    headers = await staff()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(status, "EVERY", 0.02)
        patch.setattr(status, "SELDOM", 0.01)
        async with status_site() as site:
            first = comet.cursor(status.CHANNEL)
            answer = await comet.wait(None, first, status.CHANNEL, timeout=0.2)
            assert [message.data["pid"] for message in answer.messages][:1] == [os.getpid()]
            poll = f"/status/comet/poll/?channel={status.CHANNEL}&cursor={answer.cursor}"
            told = json.loads((await site.request(poll, headers=headers)).body)
            assert told["messages"][0]["data"]["id"]
