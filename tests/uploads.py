"""Views that take uploads, for tests of bodies."""

from __future__ import annotations

from typing import Any

from django.core.files.uploadedfile import TemporaryUploadedFile
from django.core.files.uploadhandler import FileUploadHandler, SkipFile, StopUpload
from django.http import HttpRequest, JsonResponse
from django.urls import path

from tests.views import seen


class Watching(FileUploadHandler):
    """Tells what it is asked for; what it does with files is in the class."""

    ends: type[Exception] | None = None
    with_reset = False

    def new_file(self, *args: Any, **kwargs: Any) -> None:
        super().new_file(*args, **kwargs)
        seen.append(f"new {self.file_name}")
        if self.ends is SkipFile and self.file_name == "first":
            raise SkipFile

    def receive_data_chunk(self, raw_data: bytes, start: int) -> bytes:
        seen.append(start)
        if self.ends is StopUpload:
            raise StopUpload(connection_reset=self.with_reset)
        return raw_data

    def file_complete(self, file_size: int) -> None:
        seen.append(f"complete {file_size}")

    def upload_complete(self) -> None:
        seen.append("all complete")

    def upload_interrupted(self) -> None:
        seen.append("interrupted")


class Skipping(Watching):
    ends = SkipFile


class Stopping(Watching):
    ends = StopUpload


class Resetting(Stopping):
    with_reset = True


HANDLERS = {
    "watching": Watching,
    "skipping": Skipping,
    "stopping": Stopping,
    "resetting": Resetting,
}


def _files(request: HttpRequest) -> JsonResponse:
    """Each file's size; and whether it is on the disk."""
    files = {
        name: [[file.size, isinstance(file, TemporaryUploadedFile)] for file in some]
        for name, some in request.FILES.lists()
    }
    return JsonResponse({"files": files, "POST": dict(request.POST.lists())})


def sync(request: HttpRequest) -> JsonResponse:
    if kind := request.GET.get("handler"):
        request.upload_handlers.insert(0, HANDLERS[kind](request))
    return _files(request)


async def on_loop(request: HttpRequest) -> JsonResponse:
    return sync(request)


def fails(request: HttpRequest) -> JsonResponse:
    seen.append(request.FILES["file"].temporary_file_path())
    raise ValueError("with a file in its hands")


def body(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"size": len(request.body)})


urlpatterns = [
    path("sync/", sync),
    path("on-loop/", on_loop),
    path("fails/", fails),
    path("body/", body),
]
