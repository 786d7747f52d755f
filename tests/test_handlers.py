from __future__ import annotations

import asyncio
import gc
import logging
from pathlib import Path
from typing import Any

import pytest
from django.core.signals import request_finished
from django.test import override_settings

from tests import http_views, views
from tests.serving import reached, serving, signals_seen
from tornjango.handlers import DjangoHandler
from tornjango.requests import TornadoRequest
from tornjango.testing import RawClient

Log = list[logging.LogRecord]
MIB = 1024 * 1024


# What goes over the wire


@pytest.mark.gen_test
async def test_head_is_answered_as_get_without_a_body() -> None:
    async with serving() as site, await site.connect() as client:
        get = await client.request("/status/200/")
        head = await client.request("/status/200/", method="HEAD")
        assert head.header("Content-Length") == get.header("Content-Length") == "7"
        assert (await client.request("/status/200/")).body == b"content"


@pytest.mark.parametrize("code", [204, 304])
@pytest.mark.gen_test
async def test_a_status_without_content_has_none_on_the_wire(code: int) -> None:
    async with serving() as site, await site.connect() as client:
        answer = await client.request(f"/status/{code}/")
        assert answer.status == code
        assert answer.header("Transfer-Encoding") is None
        assert code == 304 or answer.header("Content-Length") is None
        assert (await client.request("/status/200/")).body == b"content"


@pytest.mark.gen_test
async def test_each_cookie_has_a_line_of_its_own() -> None:
    async with serving() as site:
        answer = await site.request("/cookies/")
        assert answer.all("Set-Cookie") == ["a=1; Path=/", "b=2; HttpOnly; Path=/"]


@pytest.mark.gen_test
async def test_a_views_reason_phrase_is_sent() -> None:
    async with serving() as site:
        answer = await site.request("/reason/")
        assert (answer.status, answer.reason) == (299, "Fair <Enough>, Thank You")


@pytest.mark.gen_test
async def test_a_views_headers_are_sent_as_they_are() -> None:
    async with serving() as site:
        answer = await site.request("/headers/")
        sent = {name: answer.header(name) for name in ("X-Empty", "X-Latin", "ETag")}
        assert sent == {"X-Empty": "", "X-Latin": "é", "ETag": '"1"'}
        assert answer.all("Date") == ["Sun"]


@pytest.mark.gen_test
async def test_a_header_that_breaks_http_is_answered_500_and_logged_with_the_view(
    error_log: Log,
) -> None:
    async with serving() as site:
        assert (await site.request("/bad-header/")).status == 500
        assert "tests.http_views.bad_header" in error_log.pop().getMessage()


# Connections


@pytest.mark.gen_test
async def test_a_connection_serves_one_request_after_another() -> None:
    async with serving() as site, await site.connect() as client:
        for number in range(3):
            answer = await client.request(f"/echo/?number={number}")
            assert f'"QUERY_STRING": "number={number}"'.encode() in answer.body


@pytest.mark.gen_test
async def test_pipelined_requests_are_answered_in_order() -> None:
    async with serving() as site, await site.connect() as client:
        requests = [f"GET /echo/?n={n} HTTP/1.1\r\nHost: localhost\r\n\r\n" for n in range(3)]
        await client.send("".join(requests).encode())
        for number in range(3):
            assert f'"QUERY_STRING": "n={number}"'.encode() in (await client.response()).body


@pytest.mark.parametrize(
    ("head", "closes"),
    [
        ("HTTP/1.1\r\nHost: localhost", False),
        ("HTTP/1.1\r\nHost: localhost\r\nConnection: close", True),
        ("HTTP/1.0", True),
        ("HTTP/1.0\r\nConnection: keep-alive", False),
    ],
)
@pytest.mark.gen_test
async def test_a_connection_is_kept_as_its_client_asks(head: str, closes: bool) -> None:
    async with serving() as site, await site.connect() as client:
        await client.send(f"GET /status/200/ {head}\r\n\r\n".encode())
        assert (await client.response()).body == b"content"
        if closes:
            assert await client.rest() == b""
        else:
            assert (await client.request("/status/200/")).body == b"content"


@pytest.mark.parametrize("keep_alive", ["", "Connection: keep-alive\r\n"])
@pytest.mark.gen_test
async def test_a_stream_to_http_1_0_ends_with_its_connection(keep_alive: str) -> None:
    async with serving() as site, await site.connect() as client:
        await client.send(f"GET /streams-sync/ HTTP/1.0\r\n{keep_alive}\r\n".encode())
        answer = await client.response()
        assert answer.header("Transfer-Encoding") is None
        assert answer.body == b"012"


@pytest.mark.gen_test
async def test_a_view_can_have_its_connection_closed() -> None:
    async with serving() as site:
        answer = await site.raw(b"GET /closes/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer.endswith(b"content")
        assert b"Connection: close" in answer


@pytest.mark.gen_test
async def test_a_language_does_not_outlive_its_request() -> None:
    async with serving() as site, await site.connect() as client:
        assert (await client.request("/language/?set=de")).body == b"en-us"
        assert (await client.request("/language/?set=fr")).body == b"en-us"


# Streams


@pytest.mark.gen_test
async def test_parts_of_an_async_stream_are_sent_as_they_come() -> None:
    async with serving() as site, await site.connect() as client:
        await client.send(b"GET /streams/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await client.head()
        assert await client.chunk() == b"one"
        views.gates["go"].set()
        assert await client.chunk() == b"two"
        assert await client.chunk() == b""


@pytest.mark.gen_test
async def test_a_sync_stream_is_iterated_in_one_worker_thread() -> None:
    async with serving() as site:
        assert (await site.request("/streams-sync/")).body == b"012"
        assert len(set(views.seen)) == 1
        assert views.seen[0].startswith("tornjango-worker")


@pytest.mark.gen_test
async def test_an_async_stream_waits_for_a_client_that_does_not_read() -> None:
    async with serving() as site, await site.connect() as client:
        await client.send(b"GET /streams-much/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await client.head()
        sent = await _standstill(views.seen)
        # What the system and the client buffer, not the 640 MB that there are.
        assert sent < 500
        client.abort()
        await views.gates["closed"].wait()


@pytest.mark.gen_test
async def test_a_sync_stream_waits_for_a_client_that_does_not_read() -> None:
    async with serving() as site, await site.connect() as client:
        await client.send(b"GET /streams-much-sync/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await client.head()
        assert await _standstill(views.seen) < 500
        client.abort()
        await reached(http_views.thread_gates["closed"])


async def _standstill(grows: list[Any]) -> int:
    """How long the list is when it no longer grows."""
    before = -1
    while len(grows) != before:
        before = len(grows)
        await asyncio.sleep(0.1)
    return before


@pytest.mark.gen_test
async def test_a_client_that_leaves_closes_an_async_stream() -> None:
    async with serving() as site, await site.connect() as client:
        await client.send(b"GET /streams/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await client.head()
        client.abort()
        await views.gates["closed"].wait()
        assert views.seen == ["closed"]


@pytest.mark.parametrize("kind", ["", "-async"])
@pytest.mark.gen_test
async def test_a_stream_that_fails_breaks_off_and_is_logged(kind: str, error_log: Log) -> None:
    async with serving() as site, await site.connect() as client:
        with pytest.raises(asyncio.IncompleteReadError):
            await client.request(f"/breaks-streaming{kind}/")
        assert "breaks_streaming" in error_log.pop().getMessage()


@pytest.mark.gen_test
async def test_head_of_a_stream_does_not_iterate_it() -> None:
    async with serving() as site, await site.connect() as client:
        await client.request("/streams-sync/", method="HEAD")
        assert views.seen == []
        assert (await client.request("/status/200/")).body == b"content"


# Files


@pytest.mark.gen_test
async def test_a_file_is_read_in_worker_threads_and_closed() -> None:
    async with serving() as site, await site.connect() as client:
        answer = await client.request(f"/watched-file/?length={MIB}")
        assert answer.header("Content-Length") == str(MIB)
        assert len(answer.body) == MIB
        assert (await client.request("/status/200/")).status == 200
        *threads, closed = views.seen
        assert closed == "closed"
        assert all(name.startswith("tornjango-worker") for name in threads)


@pytest.mark.gen_test
async def test_a_client_that_leaves_has_the_file_closed() -> None:
    async with serving() as site, await site.connect() as client:
        await client.send(
            f"GET /watched-file/?length={1024 * MIB} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        )
        await client.head()
        client.abort()
        await _ended(site.application)
        assert views.seen.count("closed") == 1
        assert len(views.seen) < 500


@pytest.mark.gen_test
async def test_a_file_on_disk_is_sent_whole(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(range(256)) * 1024)
    async with serving() as site:
        answer = await site.request(f"/file/?path={path}")
        assert answer.body == path.read_bytes()
        assert answer.header("Content-Disposition") == 'inline; filename="data.bin"'


@pytest.mark.gen_test
async def test_an_answer_larger_than_all_buffers_arrives_whole() -> None:
    async with serving() as site:
        assert len((await site.request(f"/large/?length={50 * MIB}")).body) == 50 * MIB


# Who leaves, and what fails


async def _ended(application: Any) -> None:
    while application.in_flight:
        await asyncio.wait({handler.task for handler in application.in_flight})


@pytest.mark.gen_test
async def test_a_client_that_leaves_has_its_view_cancelled() -> None:
    async with serving() as site, await site.connect() as client:
        await client.send(b"GET /parks-async/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await views.gates["parked"].wait()
        client.abort()
        await views.Gone.event.wait()
        await _ended(site.application)


@pytest.mark.gen_test
async def test_a_client_that_left_right_after_its_request_leaves_nothing_parked() -> None:
    async with serving() as site:
        for _ in range(20):  # whether the request or its end is noticed first depends
            client = await site.connect()
            await client.send(b"GET /parks-async/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
            client.writer.close()
        await site.request("/status/200/")
        await _ended(site.application)


@pytest.mark.gen_test
async def test_a_view_that_ignores_being_cancelled_harms_nobody() -> None:
    async with serving() as site, await site.connect() as client:
        await client.send(b"GET /ignores-cancelling/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await views.gates["parked"].wait()
        client.abort()
        await _ended_after(site.application)
        assert views.seen == ["went on"]
        assert (await site.request("/status/200/")).body == b"content"


async def _ended_after(application: Any) -> None:
    await _ended(application)
    assert not application.in_flight


@pytest.mark.gen_test
async def test_a_view_that_cancels_itself_is_answered_500(error_log: Log) -> None:
    async with serving() as site, await site.connect() as client:
        assert (await client.request("/cancels-itself/")).status == 500
        assert "tests.http_views.cancels_itself" in error_log.pop().getMessage()


@pytest.mark.gen_test
async def test_a_view_that_fails_is_djangos_500_and_the_connection_goes_on(error_log: Log) -> None:
    async with serving() as site, await site.connect() as client:
        answer = await client.request("/raises/")
        assert (answer.status, b"a secret" in answer.body) == (500, False)
        assert error_log.pop().name == "django.request"
        assert (await client.request("/status/200/")).body == b"content"


@pytest.mark.gen_test
async def test_a_fault_outside_of_django_is_answered_500_once(
    error_log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*args: Any) -> None:
        raise RuntimeError("a secret")

    async with serving() as site:
        monkeypatch.setattr(site.application.chain, "get_response_async", broken)
        answer = await site.request("/status/200/")
        assert (answer.status, b"a secret" in answer.body) == (500, False)
        assert "GET /status/200/ HTTP/1.1" in error_log.pop().getMessage()
        monkeypatch.undo()
        assert (await site.request("/status/200/")).status == 200


# Signals


@pytest.mark.parametrize("cut", [DjangoHandler.on_connection_close, DjangoHandler.stop])
@pytest.mark.gen_test
async def test_closing_a_response_is_not_cut_short(cut: Any) -> None:
    names: list[str] = []

    def finished(**kwargs: Any) -> None:
        names.append("finished")

    request_finished.connect(finished)
    try:
        async with serving(TORNJANGO={"THREADS": 1}) as site:
            site.application.workers.pool.submit(http_views.thread_gates["go"].wait, 10)
            assert (await site.request("/status/200/")).status == 200
            (handler,) = site.application.in_flight  # it wants the busy thread, for the receiver
            cut(handler)
            http_views.thread_gates["go"].set()
            await asyncio.wait({handler.task})
            assert names == ["finished"]
    finally:
        request_finished.disconnect(finished)


@pytest.mark.parametrize(
    "path",
    ["/status/200/", "/sync/", "/streams-sync/", "/not-there/", "/watched-file/?length=10"],
)
@pytest.mark.gen_test
async def test_signals_are_sent_once_for_each_request(path: str) -> None:
    with signals_seen() as names:
        async with serving() as site:
            await site.request(path)
        assert names == ["started", "finished"]


@pytest.mark.parametrize("path", ["/raises/", "/cancels-itself/", "/breaks-streaming/"])
@pytest.mark.gen_test
async def test_signals_are_sent_once_for_a_request_that_fails(path: str, error_log: Log) -> None:
    with signals_seen() as names:
        async with serving() as site:
            await site.raw(
                f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
            )
        assert names == ["started", "finished"]
    assert len(error_log) == 1
    error_log.clear()


@pytest.mark.parametrize("path", ["/parks-async/", "/parks/", "/streams/"])
@pytest.mark.gen_test
async def test_signals_are_sent_once_when_the_client_leaves(path: str) -> None:
    with signals_seen() as names:
        async with serving() as site, await site.connect() as client:
            await client.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            if path == "/streams/":
                await client.head()
            else:
                await views.gates["parked"].wait()
            client.abort()
            await _ended(site.application)
        assert names == ["started", "finished"]


# What a request leaves behind


@pytest.mark.parametrize("path", ["/status/200/", "/sync/", "/streams-sync/"])
@pytest.mark.gen_test
async def test_a_request_leaves_no_reference_cycle(path: str) -> None:
    # Django's authentication and messages tie knots of their own.
    async with serving(MIDDLEWARE=[]) as site, await site.connect() as client:
        await client.request(path)
        await _ended(site.application)
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            await client.request(path)
            await _ended(site.application)
            await client.request("/status/200/")
            gc.collect()
            left = [type(o) for o in gc.garbage if isinstance(o, (TornadoRequest, DjangoHandler))]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
        assert left == []


@pytest.mark.gen_test
async def test_access_is_logged_as_runserver_does_in_development(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("django.server")
    logger.addHandler(caplog.handler)
    with override_settings(DEBUG=True), caplog.at_level(logging.INFO, "django.server"):
        async with serving() as site:
            await site.request("/status/200/")
            await site.request("/status/404/")
    logger.removeHandler(caplog.handler)
    lines = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "django.server"]
    assert lines == [
        ("INFO", '"GET /status/200/ HTTP/1.1" 200 7'),
        ("WARNING", '"GET /status/404/ HTTP/1.1" 404 7'),
    ]


@pytest.mark.gen_test
async def test_a_full_queue_of_threads_is_answered_503(error_log: Log) -> None:
    async with (
        serving(TORNJANGO={"THREADS": 1, "THREADS_QUEUE": 1}) as site,
        await RawClient.connect(site.port) as one,
        await RawClient.connect(site.port) as two,
    ):
        await one.send(b"GET /parks-sync/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reached(http_views.thread_gates["parked"])
        await two.send(b"GET /parks-sync/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await site.request("/status/200/")
        answer = await site.request("/parks-sync/")
        assert (answer.status, answer.header("Retry-After")) == (503, "1")
        assert "tests.http_views.parks_sync" in error_log.pop().getMessage()
        http_views.thread_gates["go"].set()
        assert (await one.response()).body == (await two.response()).body == b"went"
