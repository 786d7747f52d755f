"""Django's test clients and live server, with tornjango in the place of Django's handlers.

A request of a test client goes over a socket to tornjango's own server, in a thread of this process, and through all that
a browser's would: HTTP, request, middleware, view, response. What comes back is compared with the response that Django's
code made, byte for byte, and that response is what the test gets.

Three things are the tests' and not a server's. All threads have the test's connections, as the threads of Django's live
server have: so a request sees the transaction of its ``TestCase``. What the client puts into a WSGI environment and no
client could send (``REMOTE_USER``, say) is added to the request behind the server. And a request begins with the language, time
zone and script prefix that are active in the test, and leaves the test with those it ends with.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar
from unittest import mock
from urllib.parse import quote

from django.conf import settings
from django.contrib.staticfiles.handlers import StaticFilesHandler
from django.core.handlers.asgi import ASGIRequest
from django.core.handlers.wsgi import WSGIRequest
from django.core.management.commands import runserver
from django.core.signals import setting_changed
from django.db import connections
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.test import client as test_client
from django.test import override_settings, testcases
from django.urls import base as urls
from django.utils import timezone
from django.utils.translation import trans_real
from tornado.netutil import bind_sockets

from tornjango import green, testing, workers
from tornjango.application import Application
from tornjango.db import connection as green_connections
from tornjango.server import Server
from tornjango.testing import Response

#: For one answer, in seconds.
ANSWER_LIMIT = 60

#: Names the call that a request belongs to; taken out again before Django sees the request.
CALL = "X-Tornjango-Call"
META_KEY = "HTTP_X_TORNJANGO_CALL"

#: What a server adds to an answer.
ADDED = {
    "accept-ranges",
    "connection",
    "content-length",
    "date",
    "server",
    "transfer-encoding",
}


def _shared() -> tuple[Any, ...]:
    """What a client of Django's shares with its test, because it runs in the test's thread."""
    # Looked up each time: Django replaces the first when a test changes LANGUAGES.
    return trans_real._active, timezone._active, urls._prefixes  # type: ignore[attr-defined]


@dataclasses.dataclass
class Message:
    """A request of a test client, as it goes over the wire, and what does not."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    scheme: str
    #: For ``request.META``.
    meta: dict[str, Any]

    def encoded(self, number: str) -> bytes:
        names = {name.lower() for name, _ in self.headers}
        fields = [*self.headers, (CALL, number)]
        if "connection" not in names:
            fields.append(("Connection", "close"))
        if "content-length" not in names and self.body:
            fields.append(("Content-Length", str(len(self.body))))
        lines = [f"{self.method} {self.target} HTTP/1.1", *(f"{n}: {v}" for n, v in fields)]
        return "\r\n".join([*lines, "\r\n"]).encode("latin-1") + self.body


def of_environ(environ: dict[str, Any]) -> Message:
    headers, meta = [("Host", _host(environ))], {}
    for key, value in environ.items():
        name = key.removeprefix("HTTP_").replace("_", "-").title()
        if key in ("CONTENT_TYPE", "CONTENT_LENGTH") or (key.startswith("HTTP_") and _fits(value)):
            if key != "HTTP_HOST" and value != "":
                headers.append((name, str(value)))
        elif not key.startswith("wsgi.") and key not in _ON_THE_WIRE:
            meta[key] = value
    payload = environ["wsgi.input"]
    return Message(
        environ["REQUEST_METHOD"],
        _target(_path(environ).encode("latin-1"), environ.get("QUERY_STRING", "")),
        headers,
        payload.read() if hasattr(payload, "read") else b"",
        environ["wsgi.url_scheme"],
        meta,
    )


_ON_THE_WIRE = {"PATH_INFO", "QUERY_STRING", "REQUEST_METHOD", "SCRIPT_NAME", "SERVER_PROTOCOL"}


def _path(environ: dict[str, Any]) -> str:
    path: str = environ["PATH_INFO"]
    # As browsers ask for it.
    prefix: str = environ.get("SCRIPT_NAME", "")
    return prefix.rstrip("/") + (path if path.startswith("/") else f"/{path}")


def _fits(value: object) -> bool:
    return value is not None and not any(char in str(value) for char in "\r\n\0")


def _host(environ: dict[str, Any]) -> str:
    if "HTTP_HOST" in environ:
        return str(environ["HTTP_HOST"])
    name, port = environ["SERVER_NAME"], str(environ["SERVER_PORT"])
    usual = {"http": "80", "https": "443"}[environ["wsgi.url_scheme"]]
    return str(name) if port == usual else f"{name}:{port}"


def of_scope(scope: dict[str, Any], body: bytes) -> Message:
    headers = [(n.decode("latin-1").title(), v.decode("latin-1")) for n, v in scope["headers"]]
    query = scope.get("query_string", "")
    return Message(
        scope["method"],
        _target(
            scope["path"].encode(), query.decode("latin-1") if isinstance(query, bytes) else query
        ),
        [(name, value) for name, value in headers if value],
        body,
        scope["scheme"],
        {
            "REMOTE_ADDR": scope["client"][0],
            "SERVER_NAME": scope["server"][0],
            "SERVER_PORT": str(scope["server"][1]),
        },
    )


def _target(path: bytes, query: str) -> str:
    # What RFC 3986 allows in a path is left alone.
    target = quote(path, safe="/!$&'()*+,;=:@~-._")
    raw = query.encode("latin-1", "ignore") if query.isascii() else query.encode("latin-1")
    return f"{target}?{quote(raw, safe=_QUERY)}" if query else target


_QUERY = "%/?!$&'()*+,;=:@~-._[]{}|\\^`\"<>#"


class Call:
    """A request on its way through the server."""

    def __init__(self, message: Message, enforce_csrf_checks: bool) -> None:
        self.message = message
        self.enforce_csrf_checks = enforce_csrf_checks
        self.request: HttpRequest | None = None
        self.response: HttpResponseBase | None = None
        self.failure: BaseException | None = None
        self.finished = threading.Event()
        self.state = _state()

    def arrived(self, request: Any) -> None:
        self.request = request
        request.META.update(self.message.meta)
        request.META["wsgi.url_scheme"] = self.message.scheme
        request.tornado_request.protocol = self.message.scheme
        request._dont_enforce_csrf_checks = not self.enforce_csrf_checks
        task: Any = asyncio.current_task()
        task.add_done_callback(lambda _: self.finished.set())


def _state() -> list[Any]:
    return [getattr(local, "value", None) for local in _shared()]


def _set_state(values: list[Any]) -> None:
    for local, value in zip(_shared(), values, strict=True):
        if value is not None:
            local.value = value
        elif hasattr(local, "value"):
            del local.value


class Bridge:
    """Serves the project as its settings are, and sends the clients' requests there."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self._numbers = itertools.count()
        self._calls: dict[str, Call] = {}
        self._server: testing.LiveServer | None = None
        self._live: testing.LiveServer | None = None
        self._stale = False
        #: Those of the thread that waits for the answer.
        self._connections: dict[str, Any] = {}
        self._patches = ExitStack()

    def __enter__(self) -> Bridge:
        self._main = self._of_this_thread()
        for owner, name, value in self._replacements():
            self._patches.enter_context(mock.patch.object(owner, name, value))
        setting_changed.connect(self._setting_changed)
        return self

    def __exit__(self, *exc: object) -> None:
        setting_changed.disconnect(self._setting_changed)
        self.stop()
        self._patches.close()

    def _replacements(self) -> Iterator[tuple[Any, str, Any]]:
        bridge = self

        def call(handler: Any, environ: dict[str, Any]) -> HttpResponseBase:
            with bridge._prefix(environ.get("SCRIPT_NAME")):
                response: Any = bridge.send(
                    of_environ(environ), handler.enforce_csrf_checks, bridge._of_this_thread()
                )
            response.wsgi_request = response.wsgi_request or WSGIRequest(environ)
            return response  # type: ignore[no-any-return]

        async def call_async(handler: Any, scope: dict[str, Any]) -> HttpResponseBase:
            file = scope.pop("_body_file", None)
            message = of_scope(scope, file.read() if file else b"")
            response: Any = await asyncio.to_thread(
                bridge.send, message, handler.enforce_csrf_checks, bridge._main
            )
            response.asgi_request = response.wsgi_request or ASGIRequest(scope, file)
            del response.wsgi_request
            return response  # type: ignore[no-any-return]

        yield test_client.ClientHandler, "__call__", call
        yield test_client.AsyncClientHandler, "__call__", call_async
        yield green_connections, "install", lambda engines: None
        yield green_connections, "uninstall", lambda: None
        yield workers, "_in_worker", self._in_worker
        live = type("LiveServerThread", (LiveServerThread,), {"bridge": self})
        yield testcases.LiveServerTestCase, "server_thread_class", live

    @staticmethod
    def _of_this_thread() -> dict[str, Any]:
        return {alias: connections[alias] for alias in connections}

    @staticmethod
    def _prefix(name: str | None) -> Any:
        if not name or settings.FORCE_SCRIPT_NAME:
            return contextlib.nullcontext()
        return mock.patch.object(settings, "FORCE_SCRIPT_NAME", name)

    def _setting_changed(self, *, setting: str, **kwargs: object) -> None:
        self._stale = self._stale or setting != "TORNJANGO"

    # The server

    def server(self) -> testing.LiveServer:
        """The one for the settings as they are, or the live server of the test."""
        if self._live is not None:
            return self._live
        if self._stale and not self._calls:
            self.stop()
        if self._server is None:
            self._server = testing.LiveServer(self._application).__enter__()
            self._stale = False
        return self._server

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.__exit__(None, None, None)

    @contextmanager
    def live(
        self, host: str, port: int, static: bool | None, connections: dict[str, Any]
    ) -> Iterator[testing.LiveServer]:
        """A server for browsers, whose threads share these connections."""
        self.stop()
        self._connections = connections
        with _OnAddress(host, port, lambda: self._application(static)) as self._live:
            yield self._live
        self._live = None
        self._connections = {}

    def _application(self, static: bool | None = False) -> Application:
        # Of STATIC_ROOT, as Django's live server serves it without being told.
        with override_settings(TORNJANGO={"STATIC": static is None}):
            application = Application(staticfiles=static)
        answer = application.chain.get_response_async

        async def get_response_async(request: Any) -> HttpResponseBase:
            call = self._calls.get(request.META.pop(META_KEY, ""))
            _take(self._connections)
            await green.run(_take, self._connections)  # asgiref keeps others there
            if call is None:  # the live server's
                self.requests[request.method] += 1
                return await answer(request)
            _set_state(call.state)
            call.arrived(request)
            call.response = await answer(request)
            call.state = _state()
            return call.response

        application.chain.get_response_async = get_response_async  # type: ignore[method-assign]
        return application

    def _in_worker(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Closes no connection, and ends no transaction: they are the test's."""
        _take(self._connections)
        return fn(*args, **kwargs)

    # The way of a request

    def send(
        self, message: Message, enforce_csrf_checks: bool, connections: dict[str, Any]
    ) -> HttpResponseBase:
        """The response, with ``wsgi_request``. Raises what sending it raised."""
        server = self.server()
        call, number = Call(message, enforce_csrf_checks), str(next(self._numbers))
        self.requests[message.method] += 1
        self._calls[number] = call
        try:
            with self._shared(connections), _failures(call):
                answer = _exchange(server.port, message, number)
                if call.request is not None and not call.finished.wait(ANSWER_LIMIT):
                    raise AssertionError("The server has answered, and goes on with the request.")
        finally:
            del self._calls[number]
        _set_state(call.state)
        response = _received(call, *answer)
        response.wsgi_request = call.request  # type: ignore[attr-defined]
        return response

    @contextmanager
    def _shared(self, connections: dict[str, Any]) -> Iterator[None]:
        before, self._connections = self._connections, connections
        for each in connections.values():
            each.inc_thread_sharing()
        try:
            yield
        finally:
            self._connections = before
            for each in connections.values():
                each.dec_thread_sharing()


def _take(wrappers: dict[str, Any]) -> None:
    for alias, wrapper in wrappers.items():
        connections[alias] = wrapper


@contextmanager
def _failures(call: Call) -> Iterator[None]:
    """What the server can only log, because the answer has begun, is the test's to see."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info:
                call.failure = record.exc_info[1]

    handler, logger = Handler(), logging.getLogger("tornjango.handlers")
    logger.addHandler(handler)
    try:
        yield
    except EOFError:
        raise call.failure or AssertionError("The answer is broken off.") from None
    finally:
        logger.removeHandler(handler)


# HTTP, as strictly as RFC 9112 frames it


def _exchange(port: int, message: Message, number: str) -> tuple[Response, list[bytes]]:
    address = ("127.0.0.1", port)
    with socket.create_connection(address, ANSWER_LIMIT) as client, client.makefile("rb") as file:
        client.sendall(message.encoded(number))
        head = _head(file)
        while head.status < 200:
            head = _head(file)
        bodyless = message.method == "HEAD" or head.status in (204, 304)
        parts = [] if bodyless else [*_body(file, head)]
        if rest := file.read():
            raise AssertionError(f"More than the answer came: {rest!r}")
        return head, parts


def _head(file: IO[bytes]) -> Response:
    lines = [*iter(lambda: _line(file), "")]
    version, status, reason = lines[0].split(" ", 2)
    pairs = [line.split(": ", 1) for line in lines[1:]]
    return Response(version, int(status), reason, tuple((n, v) for n, v in pairs))


def _line(file: IO[bytes]) -> str:
    line = file.readline()
    if not line.endswith(b"\r\n"):
        raise EOFError
    return line[:-2].decode("latin-1")


def _body(file: IO[bytes], head: Response) -> Iterator[bytes]:
    length = head.header("Content-Length")
    if head.header("Transfer-Encoding") == "chunked":
        while size := int(_line(file), 16):
            yield _exactly(file, size + 2)[:-2]
        _line(file)
    elif length is not None:
        yield _exactly(file, int(length))
    else:
        yield file.read()


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return data


# What the test gets


def _received(call: Call, head: Response, parts: list[bytes]) -> HttpResponseBase:
    response: Any = call.response
    if response is None or call.failure is not None:  # refused before Django, or behind it
        return _made(head, parts)
    _compare(response, head)
    if response.streaming:
        response.streaming_content = _aiter(parts) if response.is_async else parts
    elif call.message.method == "HEAD" or head.status in (204, 304):
        response.content = b""
    elif response.content != b"".join(parts):
        raise AssertionError(f"{response.content!r} was answered, and {b''.join(parts)!r} came.")
    return response  # type: ignore[no-any-return]


async def _aiter(parts: list[bytes]) -> Any:
    for part in parts:
        yield part


def _made(head: Response, parts: list[bytes]) -> HttpResponse:
    response = HttpResponse(b"".join(parts), status=head.status, reason=head.reason)
    for name, value in head.headers:
        response[name] = value
    return response


def _compare(response: HttpResponseBase, head: Response) -> None:
    names = {name.lower() for name in response.headers}
    made = [(name.lower(), value.strip()) for name, value in response.items()]
    made += [("set-cookie", c.output(header="").strip()) for c in response.cookies.values()]
    if head.status in (204, 304):  # of nothing: RFC 9110, 8.6
        made = [field for field in made if field[0] != "content-length"]
    came = [(name.lower(), value) for name, value in head.headers]
    came = [field for field in came if field[0] not in ADDED - names]
    line = (response.status_code, response.reason_phrase.strip())
    if line != (head.status, head.reason) or sorted(made) != sorted(came):
        raise AssertionError(f"{line} {made} was answered, and {head} came.")


# The live server


class LiveServerThread(testcases.LiveServerThread):
    """In the place of Django's: tornjango's own, on the address that it is given."""

    bridge: ClassVar[Bridge]

    def run(self) -> None:
        static = self._static()
        server = self.bridge.live(self.host, self.port, static, self.connections_override or {})
        self._ended = threading.Event()
        try:
            with server as served:
                self.port = served.port
                self.is_ready.set()
                self._ended.wait()
        except Exception as exc:  # noqa: BLE001  raised where the server is waited for
            self.error = exc  # type: ignore[assignment]
        finally:
            self.is_ready.set()

    def _static(self) -> bool | None:
        """Those of apps; or, by None, those in STATIC_ROOT, if it is there."""
        if issubclass(self.static_handler, StaticFilesHandler):
            return True
        return None if Path(settings.STATIC_ROOT or "").is_dir() else False

    def terminate(self) -> None:
        self._ended.set()
        self.join()


class _OnAddress(testing.LiveServer):
    def __init__(self, host: str, port: int, make: Callable[[], Application]) -> None:
        super().__init__(make)
        self._address = (port, host)

    def _bind(self) -> None:
        self.application = self._make()
        sockets = bind_sockets(*self._address, family=socket.AF_INET)
        self.port = sockets[0].getsockname()[1]
        self.server = Server(self.application, sockets)


@contextmanager
def runserver_of_tornjango() -> Iterator[None]:
    """For tests of the command, which take it from its module when they are imported."""
    from tornjango.management.commands.runserver import Command

    with mock.patch.object(runserver, "Command", Command):
        yield
