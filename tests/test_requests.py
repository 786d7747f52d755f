from __future__ import annotations

import asyncio
import io
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote_to_bytes

import pytest
from asgiref.sync import async_to_sync
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.test import override_settings
from tornado.httputil import HTTPHeaders, HTTPInputError, RequestStartLine

from tests import views
from tests.serving import serving
from tornjango.bodies import Body
from tornjango.requests import ServerRequest, TornadoRequest, path_info

BOUNDARY = "frontier"
MIB = 1024 * 1024

Request = tuple[str, str, list[tuple[str, str]], bytes]


def multipart(*parts: tuple[str, bytes]) -> tuple[list[tuple[str, str]], bytes]:
    """Headers and body of a form whose parts have these ``Content-Disposition`` parameters."""
    lines = b"".join(
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; {about}\r\n\r\n".encode()
        + content
        + b"\r\n"
        for about, content in parts
    )
    headers = [("Content-Type", f"multipart/form-data; boundary={BOUNDARY}")]
    return headers, lines + f"--{BOUNDARY}--\r\n".encode()


def form(body: str, charset: str = "") -> tuple[list[tuple[str, str]], bytes]:
    return [("Content-Type", f"application/x-www-form-urlencoded{charset}")], body.encode("latin-1")


CASES: dict[str, tuple[str, str, list[tuple[str, str]], bytes]] = {
    "plain": ("GET", "/whole/", [], b""),
    "query": ("GET", "/whole/?a=1&a=2&b=&c=%C3%A9&d=%FF&e=+", [], b""),
    "query not encoded": ("GET", "/whole/?q=\xc3\xa9", [], b""),
    "query twice": ("GET", "/whole/?a=1?b=2", [], b""),
    "many fields": ("GET", "/whole/?" + "&".join(f"a={n}" for n in range(999)), [], b""),
    "empty query": ("GET", "/whole/?", [], b""),
    "encoded path": ("GET", "/whole/%C3%A9%20%2F/", [], b""),
    "path not UTF-8": ("GET", "/whole/%E9%FF/", [], b""),
    "path not encoded": ("GET", "/whole/\xc3\xa9/", [], b""),
    "path not encoded, not UTF-8": ("GET", "/whole/\xe9/", [], b""),
    "path with a bad escape": ("GET", "/whole/%zz%/", [], b""),
    "slashes inside": ("GET", "/whole//a///b/", [], b""),
    "dots": ("GET", "/whole/../a/./b", [], b""),
    "semicolon": ("GET", "/whole/;a=1", [], b""),
    "repeated headers": ("GET", "/whole/", [("X-A", "1"), ("X-A", "2"), ("x-a", "3")], b""),
    "header with an underscore": ("GET", "/whole/", [("X_A", "spoofed"), ("X-A", "1")], b""),
    "header in Latin-1": ("GET", "/whole/", [("X-A", "\xe9")], b""),
    "empty header": ("GET", "/whole/", [("X-A", "")], b""),
    "cookies": ("GET", "/whole/", [("Cookie", 'a=1; b="2 3"; a=4; c; =d')], b""),
    "cookies not encoded": ("GET", "/whole/", [("Cookie", "a=\xc3\xa9; b=\xe9")], b""),
    "IPv6 host": ("GET", "/whole/", [("Host", "[::1]:8000")], b""),
    "host with port": ("GET", "/whole/", [("Host", "localhost:8000")], b""),
    "content type without a body": ("GET", "/whole/", [("Content-Type", "text/plain")], b""),
    "unknown charset": ("GET", "/whole/?a=%C3%A9", [("Content-Type", "a/b; charset=no")], b""),
    "form": ("POST", "/whole/?q=1", *form("a=1&a=2&b=%C3%A9&c=+")),
    "form whose charset is told": ("POST", "/whole/", *form("a=%C3%A9", "; charset=utf-8")),
    "empty form": ("POST", "/whole/", *form("")),
    "form of another method": ("PUT", "/whole/", *form("a=1")),
    "multipart": (
        "POST",
        "/whole/",
        *multipart(
            ('name="a"', b"1"),
            ('name="a"', "é".encode()),
            ('name="file"; filename="C:\\\\dir\\\\n\u00e9.txt"', bytes(range(256))),
            ('name="file"; filename="second.txt"', b""),
        ),
    ),
    "JSON": ("POST", "/whole/", [("Content-Type", "application/json")], b'{"a": 1}'),
    "unknown method": ("BREW", "/whole/", [], b""),
    "lower-case method": ("get", "/whole/", [], b""),
    "options": ("OPTIONS", "/whole/", [], b""),
    "forwarded": (
        "GET",
        "/whole/",
        [("X-Forwarded-For", "1.2.3.4"), ("X-Forwarded-Proto", "https"), ("X-Real-Ip", "1.2.3.4")],
        b"",
    ),
}

#: What the servers themselves put into META, and no request does.
OF_SERVERS = {"REMOTE_PORT", "SERVER_NAME", "SERVER_PORT", "SERVER_PROTOCOL", "REMOTE_HOST"}


def wsgi(request: Request) -> dict[str, Any]:
    """What Django sees under WSGI, its environ made as PEP 3333 asks."""
    method, target, headers, body = request
    path, _, query = target.partition("?")
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": _unquoted(path).decode("latin-1"),
        "QUERY_STRING": query,
        "REMOTE_ADDR": "127.0.0.1",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "80",
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(body),
    }
    for name, value in headers:
        if "_" in name:
            continue
        key = name.upper().replace("-", "_")
        key = key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"
        environ[key] = f"{environ[key]},{value}" if key in environ else value
    return _view_of(b"".join(WSGIHandler()(environ, lambda *args: None)))


def asgi(request: Request) -> dict[str, Any]:
    """What Django sees under ASGI."""
    method, target, headers, body = request
    path, _, query = target.partition("?")
    scope = {
        "type": "http",
        "method": method,
        "path": _unquoted(path).decode("utf-8", "replace"),
        "query_string": query.encode("latin-1"),
        "headers": [(n.lower().encode("latin-1"), v.encode("latin-1")) for n, v in headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "scheme": "http",
    }
    sent: list[bytes] = []
    arriving = [{"type": "http.request", "body": body}]

    async def receive() -> Any:
        return arriving.pop() if arriving else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    async_to_sync(ASGIHandler())(scope, receive, send)
    return _view_of(b"".join(sent))


def _unquoted(path: str) -> bytes:
    return unquote_to_bytes(path.encode("latin-1"))


def _view_of(body: bytes) -> dict[str, Any]:
    view: dict[str, Any] = json.loads(body)
    view["META"] = {
        k: v
        for k, v in view["META"].items()
        if k not in OF_SERVERS and not k.startswith("wsgi.") and v != ""
    }
    return view


def _complete(request: Request) -> Request:
    method, target, headers, body = request
    headers = list(headers)
    if not any(name == "Host" for name, _ in headers):
        headers.append(("Host", "localhost"))
    if body:
        headers.append(("Content-Length", str(len(body))))
    return method, target, headers, body


async def ours(request: Request, **settings: Any) -> dict[str, Any]:
    method, target, headers, body = request
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    async with serving(**settings) as site, await site.connect() as client:
        await client.send("\r\n".join([*lines, "\r\n"]).encode("latin-1") + body)
        answer = await client.response()
        assert answer.status == 200, answer.body
        return _view_of(answer.body)


#: Under WSGI `META` has it in lower case, `request.method` in upper case.
UNLIKE_WSGI = {"lower-case method"}


@pytest.mark.parametrize("name", sorted(CASES.keys() - UNLIKE_WSGI))
def test_a_request_is_the_same_as_under_wsgi(name: str, io_loop: Any) -> None:
    request = _complete(CASES[name])
    with override_settings(ROOT_URLCONF="tests.http_views"):
        expected = wsgi(request)
    assert io_loop.run_sync(lambda: ours(request)) == expected


#: Here ASGI servers and Django's ASGI handler differ from WSGI, and ours is as WSGI.
UNLIKE_ASGI = {
    "query not encoded",
    "path not UTF-8",
    "path not encoded, not UTF-8",
    "cookies not encoded",
    "unknown charset",
}


@pytest.mark.parametrize("name", sorted(CASES.keys() - UNLIKE_ASGI))
def test_a_request_is_the_same_as_under_asgi(name: str, io_loop: Any) -> None:
    request = _complete(CASES[name])
    with override_settings(ROOT_URLCONF="tests.http_views"):
        expected = asgi(request)
    assert io_loop.run_sync(lambda: ours(request)) == expected


@pytest.mark.gen_test
async def test_addresses_are_those_of_the_connection() -> None:
    async with serving() as site, await site.connect() as client:
        meta = json.loads((await client.request("/whole/")).body)["META"]
        assert (meta["SERVER_NAME"], meta["SERVER_PORT"]) == ("127.0.0.1", str(site.port))
        assert meta["REMOTE_ADDR"] == "127.0.0.1"
        assert meta["SERVER_PROTOCOL"] == "HTTP/1.1"


@pytest.mark.parametrize("target", ["//whole/", "//other.example/whole/"])
@pytest.mark.gen_test
async def test_slashes_at_the_start_do_not_make_a_host(target: str) -> None:
    async with serving(ROOT_URLCONF="tests.any_path") as site:
        known = json.loads((await site.request(target)).body)
        assert (known["path"], known["host"]) == (target, "localhost")


@pytest.mark.gen_test
async def test_a_target_with_a_host_is_taken_apart() -> None:
    async with serving() as site, await site.connect() as client:
        await client.send(b"GET http://127.0.0.1:1/whole/?a=1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        known = json.loads((await client.response()).body)
        assert (known["path"], known["GET"]) == ("/whole/", {"a": ["1"]})
        assert known["host"] == "127.0.0.1:1"


@pytest.mark.gen_test
async def test_a_script_name_stands_before_every_path() -> None:
    async with serving(FORCE_SCRIPT_NAME="/app/") as site:
        known = json.loads((await site.request("/app/whole/a/")).body)
        assert (known["path"], known["path_info"]) == ("/app/whole/a/", "/whole/a/")
        assert known["META"]["SCRIPT_NAME"] == "/app"
        known = json.loads((await site.request("/whole/a/")).body)
        assert known["path"] == "/app/whole/a/"


def test_the_environ_of_wsgi_is_there() -> None:
    connection: Any = mock.Mock(context=mock.Mock(remote_ip="127.0.0.1", protocol="http"))
    connection.context.server_address = ("127.0.0.1", "80")
    headers = HTTPHeaders({"Host": "localhost"})
    line = RequestStartLine("GET", "/", "HTTP/1.1")
    request = TornadoRequest(ServerRequest(connection, line, headers), Body())
    assert request.environ is request.META
    assert request.environ["PATH_INFO"] == "/"


# Bodies


async def chunked(site: Any, target: str, body: bytes, size: int, *headers: str) -> Any:
    head = [f"POST {target} HTTP/1.1", "Host: localhost", "Transfer-Encoding: chunked", *headers]
    chunks = [body[n : n + size] for n in range(0, len(body), size)]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    async with await site.connect() as client:
        await client.send("\r\n".join([*head, "\r\n"]).encode() + framed)
        return await client.response()


@pytest.mark.gen_test
async def test_a_body_in_chunks_is_a_form_like_any_other() -> None:
    async with serving() as site:
        kind = "Content-Type: application/x-www-form-urlencoded"
        answer = await chunked(site, "/whole/", b"a=1&b=2", 3, kind)
        assert json.loads(answer.body)["POST"] == {"a": ["1"], "b": ["2"]}


@pytest.mark.gen_test
async def test_a_client_that_asks_first_is_told_to_continue() -> None:
    async with serving() as site, await site.connect() as client:
        await client.send(
            b"POST /body-twice/ HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n"
        )
        assert (await client.response()).status == 100
        await client.send(b"abc")
        assert (await client.response()).body == b"abc|abc|abc"


@pytest.mark.parametrize(
    ("target", "answer"),
    [("/reads/", b"abc|defg|"), ("/body-twice/", b"abcdefg|" * 2 + b"abcdefg")],
)
@pytest.mark.gen_test
async def test_a_body_can_be_read_in_pieces_or_kept(target: str, answer: bytes) -> None:
    async with serving() as site:
        assert (await site.request(target, method="POST", body=b"abcdefg")).body == answer


@pytest.mark.parametrize("limit", [0, 1024])
@pytest.mark.gen_test
async def test_a_large_body_waits_on_the_disk_and_goes_from_there(
    limit: int, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "FILE_UPLOAD_MAX_MEMORY_SIZE": limit,
        "FILE_UPLOAD_TEMP_DIR": str(tmp_path),
    }
    async with serving(**settings) as site:
        assert (await site.request("/size/", method="POST", body=bytes(5 * MIB))).body == b"5242880"
        assert (await chunked(site, "/size/", bytes(MIB), 1000)).body == b"1048576"
        headers, body = multipart(('name="file"; filename="a"', bytes(3 * MIB)))
        answer = await site.request("/upload/", method="POST", headers=headers, body=body)
        assert json.loads(answer.body) == {"size": 3 * MIB, "on_disk": True}
        assert views.seen.pop().startswith(str(tmp_path))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [100, 3 * MIB])
@pytest.mark.gen_test
async def test_an_upload_that_stops_half_way_leaves_nothing(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Body] = []
    close = Body.close

    def watched(body: Body) -> None:
        closed.append(body)
        close(body)

    monkeypatch.setattr(Body, "close", watched)
    async with serving() as site:
        async with await site.connect() as client:
            await client.send(
                b"POST /size/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n\r\n"
                + bytes(size)
            )
            await site.request("/status/200/")
            (arrival,) = site.application.arriving
        await arrival
        (body,) = (body for body in closed if body.size)
        assert body._file is not None
        assert body._file.closed
        assert not site.application.in_flight


def test_a_closed_body_can_be_closed_again() -> None:
    body = Body()
    body.write(b"abc")
    assert body.open().read() == b"abc"
    body.close()
    body.close()
    Body().close()


# Without a socket


@pytest.mark.parametrize(
    ("raw", "prefix", "path"),
    [
        ("/a%20b", "", "/a b"),
        ("", "", "/"),
        ("/app", "/app", "/"),
        ("/app/x", "/app", "/x"),
        ("/apple", "/app", "/apple"),
        ("*", "", "*"),
    ],
)
def test_the_path_below_a_prefix(raw: str, prefix: str, path: str) -> None:
    assert path_info(raw, prefix) == path


class _Connection:
    class context:
        remote_ip, protocol = "127.0.0.1", "http"


def server_request(target: str, *hosts: str, version: str = "HTTP/1.1") -> ServerRequest:
    headers = HTTPHeaders()
    for host in hosts:
        headers.add("Host", host)
    return ServerRequest(_Connection(), RequestStartLine("GET", target, version), headers)


@pytest.mark.parametrize(
    ("host", "name"), [("a.b:80", "a.b"), ("[::1]", "[::1]"), ("[::1]:80", "[::1]"), ("A", "a")]
)
def test_a_host_is_named_without_its_port(host: str, name: str) -> None:
    assert server_request("/", host).host_name == name


@pytest.mark.parametrize(
    "hosts", [(), ("a", "b"), ("a:b",), ("a:-1",), ("a:999999",), ("a b",), ("u@a",)]
)
def test_a_host_that_cannot_be_one_is_refused(hosts: tuple[str, ...]) -> None:
    with pytest.raises(HTTPInputError, match="Host header"):
        server_request("/", *hosts)


def test_http_1_0_needs_no_host() -> None:
    assert server_request("/", version="HTTP/1.0").host == "127.0.0.1"


def test_a_handler_of_tornados_finds_the_query_parsed() -> None:
    request = server_request("/?a=1&a=2&b=", "a")
    assert request.arguments == request.query_arguments == {"a": [b"1", b"2"], "b": [b""]}
