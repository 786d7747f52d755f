"""Answers of all kinds, for tests of what goes over the wire."""

from __future__ import annotations

import gzip
import io
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from django.core.files import File
from django.http import FileResponse, HttpRequest, HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.urls import path
from django.views.decorators.http import condition

from tests.http_views import thread_gates
from tests.views import gates, seen

CONTENT = bytes(range(256)) * 4
CHANGED = datetime(2009, 6, 30, 12, 0, 0, tzinfo=UTC)


def length(request: HttpRequest) -> HttpResponse:
    """Says of its content what it is asked to say."""
    return HttpResponse(
        request.GET.get("content", ""), headers={"Content-Length": request.GET["length"]}
    )


def stream_length(request: HttpRequest) -> StreamingHttpResponse:
    """A stream of ten bytes in two parts."""
    response = StreamingHttpResponse(iter([b"01234", b"56789"]))
    if "length" in request.GET:
        response["Content-Length"] = request.GET["length"]
    return response


def unchanged(status: int) -> Any:
    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse(status=status, headers=dict(request.GET.items()))

    return view


def of_the_connection(request: HttpRequest) -> HttpResponse:
    headers = {"Transfer-Encoding": "chunked", "Keep-Alive": "timeout=5", "TE": "trailers"}
    return HttpResponse("content", headers=headers)


def injects(request: HttpRequest) -> HttpResponse:
    """Past Django's own checks, as a bug in a library might."""
    response = HttpResponse("content")
    if request.GET["into"] == "reason":
        response._reason_phrase = "Fine\r\nX-Injected: 1"  # type: ignore[attr-defined]
    elif request.GET["into"] == "header":
        response.headers._store["x-a"] = ("X-A", "1\r\nX-Injected: 1")  # type: ignore[attr-defined]
    else:
        response.headers._store["x-a"] = ("X-A: 1\r\nX-Injected", "1")  # type: ignore[attr-defined]
    return response


@condition(etag_func=lambda request: '"v1"', last_modified_func=lambda request: CHANGED)
def conditional(request: HttpRequest) -> HttpResponse:
    response = HttpResponse("content")
    response.set_cookie("a", "1")
    return response


def empty(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse([])


async def empty_async(request: HttpRequest) -> StreamingHttpResponse:
    async def parts() -> AsyncIterator[bytes]:
        for part in (b"", b""):
            yield part

    return StreamingHttpResponse(parts())


def gated(request: HttpRequest) -> StreamingHttpResponse:
    """A sync stream that waits in the middle, and tells the thread it is in."""

    def parts() -> Iterator[str]:
        try:
            seen.append(threading.get_ident())
            yield "one"
            thread_gates["parked"].set()
            thread_gates["go"].wait(10)
            yield "two"
            yield "three"
        finally:
            seen.append(threading.get_ident())
            thread_gates["closed"].set()

    return StreamingHttpResponse(parts())


async def wrapped(request: HttpRequest) -> StreamingHttpResponse:
    """What middleware makes of a stream; it has much to send."""

    async def parts() -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(64 * 1024)
        finally:
            seen.append("closed")
            gates["closed"].set()

    return StreamingHttpResponse(parts())


def small_parts(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(f"{number}\n" for number in range(int(request.GET["count"])))


class Backwards(File):
    """A file whose content is not what is on the disk, as one that decrypts."""

    def read(self, size: int = -1) -> bytes:
        return bytes(reversed(self.file.read()))[: None if size < 0 else size]


class OnlyReads:
    def __init__(self, content: bytes) -> None:
        self.read = io.BytesIO(content).read


def _opened(kind: str, name: str) -> Any:
    if kind == "temporary":
        file = tempfile.TemporaryFile()  # noqa: SIM115
    elif kind == "named":
        file = tempfile.NamedTemporaryFile()  # type: ignore[assignment]  # noqa: SIM115
    else:
        opened = {
            "plain": lambda: open(name, "rb"),  # noqa: SIM115
            "raw": lambda: open(name, "rb", buffering=0),  # noqa: SIM115
            "django": lambda: File(open(name, "rb")),  # noqa: SIM115
            "memory": lambda: io.BytesIO(CONTENT),
            "gzip": lambda: gzip.open(f"{name}.gz"),  # noqa: SIM115
            "backwards": lambda: Backwards(open(name, "rb")),  # noqa: SIM115
            "only reads": lambda: OnlyReads(CONTENT),
            "pipe": lambda: _pipe(),
        }
        return opened[kind]()
    file.write(CONTENT)
    file.seek(0)
    return file


def _pipe() -> Any:
    reader, writer = os.pipe()
    os.write(writer, CONTENT)
    os.close(writer)
    return open(reader, "rb")


def file(request: HttpRequest) -> HttpResponseBase:
    opened = _opened(request.GET.get("kind", "plain"), request.GET.get("path", ""))
    opened.read(int(request.GET["from"])) if "from" in request.GET else None
    headers = {name: value for name, value in request.GET.items() if name[0].isupper()}
    response = FileResponse(opened, content_type="text/plain", headers=headers)
    response.status_code = int(request.GET.get("status", 200))
    return response


def other_size(request: HttpRequest) -> FileResponse:
    """The file gets another size between its answer's head and content."""
    path = Path(request.GET["path"])
    response = FileResponse(path.open("rb"))
    with path.open("r+b") as file:
        file.truncate(int(request.GET["size"]))
    return response


urlpatterns = [
    path("length/", length),
    path("stream-length/", stream_length),
    path("no-content/", unchanged(204)),
    path("not-modified/", unchanged(304)),
    path("of-the-connection/", of_the_connection),
    path("injects/", injects),
    path("conditional/", conditional),
    path("empty/", empty),
    path("empty-async/", empty_async),
    path("gated/", gated),
    path("wrapped/", wrapped),
    path("small-parts/", small_parts),
    path("file/", file),
    path("other-size/", other_size),
]
