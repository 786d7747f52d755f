"""Tornado's request becomes Django's: ``HTTPServerRequest`` and a body already received -> ``HttpRequest``."""

from __future__ import annotations

import re
import time
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from django.conf import settings
from django.core.exceptions import BadRequest
from django.http import HttpRequest, QueryDict, parse_cookie
from django.http.request import HttpHeaders
from django.urls import ResolverMatch
from django.utils.encoding import repercent_broken_unicode
from django.utils.functional import cached_property
from tornado.escape import parse_qs_bytes
from tornado.httputil import (
    HTTPHeaders,
    HTTPInputError,
    HTTPServerRequest,
    RequestStartLine,
    split_host_and_port,
)
from tornado.web import HTTPError

from tornjango import green
from tornjango.bodies import Body
from tornjango.knots import Retied
from tornjango.proxies import Proxies

#: A form larger than this is parsed in a worker thread, for green code; in bytes.
PARSED_ON_THE_LOOP = 64 * 1024

# RFC 3986, 3.2.2 and 3.2.3; Django looks again, at the hosts it allows.
_HOST = re.compile(r"(\[[0-9A-Za-z:.%_~-]*\]|[0-9A-Za-z._~!$&'()*+;=%-]*)(:[0-9]{0,5})?")


class ServerRequest(HTTPServerRequest):
    """A request's line and headers, as handlers of Tornado's own know them.

    The query is parsed when it is asked for, not before: Django's views have a parser and limits of their own.
    """

    def __init__(
        self,
        connection: Any,
        start_line: RequestStartLine,
        headers: HTTPHeaders,
        server_connection: object = None,
        proxies: Proxies | None = None,
    ) -> None:
        """Raises ``HTTPInputError`` for a host that cannot be one."""
        self.method, self.uri, self.version = start_line
        self.headers = headers
        self.connection = connection
        self.server_connection = server_connection
        self.remote_ip = connection.context.remote_ip
        self.protocol = connection.context.protocol
        if "://" in self.uri:
            self._take_host_from_target(self.uri)
        self.host = _checked_host(headers, self.version)
        #: The port that the client connected to, if a trusted proxy told it.
        self.forwarded_port: str | None = None
        if proxies is not None:
            self._take_word_of(proxies)
        self.path, _, self.query = self.uri.partition("?")
        self.body = b""
        self.files = {}
        self.body_arguments = {}
        self._start_time = time.time()
        self._finish_time = None

    def _take_host_from_target(self, target: str) -> None:
        """``GET http://host/path`` is asked of proxies and means what ``Host`` would (RFC 9112, 3.2.2)."""
        if not target.lower().startswith(("http://", "https://")):
            return
        try:
            parts = urlsplit(target)
        except ValueError as exc:
            raise HTTPInputError(f"Invalid request target: {exc}") from exc
        self.headers["Host"] = parts.netloc
        self.uri = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    def _take_word_of(self, proxies: Proxies) -> None:
        peer: str = self.remote_ip or ""
        unix = _server_address(self)[0] == "unix"
        origin = proxies.origin(peer, self.headers, unix=unix)
        if origin is None:
            return
        self.remote_ip = origin.client or peer
        self.protocol = origin.scheme or self.protocol
        self.forwarded_port = origin.port
        if origin.host and _HOST.fullmatch(origin.host):
            self.host = self.headers["Host"] = origin.host

    @cached_property
    def host_name(self) -> str:  # type: ignore[override]
        return split_host_and_port(self.host.lower())[0]

    def _parse_query(self) -> dict[str, list[bytes]]:
        try:
            return parse_qs_bytes(self.query, keep_blank_values=True, max_num_fields=1000)
        except ValueError as exc:
            raise HTTPError(400, f"Invalid query string: {exc}") from exc

    arguments = cached_property(_parse_query)
    query_arguments = cached_property(_parse_query)


def _checked_host(headers: HTTPHeaders, version: str) -> str:
    hosts = headers.get_list("Host")
    if not hosts and version == "HTTP/1.0":
        return "127.0.0.1"
    if len(hosts) != 1:
        raise HTTPInputError("Multiple Host headers" if hosts else "Missing Host header")
    if not _HOST.fullmatch(hosts[0]):
        raise HTTPInputError(f"Invalid Host header: {hosts[0]!r}")
    return hosts[0]


class TornadoRequest(HttpRequest):
    """A Django request that came in through Tornado.

    As in Django's own requests, header names with an underscore are dropped (``X_A`` would pass for ``X-A``), and
    nothing that a client sends changes its address or scheme, unless ``TRUSTED_PROXIES`` has it.
    """

    # Set by whoever routes the request; the view is not looked for again then.
    route_match: ResolverMatch | None = None

    def __init__(self, request: HTTPServerRequest, body: Body) -> None:
        """Broken UTF-8 in a path stays percent-encoded, as under WSGI.

        Raises ``BadRequest`` for a Content-Type that Django cannot read; under its own handlers that is a 500.
        """
        # HttpRequest.__init__ would fill GET, POST, COOKIES, META and FILES, which are lazy here.
        self.tornado_request = request
        self.script_name = script_name()
        self.path_info = self.routed_path = path_info(request.path, self.script_name)
        self.path = f"{self.script_name}/{self.path_info.removeprefix('/')}"
        self.method = (request.method or "").upper()
        self.resolver_match = None
        self.body_size = body.size
        self._body_file = body
        self._stream: Any = body.open()
        self._read_started = False
        self._post_parse_error = False
        self.META = self._meta()
        try:
            self._set_content_type_params(self.META)  # type: ignore[attr-defined]
        except ValueError as exc:  # until Django 6.0
            raise BadRequest("Invalid Content-Type header.") from exc

    def _meta(self) -> dict[str, Any]:
        request = self.tornado_request
        host, port = _server_address(request)
        port = getattr(request, "forwarded_port", None) or port
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
            key = _meta_key(name)
            if key is None:
                continue
            if key in meta:
                # RFC 9110, 5.3; for cookies RFC 9113, 8.2.3.
                value = f"{meta[key]}{'; ' if key == 'HTTP_COOKIE' else ','}{value}"
            meta[key] = value
        if self.body_size and "CONTENT_LENGTH" not in meta:  # it came in chunks
            meta["CONTENT_LENGTH"] = str(self.body_size)
        return meta

    @property
    def environ(self) -> dict[str, Any]:
        """``META``, under the name that it has in Django's ``WSGIRequest``; without ``wsgi.input``: read the request."""
        return self.META

    @cached_property
    def headers(self) -> HttpHeaders:
        return HttpHeaders(self.META)

    @cached_property
    def GET(self) -> QueryDict:  # type: ignore[override]
        # As bytes: what is not percent-encoded is to be decoded by the request's encoding as well.
        query: bytes = self.META["QUERY_STRING"].encode("latin-1")
        return QueryDict(query, encoding=self.encoding)

    @property
    def encoding(self) -> str | None:
        return self._encoding

    @encoding.setter
    def encoding(self, value: str | None) -> None:
        # Django's looks whether there is a GET, which makes one: of too many fields, before anybody asked for them.
        self._encoding = value
        self.__dict__.pop("GET", None)
        self.__dict__.pop("_post", None)

    @cached_property
    def COOKIES(self) -> dict[str, str]:  # type: ignore[override]
        cookie: str = self.META.get("HTTP_COOKIE", "")
        return parse_cookie(cookie.encode("latin-1").decode(errors="replace"))

    @property
    def POST(self) -> Any:
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
        return self.__dict__["_files"]

    def _load_post_and_files(self) -> None:
        if self.body_size <= PARSED_ON_THE_LOOP:
            super()._load_post_and_files()
            return
        # Whoever is cancelled meanwhile closes the body that the thread reads.
        with green.shielded():
            green.aside(super()._load_post_and_files)

    def _get_scheme(self) -> str:
        return self.tornado_request.protocol

    def close(self) -> None:
        super().close()
        self._body_file.close()

    user = Retied()
    auser = Retied()


def script_name() -> str:
    """What stands before every path of this project, without its last slash."""
    return (settings.FORCE_SCRIPT_NAME or "").rstrip("/")


def path_info(raw_path: str, prefix: str = "") -> str:
    """The path below ``prefix``, percent-decoded; what is not UTF-8 stays percent-encoded.

    Tornado has decoded the request line as latin-1, so that any byte a client sent is still there.
    """
    path = raw_path
    if "%" in raw_path or not raw_path.isascii():
        path = repercent_broken_unicode(unquote_to_bytes(raw_path.encode("latin-1"))).decode()
    if prefix and f"{path}/".startswith(f"{prefix}/"):
        path = path[len(prefix) :]
    return path or "/"


@lru_cache(1000)
def _meta_key(header: str) -> str | None:
    """``HTTP_X_A`` for ``X-A``; None for a name that would be taken for another."""
    if "_" in header:
        return None
    key = header.upper().replace("-", "_")
    return key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"


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
