from __future__ import annotations

import threading
from typing import NoReturn
from urllib.request import urlopen

import pytest
from django.test import override_settings

import tornjango
from tests.serving import serving
from tornjango.db import pools
from tornjango.testing import LiveServer, RawClient


@pytest.fixture(autouse=True)
def _urls() -> object:
    with override_settings(ROOT_URLCONF="tests.http_views"):
        yield


def test_a_live_server_serves_sync_code_from_a_thread_and_is_closed_after() -> None:
    before = threading.active_count()
    with LiveServer() as server, urlopen(f"{server.url}/status/200/") as response:
        assert response.read() == b"content"
    assert not pools.is_open()
    assert threading.active_count() <= before + 1


def test_what_the_application_raises_is_raised_where_the_block_begins() -> None:
    def broken() -> NoReturn:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), LiveServer(broken):
        pass


@pytest.mark.gen_test
async def test_a_live_server_serves_on_the_running_loop() -> None:
    async with (
        LiveServer(tornjango.Application) as server,
        await RawClient.connect(server.port) as client,
    ):
        assert (await client.request("/status/200/")).body == b"content"
    assert not pools.is_open()


@pytest.mark.gen_test
async def test_an_answer_has_its_headers_by_name() -> None:
    async with serving() as site:
        answer = await site.request("/cookies/")
        assert len(answer.all("set-cookie")) == 2
        assert answer.header("X-None") is None
