from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from django.core.signals import request_finished, request_started
from django.http import Http404
from django.test import override_settings
from django.urls.converters import IntConverter
from tornado.httpclient import AsyncHTTPClient
from tornado.web import RequestHandler
from tornado.websocket import websocket_connect

import tornjango
from tests import views
from tests.serving import serving
from tornjango.db import pools
from tornjango.exceptions import ConfigurationError
from tornjango.handlers import DjangoHandler


class Extra(RequestHandler):
    def get(self) -> None:
        self.write(self.reverse_url("sync-named", 7) + self.reverse_url("extra"))


@pytest.fixture
def app(io_loop: Any) -> Iterator[tornjango.Application]:
    application = tornjango.Application([tornjango_url()])
    yield application
    io_loop.run_sync(application.close)


def tornjango_url() -> Any:
    from tornado.web import url

    return url(r"/sync/extra", Extra, name="extra")


async def get(client: AsyncHTTPClient, url: str) -> tuple[int, bytes]:
    answer = await client.fetch(url, raise_error=False)
    return answer.code, answer.body


@pytest.mark.gen_test
async def test_extra_tornado_routes_stand_beside_the_urlconf(
    http_client: AsyncHTTPClient, base_url: str
) -> None:
    assert await get(http_client, f"{base_url}/sync/extra") == (200, b"/sync/7//sync/extra")
    assert (await get(http_client, f"{base_url}/sync/"))[0] == 200


@pytest.mark.gen_test
async def test_a_tornado_handler_stands_among_url_patterns(
    http_client: AsyncHTTPClient, base_url: str
) -> None:
    assert await get(http_client, f"{base_url}/tornado/7/") == (200, b"good day 7")
    assert (await get(http_client, f"{base_url}/tornado/x/"))[0] == 404


@pytest.mark.gen_test
async def test_a_websocket_handler_stands_among_url_patterns(
    http_server: Any, http_port: int
) -> None:
    socket = await websocket_connect(f"ws://127.0.0.1:{http_port}/socket/")
    await socket.write_message("hello")
    assert await socket.read_message() == "hello"
    socket.close()
    assert await socket.read_message() is None


def test_every_view_has_a_handler_class_that_names_it(app: tornjango.Application) -> None:
    handler = app.handler_classes[views.marked]
    assert issubclass(handler, DjangoHandler)
    assert handler.view_name == "tests.views.marked"
    assert views.Plain not in app.handler_classes


def test_an_unknown_url_name_is_a_key_error(app: tornjango.Application) -> None:
    with pytest.raises(KeyError, match="no-such-name"):
        app.reverse_url("no-such-name")


def test_a_wrong_setting_is_an_error_that_names_it() -> None:
    with (
        override_settings(TORNJANGO={"THREADS": 0}),
        pytest.raises(ConfigurationError, match="THREADS"),
    ):
        tornjango.Application()


@pytest.mark.parametrize(("error", "status"), [(Http404(), 404), (RuntimeError("converter"), 500)])
@pytest.mark.gen_test
async def test_what_a_converter_raises_is_answered_as_what_a_view_raises(
    error: Exception, status: int, error_log: list[Any]
) -> None:
    with mock.patch.object(IntConverter, "to_python", side_effect=error):
        async with serving(ROOT_URLCONF="tests.urls") as site:
            assert (await site.request("/sync/1/")).status == status
    if status == 500:
        assert error_log.pop().getMessage() == "Internal Server Error: /sync/1/"


@pytest.mark.gen_test
async def test_closing_answers_what_is_in_flight_and_is_harmless_twice(
    app: tornjango.Application, http_client: AsyncHTTPClient, base_url: str
) -> None:
    views.gates.update(parked=asyncio.Event(), go=asyncio.Event())
    views.Gone.event = asyncio.Event()
    answer = asyncio.ensure_future(get(http_client, f"{base_url}/parks-async/"))
    await views.gates["parked"].wait()
    await app.close()
    assert (await answer)[0] == 503
    assert not app.in_flight
    await app.close()


def test_an_application_opens_the_pools_and_closes_them(io_loop: Any) -> None:
    application = tornjango.Application()
    assert pools.status()
    io_loop.run_sync(application.close)
    assert not pools.status()


def test_an_application_that_cannot_be_made_leaves_nothing_behind() -> None:
    wrong = {"LOOP_MIDDLEWARE": ["not.in.MIDDLEWARE"]}
    before = [list(signal.receivers) for signal in (request_started, request_finished)]
    with override_settings(TORNJANGO=wrong), pytest.raises(ConfigurationError):
        tornjango.Application()
    after = [signal.receivers for signal in (request_started, request_finished)]
    assert [len(receivers) for receivers in after] == [len(receivers) for receivers in before]
