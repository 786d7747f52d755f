"""What tests of the HTTP side serve: views that misbehave, beside those of `tests.urls`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

from django.core.files.uploadedfile import TemporaryUploadedFile
from django.http import (
    FileResponse,
    HttpRequest,
    HttpResponse,
    JsonResponse,
    StreamingHttpResponse,
)
from django.middleware.csrf import get_token
from django.urls import path, re_path
from django.utils import translation
from django.views.decorators.csrf import csrf_exempt
from tornado.iostream import StreamClosedError

from tests import urls
from tests.views import gates, seen

#: Threads wait on these.
thread_gates: dict[str, threading.Event] = {}
KIB = 1024


@csrf_exempt
async def whole(request: HttpRequest) -> JsonResponse:
    """All that is known of a request."""
    files = {
        name: [[f.name, f.content_type, f.read().decode("latin-1")] for f in fs]
        for name, fs in request.FILES.lists()
    }
    return JsonResponse(
        {
            "method": request.method,
            "path": request.path,
            "path_info": request.path_info,
            "full_path": request.get_full_path(),
            "scheme": request.scheme,
            "host": request.get_host(),
            "content_type": request.content_type,
            "content_params": request.content_params,
            "encoding": request.encoding,
            "GET": dict(request.GET.lists()),
            "POST": dict(request.POST.lists()),
            "FILES": files,
            "COOKIES": request.COOKIES,
            "META": {k: v for k, v in request.META.items() if isinstance(v, str)},
            "headers": dict(request.headers),
        }
    )


@csrf_exempt
async def reads(request: HttpRequest) -> HttpResponse:
    """The body, in two pieces, and then as a whole where that may be."""
    first = request.read(3)
    return HttpResponse(first + b"|" + request.read() + b"|" + request.read())


@csrf_exempt
async def body_twice(request: HttpRequest) -> HttpResponse:
    return HttpResponse(request.body + b"|" + request.body + b"|" + request.read())


@csrf_exempt
def upload(request: HttpRequest) -> JsonResponse:
    file = request.FILES["file"]
    on_disk = isinstance(file, TemporaryUploadedFile)
    if on_disk:
        seen.append(file.temporary_file_path())
    return JsonResponse({"size": file.size, "on_disk": on_disk})


@csrf_exempt
async def size(request: HttpRequest) -> HttpResponse:
    total = 0
    while chunk := request.read(64 * KIB):
        total += len(chunk)
    return HttpResponse(str(total))


def token(request: HttpRequest) -> HttpResponse:
    return HttpResponse(get_token(request))


async def cancels_itself(request: HttpRequest) -> HttpResponse:
    raise asyncio.CancelledError


async def ignores_cancelling(request: HttpRequest) -> HttpResponse:
    gates["parked"].set()
    try:
        await gates["go"].wait()
    except asyncio.CancelledError:
        seen.append("went on")
    return HttpResponse("went on")


async def raises(request: HttpRequest) -> HttpResponse:
    raise ValueError("a secret")


async def reason(request: HttpRequest) -> HttpResponse:
    return HttpResponse(status=299, reason="Fair <Enough>, Thank You")


async def headers(request: HttpRequest) -> HttpResponse:
    given = {"X-Padded": " a ", "X-Empty": "", "X-Latin": "é", "ETag": '"1"', "Date": "Sun"}
    return HttpResponse("content", headers=given)


async def bad_header(request: HttpRequest) -> HttpResponse:
    response = HttpResponse("content")
    response.headers._store["x-a"] = ("X-A", "1\r\nX-B: 2")  # past Django's own check
    return response


async def closes(request: HttpRequest) -> HttpResponse:
    return HttpResponse("content", headers={"Connection": "close"})


async def language(request: HttpRequest) -> HttpResponse:
    """The language it finds; leaves another one behind."""
    before = translation.get_language()
    translation.activate(request.GET.get("set", before))
    return HttpResponse(before)


async def streams(request: HttpRequest) -> StreamingHttpResponse:
    async def parts() -> AsyncIterator[bytes]:
        try:
            yield b"one"
            await gates["go"].wait()
            yield b"two"
        finally:
            seen.append("closed")
            gates["closed"].set()

    return StreamingHttpResponse(parts())


async def streams_much(request: HttpRequest) -> StreamingHttpResponse:
    async def parts() -> AsyncIterator[bytes]:
        try:
            for number in range(10_000):
                seen.append(number)
                yield bytes(64 * KIB)
        finally:
            gates["closed"].set()

    return StreamingHttpResponse(parts())


def streams_much_sync(request: HttpRequest) -> StreamingHttpResponse:
    def parts() -> Iterator[bytes]:
        try:
            for number in range(10_000):
                seen.append((number, threading.current_thread().name))
                yield bytes(64 * KIB)
        finally:
            thread_gates["closed"].set()

    return StreamingHttpResponse(parts())


def streams_sync(request: HttpRequest) -> StreamingHttpResponse:
    def parts() -> Iterator[bytes]:
        for number in range(3):
            seen.append(threading.current_thread().name)
            yield str(number).encode()

    return StreamingHttpResponse(parts())


def breaks_streaming(request: HttpRequest) -> StreamingHttpResponse:
    def parts() -> Iterator[bytes]:
        yield b"one"
        raise ValueError("in the middle")

    return StreamingHttpResponse(parts())


async def breaks_streaming_async(request: HttpRequest) -> StreamingHttpResponse:
    async def parts() -> AsyncIterator[bytes]:
        yield b"one"
        raise StreamClosedError  # as from a client of the view's own, to another server

    return StreamingHttpResponse(parts())


class WatchedFile:
    """A file of zeros that tells who reads it, and that it was closed."""

    def __init__(self, length: int) -> None:
        self.left = length

    def read(self, size: int = -1) -> bytes:
        seen.append(threading.current_thread().name)
        size = min(size if size >= 0 else self.left, self.left)
        self.left -= size
        return bytes(size)

    def close(self) -> None:
        seen.append("closed")


def watched_file(request: HttpRequest) -> FileResponse:
    length = int(request.GET["length"])
    headers: dict[str, Any] = {"Content-Length": length}
    return FileResponse(WatchedFile(length), headers=headers)


async def large(request: HttpRequest) -> HttpResponse:
    gates["parked"].set()
    return HttpResponse(bytes(int(request.GET["length"])))


def parks_sync(request: HttpRequest) -> HttpResponse:
    thread_gates["parked"].set()
    thread_gates["go"].wait(10)
    return HttpResponse("went")


urlpatterns = [
    re_path(r"^whole/.*$", whole),
    path("reads/", reads),
    path("body-twice/", body_twice),
    path("upload/", upload),
    path("size/", size),
    path("token/", token),
    path("cancels-itself/", cancels_itself),
    path("ignores-cancelling/", ignores_cancelling),
    path("raises/", raises),
    path("reason/", reason),
    path("headers/", headers),
    path("bad-header/", bad_header),
    path("closes/", closes),
    path("language/", language),
    path("streams/", streams),
    path("streams-much/", streams_much),
    path("streams-much-sync/", streams_much_sync),
    path("streams-sync/", streams_sync),
    path("breaks-streaming/", breaks_streaming),
    path("breaks-streaming-async/", breaks_streaming_async),
    path("watched-file/", watched_file),
    path("large/", large),
    path("parks-sync/", parks_sync),
    *urls.urlpatterns,
]
