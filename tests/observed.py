"""All that a view can see of a request, as JSON: for comparing requests that came by different ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from django.http import HttpRequest, JsonResponse
from django.http.request import HttpHeaders
from django.urls import re_path

#: The ways to get at a body, which exclude each other; the header X-Way chooses.
WAYS = ("form", "body", "stream", "lines", "encoding", "handlers")

_META = ("HTTP_", "CONTENT_", "REMOTE_ADDR", "REQUEST_METHOD", "QUERY_STRING", "SCRIPT_NAME")
_META += ("PATH_INFO", "SERVER_NAME", "SERVER_PORT", "SERVER_PROTOCOL")


def observe(request: HttpRequest) -> dict[str, Any]:
    """What is not to be had is the name of the exception."""
    way = request.META.get("HTTP_X_WAY", "form")
    looks = [*_head(request), *_BODY[way](request)]
    return {name: _seen(look) for name, look in looks}


def _seen(look: Callable[[], Any]) -> Any:
    try:
        return _plain(look())
    except Exception as exc:  # noqa: BLE001
        return f"raises {type(exc).__name__}"


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return "None" if value is None else value


Looks = Iterator[tuple[str, Callable[[], Any]]]


def _head(request: Any) -> Looks:
    yield "method", lambda: request.method
    yield "path", lambda: request.path
    yield "path_info", lambda: request.path_info
    yield "full path", request.get_full_path
    yield "full path with a slash", lambda: request.get_full_path(force_append_slash=True)
    yield "full path info", request.get_full_path_info
    yield "scheme", lambda: [request.scheme, request.is_secure()]
    yield "host", request.get_host
    yield "port", request.get_port
    yield "absolute", request.build_absolute_uri
    yield "absolute, relative", lambda: request.build_absolute_uri("../a?b=c#d")
    yield "absolute, of a host", lambda: request.build_absolute_uri("//example.com/a")
    yield "repr", lambda: repr(request).replace(type(request).__name__, "Request")
    yield "content_type", lambda: request.content_type
    yield "content_params", lambda: request.content_params
    yield "encoding", lambda: request.encoding
    yield "accepted", lambda: [str(accepted) for accepted in request.accepted_types]
    yield (
        "accepts",
        lambda: [request.accepts(kind) for kind in ("text/html", "a/b; q=1", "image/*")],
    )
    yield "preferred", lambda: request.get_preferred_type(["text/html", "application/json"])
    yield "headers", lambda: dict(request.headers) == dict(HttpHeaders(request.META))
    yield "COOKIES", lambda: request.COOKIES
    yield "GET", lambda: dict(request.GET.lists())
    for key, value in request.META.items():
        if key.startswith(_META) and key != "HTTP_X_WAY":
            yield f"META {key}", lambda value=value: value


def _form(request: Any) -> Looks:
    yield "POST", lambda: dict(request.POST.lists())
    yield (
        "FILES",
        lambda: {name: [_file(file) for file in files] for name, files in request.FILES.lists()},
    )


def _file(file: Any) -> list[Any]:
    kind = type(file).__name__
    with file:  # Django forgets it when the form is parsed again, for another encoding
        return [file.name, kind, file.content_type, file.charset, file.size, file.read()]


def _form_way(request: Any) -> Looks:
    yield from _form(request)
    yield "body afterwards", lambda: request.body
    yield "read afterwards", request.read
    yield "handlers afterwards", lambda: setattr(request, "upload_handlers", [])


def _body_way(request: Any) -> Looks:
    yield "body", lambda: request.body
    yield "body again", lambda: request.body
    yield from _form(request)
    yield "read", request.read


def _stream_way(request: Any) -> Looks:
    yield "read(0)", lambda: request.read(0)
    yield "read(3)", lambda: request.read(3)
    yield "readline", request.readline
    yield "readline(2)", lambda: request.readline(2)
    yield "read(-1)", lambda: request.read(-1)
    yield "at the end", request.read
    yield "body", lambda: request.body
    yield from _form(request)


def _lines_way(request: Any) -> Looks:
    yield "lines", lambda: list(request)
    yield "readlines", request.readlines
    yield from _form(request)


def _encoding_way(request: Any) -> Looks:
    yield from _form(request)
    yield "other encoding", lambda: setattr(request, "encoding", "koi8-r")
    yield "GET then", lambda: dict(request.GET.lists())
    yield "POST then", lambda: dict(request.POST.lists())
    yield "encoding then", lambda: request.encoding


def _handlers_way(request: Any) -> Looks:
    yield "handlers", lambda: [type(handler).__name__ for handler in request.upload_handlers]
    yield "fewer handlers", lambda: setattr(request, "upload_handlers", request.upload_handlers[1:])
    yield from _form(request)


_BODY = dict(
    zip(
        WAYS,
        (_form_way, _body_way, _stream_way, _lines_way, _encoding_way, _handlers_way),
        strict=True,
    )
)


async def observed(request: HttpRequest) -> JsonResponse:
    return JsonResponse(observe(request))


urlpatterns = [re_path(r"(?s)^.*\Z", observed)]
