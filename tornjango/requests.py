"""Tornado's request becomes Django's: ``HTTPServerRequest`` and a body already received -> ``HttpRequest``."""

from __future__ import annotations

import tempfile
from io import BytesIO
from typing import IO, Any
from urllib.parse import unquote_to_bytes

from django.conf import settings
from django.http import HttpRequest, QueryDict, parse_cookie
from django.http.request import HttpHeaders
from django.urls import ResolverMatch
from django.utils.encoding import repercent_broken_unicode
from django.utils.functional import cached_property
from tornado.httputil import HTTPServerRequest


class Body:
    """A request's body as it arrives: in memory, and past Django's limit for uploads in a temporary file."""

    def __init__(self) -> None:
        self.size = 0
        self._file: IO[bytes] | None = None

    @property
    def on_disk(self) -> bool:
        """Whether the next ``write`` goes to the disk, and is better done in a worker thread."""
        return self.size > settings.FILE_UPLOAD_MAX_MEMORY_SIZE

    def write(self, chunk: bytes) -> None:
        if self._file is None:
            self._file = tempfile.SpooledTemporaryFile(  # noqa: SIM115  close() does
                max_size=settings.FILE_UPLOAD_MAX_MEMORY_SIZE,
                mode="w+b",
                dir=settings.FILE_UPLOAD_TEMP_DIR,
            )
        self._file.write(chunk)

    def open(self) -> IO[bytes]:
        """The whole body, from its start."""
        if self._file is None:
            return BytesIO()
        self._file.seek(0)
        return self._file

    def close(self) -> None:
        """Gives back the memory, or removes the file; a second time does nothing."""
        if self._file is not None:
            self._file.close()


class TornadoRequest(HttpRequest):
    """A Django request that came in through Tornado.

    As in Django's own requests, header names with an underscore are dropped (``X_A`` would pass for ``X-A``), and
    nothing that a client sends changes its address or scheme.
    """

    # Set by whoever routes the request; the view is not looked for again then.
    route_match: ResolverMatch | None = None

    def __init__(self, request: HTTPServerRequest, body: Body) -> None:
        """Raises ``UnicodeDecodeError`` never: broken UTF-8 in a path stays percent-encoded, as under WSGI."""
        # HttpRequest.__init__ would fill GET, POST, COOKIES, META and FILES, which are lazy here.
        self.tornado_request = request
        self.script_name = script_name()
        self.path_info = path_info(request.path, self.script_name)
        self.path = f"{self.script_name}/{self.path_info.removeprefix('/')}"
        self.method = (request.method or "").upper()
        self.resolver_match = None
        self.body_size = body.size
        self._body_file = body
        self._stream = body.open()
        self._read_started = False
        self._post_parse_error = False
        self.META = self._meta()
        self._set_content_type_params(self.META)  # type: ignore[attr-defined]

    def _meta(self) -> dict[str, Any]:
        request = self.tornado_request
        host, port = _server_address(request)
        meta = {
            "REQUEST_METHOD": self.method,
            "QUERY_STRING": request.query,
            "SCRIPT_NAME": self.script_name,
            "PATH_INFO": self.path_info,
            "REMOTE_ADDR": request.remote_ip,
            "REMOTE_HOST": request.remote_ip,
            "SERVER_NAME": host,
            "SERVER_PORT": port,
            "SERVER_PROTOCOL": request.version,
            "wsgi.url_scheme": request.protocol,
            "wsgi.multithread": True,
            "wsgi.multiprocess": True,
        }
        for name, value in request.headers.get_all():
            if "_" in name:
                continue
            key = name.upper().replace("-", "_")
            if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
                key = f"HTTP_{key}"
            if key in meta:
                # RFC 9110, 5.3; for cookies RFC 9113, 8.2.3.
                value = f"{meta[key]}{'; ' if key == 'HTTP_COOKIE' else ','}{value}"
            meta[key] = value
        if self.body_size and "CONTENT_LENGTH" not in meta:  # it came in chunks
            meta["CONTENT_LENGTH"] = str(self.body_size)
        return meta

    @cached_property
    def headers(self) -> HttpHeaders:  # type: ignore[override]
        return HttpHeaders(self.META)

    @cached_property
    def GET(self) -> QueryDict:  # type: ignore[override]
        return QueryDict(self.META["QUERY_STRING"], encoding=self.encoding)

    @cached_property
    def COOKIES(self) -> dict[str, str]:  # type: ignore[override]
        return parse_cookie(self.META.get("HTTP_COOKIE", ""))

    @property
    def POST(self) -> QueryDict:  # type: ignore[override]
        if not hasattr(self, "_post"):
            self._load_post_and_files()
        return self._post

    @POST.setter
    def POST(self, post: QueryDict) -> None:
        self._post = post

    @property
    def FILES(self) -> Any:  # type: ignore[override]
        if not hasattr(self, "_files"):
            self._load_post_and_files()
        return self._files

    def _get_scheme(self) -> str:
        return self.tornado_request.protocol

    def close(self) -> None:
        super().close()
        self._body_file.close()


def script_name() -> str:
    """What stands before every path of this project, without its last slash."""
    return (settings.FORCE_SCRIPT_NAME or "").rstrip("/")


def path_info(raw_path: str, prefix: str = "") -> str:
    """The path below ``prefix``, percent-decoded; what is not UTF-8 stays percent-encoded.

    Tornado has decoded the request line as latin-1, so that any byte a client sent is still there.
    """
    decoded = unquote_to_bytes(raw_path.encode("latin-1"))
    path = repercent_broken_unicode(decoded).decode()
    if prefix and f"{path}/".startswith(f"{prefix}/"):
        path = path[len(prefix) :]
    return path or "/"


def _server_address(request: HTTPServerRequest) -> tuple[str, str]:
    """Host and port of the socket that was connected to, as WSGI servers give them."""
    # The context lives as long as the connection: one look per connection.
    context: Any = getattr(request.connection, "context", None)
    address: tuple[str, str] | None = getattr(context, "server_address", None)
    if address is None:
        stream: Any = getattr(request.connection, "stream", None)
        name = stream.socket.getsockname() if stream is not None and stream.socket else ()
        address = (
            (str(name[0]), str(name[1])) if isinstance(name, tuple) and name else ("unix", "0")
        )
        if context is not None:
            context.server_address = address
    return address
