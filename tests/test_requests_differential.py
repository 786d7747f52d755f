"""Random requests, through a socket to this server and as Django's own two servers would have made them of the same bytes."""

from __future__ import annotations

import io
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from http.client import HTTPResponse
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote_from_bytes, unquote, unquote_to_bytes

import pytest
from django.core.handlers.asgi import ASGIRequest
from django.core.handlers.wsgi import WSGIRequest
from django.core.servers.basehttp import WSGIRequestHandler
from django.test import override_settings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.observed import WAYS, observe
from tornjango.testing import LiveServer

#: How many requests are tried; more by hand.
EXAMPLES = int(os.environ.get("REQUESTS", "200"))

#: Small, so that random requests pass them.
LIMITS = {
    "DATA_UPLOAD_MAX_MEMORY_SIZE": 600,
    "DATA_UPLOAD_MAX_NUMBER_FIELDS": 6,
    "DATA_UPLOAD_MAX_NUMBER_FILES": 2,
    "FILE_UPLOAD_MAX_MEMORY_SIZE": 200,
}


@dataclass(frozen=True)
class Request:
    """A request, its text as the bytes on the wire are in Latin-1."""

    method: str = "GET"
    path: str = "/"
    query: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    #: The sizes of chunks; without them the body has a Content-Length.
    chunks: tuple[int, ...] = ()
    version: str = "HTTP/1.1"

    @property
    def target(self) -> str:
        return self.path if self.query is None else f"{self.path}?{self.query}"

    def has(self, name: str) -> bool:
        return any(header.lower() == name for header, _ in self.headers)

    @property
    def fields(self) -> list[tuple[str, str]]:
        framing = [("Transfer-Encoding", "chunked")] if self.chunks else []
        if self.body and not self.chunks:
            framing = [("Content-Length", str(len(self.body)))]
        return [*self.headers, *framing]

    def head(self) -> bytes:
        lines = [f"{self.method} {self.target} {self.version}"]
        lines += [f"{name}: {value}" for name, value in self.fields]
        return "\r\n".join([*lines, "\r\n"]).encode("latin-1")

    def raw(self) -> bytes:
        return self.head() + (b"".join(self._chunked()) if self.chunks else self.body)

    def _chunked(self) -> Iterator[bytes]:
        rest, sizes = self.body, list(self.chunks)
        while rest:
            size = sizes.pop() if sizes else len(rest)
            chunk, rest = rest[:size], rest[size:]
            yield b"%x\r\n%b\r\n" % (len(chunk), chunk)
        yield b"0\r\n\r\n"


# Requests as Django's own servers make them


def wsgi(request: Request, port: int) -> WSGIRequest:
    """As runserver does, by its own code."""
    handler = object.__new__(WSGIRequestHandler)
    head, _, rest = request.head().partition(b"\r\n")
    handler.raw_requestline = head + b"\r\n"
    handler.rfile = io.BytesIO(rest + request.body)
    handler.client_address = ("127.0.0.1", 1)
    base = {"SERVER_NAME": "127.0.0.1", "SERVER_PORT": str(port), "SCRIPT_NAME": ""}
    handler.server = SimpleNamespace(base_environ=base)  # type: ignore[assignment]
    assert handler.parse_request()
    environ = handler.get_environ()
    return WSGIRequest({**environ, "wsgi.input": handler.rfile, "wsgi.url_scheme": "http"})


def asgi(request: Request, port: int) -> ASGIRequest:
    """As uvicorn does."""
    scope = {
        "type": "http",
        "http_version": request.version[-3:],
        "method": request.method,
        "path": unquote(request.path),
        "raw_path": request.path.encode("latin-1"),
        "query_string": (request.query or "").encode("latin-1"),
        "root_path": "",
        "headers": [
            (name.lower().encode(), value.strip().encode("latin-1"))
            for name, value in request.fields
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", port),
        "scheme": "http",
    }
    return ASGIRequest(scope, io.BytesIO(request.body))


def seen(make: Callable[[Request, int], Any], request: Request, port: int) -> dict[str, Any] | None:
    """None where Django itself fails to make a request of it."""
    try:
        # Django 5.2 and 6.1 look into the query when they take a charset from Content-Type: ours does when a view asks.
        with override_settings(DATA_UPLOAD_MAX_NUMBER_FIELDS=None):
            made = make(request, port)
    except Exception:  # noqa: BLE001  BadRequest, SuspiciousOperation, ValueError, as the release may be
        return None
    try:
        return observe(made)
    finally:
        made.close()


# Where we differ, and why

PATHS = {"path", "path_info", "full path", "full path with a slash", "full path info", "repr"}
PATHS |= {"absolute", "absolute, relative", "META PATH_INFO"}


def _is_utf8(text: str) -> bool:
    try:
        unquote_to_bytes(text.encode("latin-1")).decode()
    except UnicodeDecodeError:
        return False
    return True


def _cookies(request: Request) -> list[str]:
    return [value.strip() for name, value in request.headers if name.lower() == "cookie"]


@dataclass(frozen=True)
class Difference:
    """Where Django's two differ: for requests of which ``when`` holds, ``keys`` are as ``follow`` has them."""

    follow: str
    keys: set[str]
    when: Callable[[Request], object]
    reason: str


#: Of several that hold, the last one does.
DIFFERENCES = [
    Difference(
        "asgi",
        {"META CONTENT_TYPE", "content_type"},
        lambda request: not request.has("content-type"),
        "runserver says text/plain where the client says nothing",
    ),
    Difference(
        "asgi",
        {"META CONTENT_LENGTH"},
        lambda request: not request.body,
        "runserver has an empty header where there is none",
    ),
    Difference(
        "asgi",
        {"META REQUEST_METHOD"},
        lambda request: not request.method.isupper(),
        "runserver has it as it came, and request.method in upper case: one is enough",
    ),
    Difference(
        "asgi",
        PATHS,
        lambda request: request.path.startswith("//"),
        "runserver makes one slash of several at the start, which is another path",
    ),
    Difference(
        "wsgi",
        PATHS,
        lambda request: not _is_utf8(request.path),
        "under ASGI broken bytes are U+FFFD, and cannot be told from each other",
    ),
    Difference(
        "wsgi",
        PATHS | {"META QUERY_STRING"},
        lambda request: not request.target.isascii(),
        "uvicorn refuses what is not percent-encoded; browsers of old send it, and runserver takes it",
    ),
    Difference(
        "wsgi",
        {"GET", "GET then"},
        lambda request: True,
        "ASGIRequest decodes the query as UTF-8, whatever request.encoding is",
    ),
    Difference("wsgi", {"META SERVER_PROTOCOL"}, lambda request: True, "ASGIRequest has none"),
    Difference(
        "wsgi",
        {"COOKIES", "META HTTP_COOKIE"},
        _cookies,
        "ASGIRequest decodes cookies as Latin-1, while Django writes them as UTF-8, and strips them",
    ),
]


def plain(request: Request) -> Request:
    """Where neither of Django's is followed: what the RFCs call the same request is the same to a view.

    A body in chunks is as one with a length (RFC 9112, 6.1): runserver sees none, and under ASGI Django sees no form in it.
    Cookies on several lines are as on one (RFC 9113, 8.2.3): runserver, and Django 5.2 under ASGI, have a comma between.
    """
    headers = [pair for pair in request.headers if pair[0].lower() != "cookie"]
    if cookies := _cookies(request):
        headers.append(("Cookie", "; ".join(cookies)))
    return replace(request, headers=tuple(headers), chunks=())


def _percent_encoded(request: Request) -> Request:
    path, query = (
        text and "".join(c if c.isascii() else f"%{ord(c):02X}" for c in text)
        for text in (request.path, request.query)
    )
    return replace(request, path=path or "", query=query)


def expected(request: Request, port: int) -> dict[str, Any] | None:
    """What a view is to see of a request; None for a plain 400, where Django's servers answer 500."""
    by_wsgi = seen(wsgi, plain(request), port)
    by_asgi = seen(asgi, _percent_encoded(plain(request)), port)
    if by_wsgi is None or by_asgi is None:
        return None
    known = {key: _chosen(key, request, by_wsgi, by_asgi) for key in by_wsgi | by_asgi}
    if request.chunks:
        known["META HTTP_TRANSFER_ENCODING"] = "chunked"
    return {key: value for key, value in known.items() if value is not None}


def _chosen(key: str, request: Request, by_wsgi: dict[str, Any], by_asgi: dict[str, Any]) -> Any:
    followed = [d.follow for d in DIFFERENCES if key in d.keys and d.when(request)]
    if not followed:
        assert by_wsgi.get(key) == by_asgi.get(key), f"{key}: Django's two differ; who is followed?"
    return (by_asgi if followed and followed[-1] == "asgi" else by_wsgi).get(key)


# Random requests

latin = st.characters(min_codepoint=0xA1, max_codepoint=0xFF)
visible = st.characters(min_codepoint=0x21, max_codepoint=0x7E)
values = st.text(st.one_of(visible, st.sampled_from(' ,;="/*'), latin), max_size=20).map(str.strip)
tokens = st.text(st.sampled_from("abcXYZ019-"), min_size=1, max_size=8)

escapes = st.binary(max_size=3).map(lambda data: "".join(f"%{byte:02x}" for byte in data))
pieces = st.one_of(
    st.text(st.sampled_from("abc/.~-_;:@!$'()*,"), max_size=8),
    st.text(max_size=3).map(lambda text: quote_from_bytes(text.encode("utf-8", "replace"))),
    escapes,
    st.sampled_from(["%", "%zz", "//", "/../", "\xe9", "\xc3\xa9", "%2F", "%00", "+"]),
)
paths = st.lists(pieces, max_size=4).map(lambda parts: "/" + "".join(parts))
fields = st.one_of(
    pieces, st.sampled_from(["a=1", "a=2", "b=", "=c", "&", "=", "d=%C3%A9", "e=\xe9"])
)
queries = st.one_of(
    st.none(),
    st.lists(fields, max_size=9).map("&".join),
    st.sampled_from(["", "?a=1?", "&".join(f"a={n}" for n in range(9))]),
)

accepts = st.lists(
    st.sampled_from(
        [
            "text/html",
            "text/*;q=0.5",
            "*/*;q=0",
            "application/json;q=0.9",
            "image/*",
            "a/b; c=d; q=x",
            "",
        ]
    ),
    max_size=4,
).map(", ".join)
cookies = st.lists(
    st.sampled_from(
        ["a=1", 'b="2 3"', "a=4", "c", "=d", "e=\xc3\xa9", "f=\xe9", "", 'g="\\054"', "h=a,b"]
    ),
    max_size=4,
).map(lambda pairs: "; ".join(pairs) or "a=1")
charsets = st.sampled_from(
    [
        *("", "", "; charset=utf-8", '; charset="UTF-8"', "; charset=latin-1", "; charset=koi8-r"),
        *("; charset=none-such", "; charset=", "; Charset=ascii; a=b", "; charset*=utf-8''utf-8"),
    ]
)
headers = st.one_of(
    st.tuples(tokens.map(lambda name: f"X-{name}"), values),
    st.tuples(st.sampled_from(["X_A", "X-A", "x-a", "Content_Type", "X-Forwarded-For"]), values),
    st.tuples(st.just("Accept"), accepts),
    st.tuples(st.just("Cookie"), cookies),
    st.tuples(st.just("X-Forwarded-Proto"), st.just("https")),
)
hosts = st.sampled_from(
    [
        "localhost",
        "127.0.0.1:80",
        "[::1]:8000",
        "LOCALHOST",
        "evil.example",
        "a_b",
        "localhost:",
    ]
)


@st.composite
def forms(draw: st.DrawFn) -> tuple[str, bytes]:
    body = "&".join(draw(st.lists(fields, max_size=9)))
    return f"application/x-www-form-urlencoded{draw(charsets)}", body.encode("latin-1")


@st.composite
def multiparts(draw: st.DrawFn) -> tuple[str, bytes]:
    boundary = draw(st.sampled_from(["frontier", "f", "a'b", "-" * 20]))
    parts = draw(
        st.lists(st.tuples(st.sampled_from(_PART_HEADERS), st.binary(max_size=300)), max_size=4)
    )
    lines = [b"--%b\r\n%b\r\n\r\n%b\r\n" % (boundary.encode(), *part) for part in parts]
    end = draw(st.sampled_from([b"--%b--\r\n", b"--%b--", b"--%b\r\n", b""]))
    told = draw(
        st.sampled_from([f"boundary={boundary}", f'boundary="{boundary}"', "boundary=other", ""])
    )
    body = b"".join(lines) + (end % boundary.encode() if end else b"")
    return f"multipart/form-data; {told}{draw(charsets)}", body


_PART_HEADERS = [
    b'Content-Disposition: form-data; name="a"',
    b'Content-Disposition: form-data; name="\xc3\xa9"',
    b'Content-Disposition: form-data; name="f"; filename="a.txt"\r\nContent-Type: text/plain; charset=koi8-r',
    b'Content-Disposition: form-data; name="f"; filename="C:\\dir\\\xc3\xa9.bin"',
    b'Content-Disposition: form-data; name="f"; filename=""',
    b"Content-Disposition: form-data; name=\"f\"; filename*=utf-8''%c3%a9.txt",
    b'Content-Disposition: form-data; name="b"\r\nContent-Transfer-Encoding: base64',
    b"Content-Disposition: form-data",
    b"X: y",
    b"",
]

others = st.tuples(
    st.sampled_from(
        ["application/json", "text/plain", "", "nonsense", ";", "a/b; c", "a/b; c*=no-such''d"]
    ),
    st.one_of(st.binary(max_size=700), st.just(b"one\ntwo\n\nthree")),
)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    content_type, body = draw(st.one_of(st.just((None, b"")), forms(), multiparts(), others))
    version = draw(st.sampled_from(["HTTP/1.1"] * 5 + ["HTTP/1.0"]))
    way, path, query = draw(st.sampled_from(WAYS)), draw(paths), draw(queries)
    # Of what one of Django's two gets wrong, and what the other does, not both.
    if not _is_utf8(path) or not f"{path}{query}".isascii():
        path = "/" + path.lstrip("/")
    if (
        way == "encoding" and query is not None
    ):  # setting it parses the query with Django's, and not with ours
        query = "&".join(query.split("&")[: LIMITS["DATA_UPLOAD_MAX_NUMBER_FIELDS"]])
    fixed = [("X-Way", way)]
    if version == "HTTP/1.1" or draw(st.booleans()):
        fixed.append(("Host", draw(st.one_of(st.just("localhost"), hosts))))
    if content_type is not None:
        fixed.append(
            (draw(st.sampled_from(["Content-Type", "content-type"])), content_type.strip())
        )
    chunked = body and version == "HTTP/1.1" and draw(st.booleans())
    return Request(
        draw(st.sampled_from(["GET", "POST", "POST", "POST", "PUT", "OPTIONS", "BREW", "post"])),
        path,
        query,
        (*draw(st.lists(headers, max_size=4)), *fixed),
        body,
        tuple(draw(st.lists(st.integers(1, 200), min_size=1, max_size=4))) if chunked else (),
        version,
    )


# The comparison


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a server that serves while the tests of this module run."""
    options = {"ROOT_URLCONF": "tests.observed", "MIDDLEWARE": [], **LIMITS}
    with override_settings(**options), LiveServer() as site:
        yield site.port


def answered(request: Request, port: int) -> dict[str, Any] | None:
    """What a view of ours sees of it; None for a 400 without one."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request.raw())
        with closing(HTTPResponse(connection, method=request.method)) as answer:
            answer.begin()
            content = answer.read()
    if answer.status == 400:
        return None
    assert answer.status == 200, content
    view: dict[str, Any] = json.loads(content)
    return view


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(requests())
def test_a_view_sees_what_it_would_under_djangos_own_servers(port: int, request: Request) -> None:
    ours, djangos = answered(request, port), expected(request, port)
    assert (ours is None) == (djangos is None)
    if ours is not None and djangos is not None:
        keys = ours.keys() | djangos.keys()
        pairs = {key: (ours.get(key), djangos.get(key)) for key in keys}
        assert not {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
