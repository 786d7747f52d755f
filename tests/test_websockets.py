"""WebSockets of Django views, over real sockets; what clients send that they should not is sent as bytes."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from django.http import HttpRequest, HttpResponse
from django.test import Client
from django.urls import path
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.frames import (
    BINARY,
    CLOSE,
    CONTINUED,
    PING,
    PONG,
    TEXT,
    closing,
    frame,
    read_frame,
    shake_hands,
)
from tests.serving import Site, serving, signals_seen, until
from tornjango import websockets
from tornjango.access import Answer
from tornjango.testing import RawClient
from tornjango.websockets import WebSocket, _window

seen: dict[str, Any] = {}
RSV1 = 0x40
DEFLATE = "permessage-deflate"


async def echo(request: HttpRequest) -> HttpResponse:
    return websockets.accept(request, talk_back, max_message=10_000, subprotocols=["b", "c"])


async def talk_back(socket: WebSocket) -> None:
    seen["socket"] = weakref.ref(socket)
    async for message in socket:
        seen.setdefault("messages", []).append(message)
        await socket.send(message, binary=isinstance(message, bytes))
    seen["ended"] = True


async def user(request: HttpRequest) -> HttpResponse:
    """Its session is new, and so comes with the handshake."""
    request.session["visited"] = True
    return websockets.accept(request, lambda socket: _tell_user(request, socket))


async def _tell_user(request: HttpRequest, socket: WebSocket) -> None:
    await socket.send(f"{await request.auser()} of {request.get_host()}")


async def waits(request: HttpRequest) -> HttpResponse:
    async def talk(socket: WebSocket) -> None:
        seen["socket"] = weakref.ref(socket)
        await socket.send("ready")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen["cancelled"] = True
            raise

    return websockets.accept(request, talk)


async def fails(request: HttpRequest) -> HttpResponse:
    async def talk(socket: WebSocket) -> None:
        raise ZeroDivisionError

    return websockets.accept(request, talk)


async def paced(request: HttpRequest) -> HttpResponse:
    return websockets.accept(request, talk_back, frames_per_second=seen["rate"], ping=0)


async def pinged(request: HttpRequest) -> HttpResponse:
    return websockets.accept(request, talk_back, ping=0.02)


urlpatterns = [
    path("echo/", echo),
    path("user/", user),
    path("waits/", waits),
    path("fails/", fails),
    path("paced/", paced),
    path("pinged/", pinged),
]


@asynccontextmanager
async def site(**settings: Any) -> AsyncIterator[Site]:
    seen.clear()
    async with serving(
        ROOT_URLCONF=__name__,
        SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
        **settings,
    ) as site:
        yield site


def url(site: Site, target: str) -> str:
    return f"ws://127.0.0.1:{site.port}{target}"


async def none_in_flight(site: Site) -> None:
    await until(lambda: not site.application.in_flight)


# What works


@pytest.mark.gen_test
@pytest.mark.parametrize("compression", ["deflate", None])
async def test_messages_go_both_ways(compression: str | None) -> None:
    async with site() as served, connect(url(served, "/echo/"), compression=compression) as page:
        for message in ("", "hé", b"", b"\0\xff", "long" * 2000, b"long" * 2000):
            await page.send(message)
            assert await page.recv() == message
        await page.send(["in ", "pieces"])
        assert await page.recv() == "in pieces"


@pytest.mark.gen_test
async def test_handshake_is_that_of_the_rfc() -> None:
    async with site() as served, await served.connect() as client:
        answer = await shake_hands(client, "/echo/", Sec_WebSocket_Protocol="a, c, b")
        assert (answer.status, answer.reason) == (101, "Switching Protocols")
        assert answer.header("Sec-WebSocket-Accept") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        assert answer.header("Sec-WebSocket-Protocol") == "c"
        assert answer.header("Content-Length") is None
        assert answer.header("Content-Type") is None
        assert answer.header("Sec-WebSocket-Extensions") is None


@pytest.mark.gen_test
async def test_view_has_djangos_request_and_middleware_its_response() -> None:
    async with site() as served, connect(url(served, "/user/")) as page:
        assert await page.recv() == f"AnonymousUser of 127.0.0.1:{served.port}"
        assert page.response is not None
        assert page.response.headers["Set-Cookie"].startswith("sessionid=")
        with pytest.raises(ConnectionClosed) as closed:
            await page.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1000


@pytest.mark.gen_test
async def test_host_is_checked(error_log: list[logging.LogRecord]) -> None:
    async with site() as served, await served.connect() as client:
        assert (await shake_hands(client, "/echo/", Host="evil.example")).status == 400
    assert error_log.pop().name == "django.security.DisallowedHost"


@pytest.mark.gen_test
async def test_request_is_finished_once_and_not_before_the_socket_is_closed() -> None:
    answers: list[Answer] = []
    async with site() as served:
        served.application.observers.append(answers.append)
        with signals_seen() as signals:
            async with connect(url(served, "/echo/")) as page:
                await page.send("hello")
                await page.recv()
                assert (signals, answers) == (["started"], [])
                assert len(served.application.in_flight) == 1
            await none_in_flight(served)
            assert signals == ["started", "finished"]
        [answer] = answers
        assert (answer.status, answer.sent, answer.complete) == (101, 5, True)
        assert answer.view == "tests.test_websockets.echo"


@pytest.mark.gen_test
async def test_socket_that_is_closed_leaves_nothing_for_the_garbage_collector() -> None:
    async with site() as served:
        gc.collect()
        gc.disable()
        try:
            async with connect(url(served, "/echo/")) as page:
                await page.send("hello")
                await page.recv()
            await none_in_flight(served)
            await until(lambda: seen["socket"]() is None)
        finally:
            gc.enable()


# Refusals


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("headers", "status", "reason"),
    [
        ({"Upgrade": None}, 426, "ask for an upgrade"),
        ({"Upgrade": "h2c"}, 426, "ask for an upgrade"),
        ({"Connection": "keep-alive"}, 400, "Does a proxy drop it?"),
        ({"Sec_WebSocket_Version": None}, 426, "spoken here is 13"),
        ({"Sec_WebSocket_Version": "8"}, 426, "spoken here is 13"),
        ({"Sec_WebSocket_Key": None}, 400, "Sec-WebSocket-Key"),
        ({"Sec_WebSocket_Key": "c2hvcnQ="}, 400, "Sec-WebSocket-Key"),
        ({"Sec_WebSocket_Key": "*" * 24}, 400, "Sec-WebSocket-Key"),
        ({"Origin": "http://evil.example"}, 403, "evil.example"),
        ({"Origin": "https://localhost"}, 403, "https://localhost"),
        ({"Origin": "null"}, 403, "null"),
        ({"Origin": "http://[::1"}, 403, "CSRF_TRUSTED_ORIGINS"),
    ],
)
async def test_what_is_no_handshake_is_refused(
    headers: dict[str, str | None], status: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    async with site() as served, await served.connect() as client:
        answer = await shake_hands(client, "/echo/", **headers)
        assert answer.status == status
        assert reason in answer.body.decode()
        if status == 426:
            assert answer.header("Upgrade") == "websocket"
            assert answer.header("Sec-WebSocket-Version") == "13"
        # The connection is still one of HTTP.
        assert (await shake_hands(client, "/echo/")).status == 101


@pytest.mark.gen_test
@pytest.mark.parametrize(
    "origin", ["http://localhost", "https://page.example", "https://a.pages.example"]
)
async def test_origins_are_those_of_djangos_csrf_middleware(origin: str) -> None:
    trusted = ["https://page.example", "https://*.pages.example"]
    async with site(CSRF_TRUSTED_ORIGINS=trusted) as served, await served.connect() as client:
        assert (await shake_hands(client, "/echo/", Origin=origin)).status == 101


@pytest.mark.gen_test
async def test_other_methods_are_refused() -> None:
    async with site() as served:
        answer = await served.request("/echo/", method="HEAD", headers=[("Upgrade", "websocket")])
        assert (answer.status, answer.header("Allow")) == (405, "GET")


def test_other_servers_say_that_they_cannot(
    settings_urls: None, error_log: list[logging.LogRecord]
) -> None:
    response = Client().get("/echo/", headers={"Upgrade": "websocket"})
    assert response.status_code == 501
    assert b"serve the project with tornjango" in response.content
    assert error_log.pop().name == "django.request"


@pytest.fixture
def settings_urls() -> Any:
    from django.test import override_settings

    with override_settings(ROOT_URLCONF=__name__):
        yield


# Ends


@pytest.mark.gen_test
async def test_talk_that_waits_for_a_message_hears_of_the_end() -> None:
    async with site() as served:
        async with connect(url(served, "/echo/")) as page:
            await page.send("hello")
            await page.recv()
        await none_in_flight(served)
        assert seen["ended"]


@pytest.mark.gen_test
@pytest.mark.parametrize("politely", [True, False])
async def test_talk_that_does_something_else_is_cancelled(politely: bool) -> None:
    async with site() as served, await served.connect() as client:
        await shake_hands(client, "/waits/")
        await read_frame(client)
        if politely:
            await client.send(closing(1000))
            assert (await read_frame(client)).code == 1000
        else:
            client.abort()
        await none_in_flight(served)
        assert seen["cancelled"]


@pytest.mark.gen_test
async def test_client_that_closes_its_half_of_the_connection_is_gone() -> None:
    async with site() as served, await served.connect() as client:
        await shake_hands(client, "/waits/")
        await read_frame(client)
        client.writer.write_eof()
        assert await client.rest() == b""
        await none_in_flight(served)


@pytest.mark.gen_test
async def test_talk_that_fails_closes_with_1011(error_log: list[logging.LogRecord]) -> None:
    async with site() as served, await served.connect() as client:
        await shake_hands(client, "/fails/")
        assert (await read_frame(client)).code == 1011
        await client.send(closing(1011))
        await none_in_flight(served)
    record = error_log.pop()
    assert "tests.test_websockets.fails" in record.getMessage()
    assert record.exc_info


@pytest.mark.gen_test
@pytest.mark.parametrize("target", ["/echo/", "/waits/"])
async def test_stopping_server_closes_with_1001_and_waits_for_the_answer(target: str) -> None:
    async with site() as served, await served.connect() as client:
        await shake_hands(client, target)
        if target == "/waits/":
            await read_frame(client)
        served.server.stop()
        assert (await read_frame(client)).code == 1001
        assert served.application.in_flight
        await client.send(closing(1001))
        await served._task
        assert not served.application.in_flight


@pytest.mark.gen_test
async def test_client_that_does_not_close_is_not_waited_for_longer_than_others() -> None:
    async with site() as served, await served.connect() as client:
        await shake_hands(client, "/echo/")
        served.server.stop(0.02)
        assert (await read_frame(client)).code == 1001
        await served._task
        assert await client.rest() == b""


@pytest.mark.gen_test
async def test_server_that_breaks_off_streams_tells_sockets() -> None:
    async with site() as served, await served.connect() as client:
        await shake_hands(client, "/waits/")
        await read_frame(client)
        served.server.stop(streams=False)
        assert (await read_frame(client)).code == 1001
        await served._task
        assert seen["cancelled"]


@pytest.mark.gen_test
async def test_client_that_answers_no_ping_is_closed() -> None:
    async with site() as served, await served.connect() as client:
        await shake_hands(client, "/pinged/")
        assert (await read_frame(client)).opcode == PING
        while (await read_frame(client)).opcode != CLOSE:
            pass
        await client.send(closing(1000))
        await none_in_flight(served)


# What clients should not send


async def _close_code(data: bytes, **headers: str) -> int | None:
    """What a server closes with that is sent this; None where it just closes the connection."""
    async with site() as served, await served.connect() as client:
        await shake_hands(client, "/echo/", **headers)
        await client.send(data)
        answers = await _until_closed(client)
        await client.send(closing(1000))
        await none_in_flight(served)
    assert "messages" not in seen
    closes = [answer.code for answer in answers if answer.opcode == CLOSE]
    return closes[0] if closes else None


async def _until_closed(client: RawClient) -> list[Any]:
    answers = []
    try:
        while not answers or answers[-1].opcode != CLOSE:
            answers.append(await read_frame(client))
    except (asyncio.IncompleteReadError, ConnectionResetError):
        pass
    return answers


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(TEXT, b"hello", masked=False), 1002),
        (frame(TEXT, b"x" * 10_001), 1009),
        (frame(BINARY, b"x" * 1_000_000), 1009),
        (frame(TEXT, b"x" * 6000, final=False) + frame(CONTINUED, b"x" * 6000), 1009),
        (frame(TEXT, b"\xff"), None),
        (frame(TEXT, b"a", flags=0x20), None),
        (frame(TEXT, b"a", flags=RSV1), None),
        (frame(CONTINUED, b"a"), None),
        (frame(TEXT, b"a", final=False) + frame(TEXT, b"b"), None),
        (frame(PING, b"a", final=False), None),
        (frame(PING, b"a" * 126), None),
        (frame(0x3, b"a"), None),
        (frame(0xB, b"a"), None),
        (frame(CLOSE, b"\x03\xe8\xff\xff"), 1007),
        (frame(CLOSE, b"\x03"), 0),
    ],
)
async def test_violation_ends_the_socket(data: bytes, code: int | None) -> None:
    if code == 0:  # a close frame without a code is answered in kind
        async with site() as served, await served.connect() as client:
            await shake_hands(client, "/echo/")
            await client.send(data)
            assert (await read_frame(client)).data == b""
        return
    assert await _close_code(data) == code


def _deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("data", "code"),
    [(_deflated(b"x" * 100_000_000)[:9000], 1009), (b"\xff" * 50, 1007)],
    ids=["bomb", "broken"],
)
async def test_compressed_violation_ends_the_socket(data: bytes, code: int) -> None:
    sent = frame(TEXT, data, flags=RSV1)
    assert await _close_code(sent, Sec_WebSocket_Extensions=DEFLATE) == code


@pytest.mark.gen_test
async def test_client_that_goes_on_sending_what_is_too_large_still_hears_why() -> None:
    async with site() as served, await served.connect() as client:
        await shake_hands(client, "/echo/")
        for _ in range(100):
            await client.send(frame(TEXT, b"x" * 60_000))
        assert (await read_frame(client)).code == 1009
        await client.send(closing(1009))
        assert await client.rest() == b""


@pytest.mark.gen_test
async def test_frames_are_read_no_quicker_than_they_may_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(websockets, "_BURST", 3e6)
    async with site() as served, await served.connect() as client:
        seen["rate"] = 1e-6  # three at once, and the next in ten days
        await shake_hands(client, "/paced/")
        await client.send(frame(TEXT, b"1") + frame(TEXT, b"2") + frame(PING, b"3"))
        for answer in (b"1", b"2", b"3"):
            assert (await read_frame(client)).data == answer
        await client.send(frame(TEXT, b"4"))
        async with await served.connect() as other:  # nobody else is held up
            seen["rate"] = 100
            await shake_hands(other, "/paced/")
            await other.send(frame(TEXT, b"5"))
            assert (await read_frame(other)).data == b"5"
        assert seen["messages"] == ["1", "2", "5"]
        client.abort()
        served.server.stop(0)
        await served._task


@pytest.mark.gen_test
async def test_flood_of_pings_holds_up_nobody() -> None:
    async with site() as served, await served.connect() as hostile:
        await shake_hands(hostile, "/echo/")
        hostile.writer.write(frame(PING) * 100_000 + frame(TEXT, b"", final=False))
        hostile.writer.write(frame(CONTINUED, b"", final=False) * 100_000)
        async with connect(url(served, "/echo/")) as page:
            for _ in range(50):
                await page.send("hello")
                assert await page.recv() == "hello"
        assert (await read_frame(hostile)).opcode == PONG
        hostile.abort()
        served.server.stop(0)
        await served._task


# Compression


def _inflated(data: bytes, window: int) -> bytes:
    return zlib.decompressobj(-window).decompress(data + b"\0\0\xff\xff")


@pytest.mark.gen_test
async def test_short_messages_are_sent_as_they_are_and_long_ones_compressed() -> None:
    async with site() as served, await served.connect() as client:
        offer = "x-webkit; a=b, permessage-deflate; client_max_window_bits"
        answer = await shake_hands(client, "/echo/", Sec_WebSocket_Extensions=offer)
        assert answer.header("Sec-WebSocket-Extensions") == (
            "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
        )
        await client.send(frame(TEXT, b"x" * 100))
        short = await read_frame(client)
        assert (short.data, short.flags) == (b"x" * 100, 0)
        await client.send(frame(TEXT, b"x" * 5000))
        long = await read_frame(client)
        assert (long.flags, len(long.data) < 50) == (RSV1, True)
        # Without what came before: each is compressed by itself.
        assert _inflated(long.data, 15) == b"x" * 5000


@pytest.mark.parametrize(
    ("header", "window"),
    [
        ("", None),
        ("permessage-bzip2", None),
        (DEFLATE, 15),
        (f"{DEFLATE}; client_max_window_bits", 15),
        (f'{DEFLATE}; client_max_window_bits="10"; server_max_window_bits=12', 12),
        (f"{DEFLATE}; server_no_context_takeover; client_no_context_takeover", 15),
        (f"{DEFLATE}; server_max_window_bits=8", None),
        (f"{DEFLATE}; server_max_window_bits=8, {DEFLATE}", 15),
        (f"{DEFLATE}; server_max_window_bits=16", None),
        (f"{DEFLATE}; server_max_window_bits", None),
        (f"{DEFLATE}; client_max_window_bits=7", None),
        (f"{DEFLATE}; server_no_context_takeover=1", None),
        (f"{DEFLATE}; unknown", None),
        (f"{DEFLATE}; server_max_window_bits=9; server_max_window_bits=10", None),
    ],
)
def test_offers_of_compression_are_taken_or_declined(header: str, window: int | None) -> None:
    assert _window(header) == window


@pytest.mark.gen_test
async def test_narrow_window_is_kept_to() -> None:
    async with site() as served, await served.connect() as client:
        offer = f"{DEFLATE}; server_max_window_bits=9"
        answer = await shake_hands(client, "/echo/", Sec_WebSocket_Extensions=offer)
        assert "server_max_window_bits=9" in (answer.header("Sec-WebSocket-Extensions") or "")
        await client.send(frame(TEXT, bytes(range(128)) * 40))
        answered = await read_frame(client)
        assert _inflated(answered.data, 9) == bytes(range(128)) * 40


# Slow clients


@pytest.mark.gen_test
async def test_what_waits_for_a_client_that_does_not_read_is_bounded() -> None:
    async with site() as served, await served.connect() as client:
        seen["rate"] = 1e6
        await shake_hands(client, "/paced/")
        sending = asyncio.ensure_future(client.send(frame(TEXT, b"x" * 500_000) * 100))
        await until(lambda: "socket" in seen and seen["socket"]().waiting)
        assert seen["socket"]().waiting == 500_000  # and nothing more is read
        client.abort()
        await asyncio.gather(sending, return_exceptions=True)
        await none_in_flight(served)
