from __future__ import annotations

import asyncio
import gzip
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from django.core.signals import request_finished
from django.http import HttpRequest
from django.http.response import HttpResponseBase

from tests import http_views, views
from tests.answers import CONTENT
from tests.serving import Site, reached, serving, until
from tornjango.testing import RawClient, Response

Log = list[logging.LogRecord]
SIZE = len(CONTENT)
MIDDLEWARE = ["django.middleware.common.CommonMiddleware"]


@asynccontextmanager
async def answering(**settings: Any) -> AsyncIterator[Site]:
    async with serving(
        **{"ROOT_URLCONF": "tests.answers", "MIDDLEWARE": MIDDLEWARE, **settings}
    ) as site:
        yield site


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "stored"
    path.write_bytes(CONTENT)
    with gzip.open(f"{path}.gz", "wb") as file:
        file.write(CONTENT)
    return path


# The head


@pytest.mark.gen_test
async def test_a_wrong_length_is_put_right_and_told_of(caplog: pytest.LogCaptureFixture) -> None:
    async with answering() as site, await site.connect() as client:
        for told in ("3", "70", "many", "-1", "007"):
            answer = await client.request(f"/length/?content=content&length={told}")
            assert (answer.status, answer.body) == (200, b"content")
            assert answer.all("Content-Length") == ["7"]
            assert f"GET /length/ has 7 bytes, and is sent so; its Content-Length was '{told}'" in (
                caplog.records.pop().getMessage()
            )


@pytest.mark.gen_test
async def test_what_a_view_says_of_the_content_of_a_head_is_sent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with answering() as site, await site.connect() as client:
        answer = await client.request("/length/?length=99", method="HEAD")
        assert answer.header("Content-Length") == "99"
        assert (await client.request("/empty/")).status == 200
    assert not caplog.text


@pytest.mark.gen_test
async def test_the_length_of_what_has_no_content() -> None:
    lengths = {
        "/no-content/": None,
        "/no-content/?Content-Length=0": None,
        "/not-modified/": None,
        "/not-modified/?Content-Length=99": "99",
    }
    async with answering() as site, await site.connect() as client:
        for target, length in lengths.items():
            answer = await client.request(target)
            assert (target, answer.header("Content-Length")) == (target, length)
            assert answer.header("Transfer-Encoding") is None


@pytest.mark.gen_test
async def test_how_an_answer_is_framed_is_the_servers_to_say() -> None:
    async with answering() as site, await site.connect() as client:
        answer = await client.request("/of-the-connection/")
        assert answer.body == b"content"
        names = {name.lower() for name, _ in answer.headers}
        assert not names & {"transfer-encoding", "keep-alive", "te"}


@pytest.mark.gen_test
async def test_nothing_is_injected_into_the_head(error_log: Log) -> None:
    async with answering() as site:
        for into in ("reason", "header", "name"):
            answer = await site.request(f"/injects/?into={into}")
            assert (into, answer.status, answer.header("X-Injected")) == (into, 500, None)
            assert "tests.answers.injects" in error_log.pop().getMessage()


CONDITIONS = [
    ("If-None-Match", '"v1"', 304),
    ("If-None-Match", 'W/"v0", W/"v1"', 304),
    ("If-None-Match", '"v2"', 200),
    ("If-Modified-Since", "Tue, 30 Jun 2009 12:00:00 GMT", 304),
    ("If-Modified-Since", "Tue, 30 Jun 2009 11:59:59 GMT", 200),
    ("If-Match", '"v2"', 412),
    ("If-Unmodified-Since", "Tue, 30 Jun 2009 11:59:59 GMT", 412),
]


@pytest.mark.gen_test
async def test_conditions_are_answered_by_django_and_sent_as_they_should_be() -> None:
    async with answering() as site, await site.connect() as client:
        for name, value, status in CONDITIONS:
            answer = await client.request("/conditional/", headers=[(name, value)])
            assert (value, answer.status) == (value, status)
            assert answer.body == (b"content" if status == 200 else b"")
            if status != 412:
                assert answer.header("ETag") == '"v1"'
                assert answer.header("Last-Modified") == "Tue, 30 Jun 2009 12:00:00 GMT"
            length = {200: "7", 304: None, 412: "0"}[status]
            assert answer.header("Content-Length") == length


# Streams


@pytest.mark.parametrize("kind", ["", "-async"])
@pytest.mark.gen_test
async def test_a_stream_without_parts_is_an_empty_answer(kind: str) -> None:
    async with answering() as site, await site.connect() as client:
        for _ in range(2):
            answer = await client.request(f"/empty{kind}/")
            assert (answer.status, answer.body) == (200, b"")
            assert answer.header("Transfer-Encoding") == "chunked"


@pytest.mark.gen_test
async def test_a_stream_of_a_known_length_needs_no_chunks() -> None:
    async with answering() as site, await site.connect() as client:
        for _ in range(2):
            answer = await client.request("/stream-length/?length=10")
            assert answer.body == b"0123456789"
            assert answer.header("Transfer-Encoding") is None


@pytest.mark.gen_test
async def test_a_stream_of_another_length_than_told_is_broken_off(error_log: Log) -> None:
    async with answering() as site:
        for length in (0, 4, 5, 7, 9, 11, 100):
            async with await site.connect() as client:
                target = f"/stream-length/?length={length}"
                await client.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                await client.head()
                body = await client.rest()
                assert b"0123456789".startswith(body)
                assert len(body) <= length
    assert len(error_log) == 7
    for _ in range(7):
        assert "tests.answers.stream_length" in error_log.pop().getMessage()


@pytest.mark.gen_test
async def test_parts_of_a_sync_stream_are_sent_as_they_come() -> None:
    async with answering() as site, await site.connect() as client:
        await client.send(b"GET /gated/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await client.head()
        assert await client.chunk() == b"one"
        http_views.thread_gates["go"].set()
        rest = b""
        while chunk := await client.chunk():
            rest += chunk
        assert rest == b"twothree"


@pytest.mark.gen_test
async def test_many_small_parts_arrive_in_order() -> None:
    async with answering() as site, await site.connect() as client:
        answer = await client.request("/small-parts/?count=3000")
        assert answer.body == b"".join(b"%d\n" % number for number in range(3000))


@pytest.mark.gen_test
async def test_a_sync_stream_is_closed_once_on_its_thread_and_its_handler_does_not_wait() -> None:
    finished: list[int] = []

    def on_finished(**kwargs: Any) -> None:
        finished.append(threading.get_ident())

    request_finished.connect(on_finished)
    try:
        async with answering() as site, await site.connect() as client:
            await client.send(b"GET /gated/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await client.head()
            await reached(http_views.thread_gates["parked"])
            (handler,) = site.application.in_flight
            client.abort()
            await asyncio.wait({handler.task})
            assert not finished
            http_views.thread_gates["go"].set()
            await reached(http_views.thread_gates["closed"])
            await until(lambda: finished)
            # Not the third part: it was not asked for.
            begun, closed = views.seen
            assert {begun, closed} == set(finished)
            assert len(finished) == 1
    finally:
        request_finished.disconnect(on_finished)


@pytest.mark.gen_test
async def test_a_sync_stream_that_gets_no_thread_is_closed_and_broken_off() -> None:
    options = {"THREADS": 1, "THREADS_QUEUE": 1}
    async with answering(
        TORNJANGO=options, MIDDLEWARE=["tests.test_sending.fills_the_queue"]
    ) as site:
        async with await site.connect() as client:
            with pytest.raises(asyncio.IncompleteReadError):
                await client.request("/gated/")
        http_views.thread_gates["go"].set()
        assert views.seen == ["closed"]


async def _nothing() -> None: ...


def fills_the_queue(get_response: Any) -> Any:
    """Middleware that leaves no thread for the stream."""

    async def middleware(request: HttpRequest) -> HttpResponseBase:
        response: HttpResponseBase = await get_response(request)
        response._resource_closers.append(lambda: views.seen.append("closed"))  # type: ignore[attr-defined]
        loop = asyncio.get_running_loop()
        for _ in range(2):
            loop.run_in_executor(None, http_views.thread_gates["go"].wait, 10)
        return response

    return middleware


fills_the_queue.async_capable = True  # type: ignore[attr-defined]
fills_the_queue.sync_capable = False  # type: ignore[attr-defined]


@pytest.mark.gen_test
async def test_a_generator_below_the_stream_is_closed_when_the_request_ends() -> None:
    async with answering() as site, await site.connect() as client:
        await client.send(b"GET /wrapped/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await client.head()
        (handler,) = site.application.in_flight
        client.abort()
        await asyncio.wait({handler.task})
        assert views.seen == ["closed"]


@pytest.mark.gen_test
async def test_an_endless_stream_leaves_others_their_turn() -> None:
    async with answering() as site, await site.connect() as one, await site.connect() as two:
        await one.send(b"GET /wrapped/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        reading = asyncio.create_task(_read_on(one))
        assert (await two.request("/empty/")).status == 200
        reading.cancel()


async def _read_on(client: RawClient) -> None:
    while await client.reader.read(1024 * 1024):
        pass


# Files


async def asked(site: Site, path: Path, *headers: tuple[str, str], **query: str) -> Response:
    target = f"/file/?{urlencode({'path': str(path), **query})}"
    return await site.request(target, headers=headers)


KINDS = ["plain", "raw", "django", "temporary", "named", "memory", "gzip"]


@pytest.mark.gen_test
async def test_a_file_of_any_kind_is_sent_as_it_reads(stored: Path) -> None:
    async with answering() as site:
        for kind in [*KINDS, "backwards", "only reads", "pipe"]:
            content = bytes(reversed(CONTENT)) if kind == "backwards" else CONTENT
            assert (kind, (await asked(site, stored, kind=kind)).body) == (kind, content)


@pytest.mark.gen_test
async def test_a_part_of_a_file_is_sent(stored: Path) -> None:
    async with answering() as site:
        for kind in KINDS:
            answer = await asked(site, stored, ("Range", "bytes=300-309"), kind=kind)
            assert (kind, answer.status, answer.reason) == (kind, 206, "Partial Content")
            assert answer.body == CONTENT[300:310]
            assert answer.header("Content-Range") == f"bytes 300-309/{SIZE}"
            assert answer.header("Content-Length") == "10"
            assert answer.header("Accept-Ranges") == "bytes"
            assert answer.header("Content-Type") == "text/plain"


@pytest.mark.gen_test
async def test_a_part_is_counted_from_where_the_view_has_left_the_file(stored: Path) -> None:
    async with answering() as site:
        for kind in ("plain", "memory"):
            query = {"kind": kind, "from": "24"}
            answer = await asked(site, stored, ("Range", "bytes=-1000"), **query)
            assert (answer.status, answer.body) == (206, CONTENT[24:])
            answer = await asked(site, stored, ("Range", "bytes=1-2"), **query)
            assert answer.body == CONTENT[25:27]
            assert answer.header("Content-Range") == "bytes 1-2/1000"


@pytest.mark.gen_test
async def test_a_part_that_is_not_there_is_answered_416(stored: Path) -> None:
    async with answering() as site, await site.connect() as client:
        target = f"/file/?{urlencode({'path': str(stored)})}"
        answer = await client.request(target, headers=[("Range", f"bytes={SIZE}-")])
        assert answer.status == 416
        assert (answer.body, answer.header("Content-Length")) == (b"", "0")
        assert answer.header("Content-Range") == f"bytes */{SIZE}"
        assert (await client.request(target)).body == CONTENT


@pytest.mark.gen_test
async def test_a_part_is_of_the_version_that_the_client_has(stored: Path) -> None:
    validators = {"ETag": '"v1"', "Last-Modified": "Tue, 30 Jun 2009 12:00:00 GMT"}
    async with answering() as site:
        for if_range, status in (
            ('"v1"', 206),
            ('"v2"', 200),
            ('W/"v1"', 200),
            ("Tue, 30 Jun 2009 12:00:00 GMT", 206),
            ("Tue, 30 Jun 2009 12:00:01 GMT", 200),
        ):
            headers = [("Range", "bytes=0-9"), ("If-Range", if_range)]
            answer = await asked(site, stored, *headers, **validators)
            assert (if_range, answer.status) == (if_range, status)
            assert answer.body == (CONTENT[:10] if status == 206 else CONTENT)


WITHOUT_PARTS = [
    {"kind": "only reads"},
    {"kind": "pipe"},
    {"Content-Encoding": "br"},
    {"Content-Range": f"bytes 0-{SIZE - 1}/2000"},
    {"Accept-Ranges": "none"},
    {"status": "203"},
]


@pytest.mark.gen_test
async def test_what_is_no_whole_file_has_no_parts(stored: Path) -> None:
    async with answering() as site:
        for query in WITHOUT_PARTS:
            answer = await asked(site, stored, ("Range", "bytes=0-9"), **query)
            assert (query, answer.status) == (query, int(query.get("status", 200)))
            assert answer.body == CONTENT
            assert answer.header("Accept-Ranges") == query.get("Accept-Ranges")


@pytest.mark.gen_test
async def test_what_is_compressed_on_its_way_has_no_parts(stored: Path) -> None:
    async with answering(MIDDLEWARE=["django.middleware.gzip.GZipMiddleware"]) as site:
        headers = [("Range", "bytes=0-9"), ("Accept-Encoding", "gzip")]
        answer = await asked(site, stored, *headers)
        assert (answer.status, answer.header("Content-Encoding")) == (200, "gzip")
        assert gzip.decompress(answer.body) == CONTENT


@pytest.mark.parametrize("method", ["HEAD", "POST"])
@pytest.mark.gen_test
async def test_only_a_get_has_parts(method: str, stored: Path) -> None:
    async with answering() as site, await site.connect() as client:
        target = f"/file/?{urlencode({'path': str(stored)})}"
        answer = await client.request(target, method=method, headers=[("Range", "bytes=0-9")])
        assert (answer.status, answer.header("Content-Length")) == (200, str(SIZE))
        assert answer.header("Accept-Ranges") == "bytes"
        assert (await client.request("/empty/")).status == 200


@pytest.mark.gen_test
async def test_a_file_that_grows_is_sent_as_long_as_it_was_said_to_be(stored: Path) -> None:
    async with answering() as site:
        target = f"/other-size/?{urlencode({'path': str(stored), 'size': 9999})}"
        assert (await site.request(target)).body == CONTENT


@pytest.mark.gen_test
async def test_a_file_that_shrinks_is_broken_off(stored: Path, error_log: Log) -> None:
    async with answering() as site:
        target = f"/other-size/?{urlencode({'path': str(stored), 'size': 10})}"
        with pytest.raises(asyncio.IncompleteReadError):
            await site.request(target)
    assert "tests.answers.other_size" in error_log.pop().getMessage()
