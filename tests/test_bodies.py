from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import django
import pytest

from tests import views
from tests.serving import Site, reached, serving
from tests.test_requests import multipart
from tornjango.bodies import Body

Log = list[logging.LogRecord]
MIB = 1024 * 1024


@asynccontextmanager
async def taking(**settings: Any) -> AsyncIterator[Site]:
    async with serving(**{"ROOT_URLCONF": "tests.uploads", "MIDDLEWARE": [], **settings}) as site:
        yield site


async def uploaded(site: Site, target: str, *sizes: int) -> Any:
    """The answer to a form with files of these sizes: the first is called "first"."""
    names = ["first", "second", "third"]
    parts = [
        (f'name="file"; filename="{name}"', bytes(size))
        for name, size in zip(names, sizes, strict=False)
    ]
    headers, body = multipart(('name="a"', b"1"), *parts)
    return await site.request(target, method="POST", headers=headers, body=body)


# Django's upload handlers


@pytest.mark.parametrize("path", ["sync", "on-loop"])
@pytest.mark.gen_test
async def test_upload_handlers_that_a_view_sets_are_asked_first(path: str) -> None:
    async with taking() as site:
        answer = await uploaded(site, f"/{path}/?handler=watching", 100_000, 10)
        assert json.loads(answer.body) == {
            "files": {"file": [[100_000, False], [10, False]]},
            "POST": {"a": ["1"]},
        }
        assert views.seen[:3] == ["new first", 0, 65_384]
        assert views.seen[-3:] == [0, "complete 10", "all complete"]


@pytest.mark.gen_test
async def test_handlers_of_the_settings_are_used() -> None:
    async with taking(FILE_UPLOAD_HANDLERS=["tests.uploads.Watching"]) as site:
        answer = await uploaded(site, "/sync/", 10)
        assert json.loads(answer.body)["files"] == {}
        assert views.seen == ["new first", 0, "complete 10", "all complete"]


@pytest.mark.gen_test
async def test_a_handler_may_skip_a_file() -> None:
    async with taking() as site:
        answer = await uploaded(site, "/sync/?handler=skipping", 100_000, 10)
        assert json.loads(answer.body)["files"] == {"file": [[10, False]]}


@pytest.mark.parametrize("kind", ["stopping", "resetting"])
@pytest.mark.gen_test
async def test_a_handler_may_stop_an_upload(kind: str) -> None:
    async with taking() as site, await site.connect() as client:
        headers, body = multipart(('name="file"; filename="first"', bytes(MIB)))
        target = f"/sync/?handler={kind}"
        answer = await client.request(target, method="POST", headers=headers, body=body)
        assert (answer.status, json.loads(answer.body)["files"]) == (200, {})
        assert views.seen == ["new first", 0, "all complete"]
        answer = await client.request("/body/", method="POST", body=b"next")
        assert json.loads(answer.body) == {"size": 4}


@pytest.mark.gen_test
async def test_a_view_that_fails_leaves_no_file(tmp_path: Path, error_log: Log) -> None:
    settings = {"FILE_UPLOAD_TEMP_DIR": str(tmp_path), "FILE_UPLOAD_MAX_MEMORY_SIZE": 1000}
    async with taking(**settings) as site:
        assert (await uploaded(site, "/fails/", 5000)).status == 500
        assert views.seen.pop().startswith(str(tmp_path))
    assert error_log.pop().name == "django.request"
    assert os.listdir(tmp_path) == []


# What is refused, by Django


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"a"),
        ("multipart/form-data; boundary=" + "b" * 300, b"a"),
        ("multipart/form-data; boundary=b; charset=utf-8; x=\xe9", b"--b--"),
        ("application/x-www-form-urlencoded", b"&".join([b"a=1"] * 1001)),
        ("application/x-www-form-urlencoded; charset=latin-1", b"a=1"),
    ],
)
@pytest.mark.gen_test
async def test_a_form_that_is_none_is_answered_400(
    content_type: str, body: bytes, error_log: Log
) -> None:
    async with taking() as site, await site.connect() as client:
        head = (
            f"POST /sync/ HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        await client.send(head.encode("latin-1") + body)
        answer = await client.response()
        assert answer.status == 400
        assert (await client.request("/body/", method="POST", body=b"a")).status == 200
    if len(body) > 1000:
        assert error_log.pop().name == "django.security.TooManyFieldsSent"


@pytest.mark.gen_test
async def test_a_content_type_that_cannot_be_read_is_answered_400() -> None:
    headers = [("Content-Type", "a/b; " + "c=d; " * 4000)]
    async with taking() as site:
        answer = await site.request("/body/", method="POST", headers=headers, body=b"a")
        if django.VERSION < (6, 0):  # it reads headers of any length
            assert answer.status == 200
        else:
            assert answer.status == 400
            assert answer.body == b"Bad request: Invalid Content-Type header.\n"


@pytest.mark.gen_test
async def test_a_body_past_djangos_limit_is_answered_as_django_does(error_log: Log) -> None:
    async with taking(DATA_UPLOAD_MAX_MEMORY_SIZE=1000) as site:
        assert (await site.request("/body/", method="POST", body=bytes(1000))).status == 200
        assert (await site.request("/body/", method="POST", body=bytes(1001))).status == 400
        assert error_log.pop().name == "django.security.RequestDataTooBig"


# What stops half-way


@pytest.mark.gen_test
async def test_a_client_that_leaves_while_its_body_is_written_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writing, go = threading.Event(), threading.Event()
    bodies: list[Body] = []
    write = Body.write

    def slowly(body: Body, chunk: bytes) -> None:
        bodies.append(body)
        writing.set()
        go.wait(10)
        write(body, chunk)

    monkeypatch.setattr(Body, "write", slowly)
    async with taking(FILE_UPLOAD_MAX_MEMORY_SIZE=0) as site:
        async with await site.connect() as client:
            await client.send(
                b"POST /body/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n" + bytes(9)
            )
            await reached(writing)
            (arrival,) = site.application.arriving
        async with (
            await site.connect() as client
        ):  # by when the server knows that the first has left
            await client.request("/body/")
        (body,) = bodies
        assert body._file is None
        go.set()
        await arrival
        assert body._file is not None
        assert body._file.closed
        assert not site.application.arriving
    assert not site.application.in_flight


@pytest.mark.gen_test
async def test_many_uploads_that_stop_leave_no_file_open(tmp_path: Path) -> None:
    settings = {"FILE_UPLOAD_TEMP_DIR": str(tmp_path), "FILE_UPLOAD_MAX_MEMORY_SIZE": 100}
    async with taking(**settings) as site:
        await site.request("/body/", method="POST", body=b"a")
        before = _open_files(tmp_path)
        clients = [await site.connect() for _ in range(20)]
        head = b"POST /body/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n"
        for client in clients:
            await client.send(head + bytes(5000))
        while _open_files(tmp_path) < before + 20:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for client in clients:
            client.abort()
        while _open_files(tmp_path) > before:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert not site.application.arriving
    assert os.listdir(tmp_path) == []


def _open_files(folder: Path) -> int:
    """How many files of a folder the process has open, those without a name included."""
    count = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{number}").startswith(f"{folder}/")
        except OSError:
            continue
    return count


def test_a_body_of_nothing_is_empty() -> None:
    body = Body()
    assert body.open().read() == b""
    body.write(b"")
    assert body.open().read() == b""
    body.close()
