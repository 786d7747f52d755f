"""For tests: the server itself on a port of its own, and a client that can send what no HTTP library would.

A project's tests need none of it to test its views: in Django's ``TestCase`` and test clients, in a shell and in commands,
``tornjango.db``, Django's async methods and `tornjango.forms` use Django's own connection, and so see the test's
transaction. What is here is for tests that want the server, or its pools: their connections are others, which see only
what was committed. So these belong into a ``TransactionTestCase``, or pytest-django's ``transactional_db``.
``tornjango.pytest_plugin`` has a fixture.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Self

from django.apps import apps
from django.test import TransactionTestCase, modify_settings
from django.utils.functional import classproperty
from tornado.netutil import bind_sockets

from tornjango.application import Application
from tornjango.db import pools
from tornjango.server import Server


class LiveServer:
    """Serves the project on a free port of 127.0.0.1 for as long as a ``with`` block lasts.

    ``async with`` serves on the running loop; plain ``with`` on a loop in a thread of its own, for browsers and sync
    clients. The end of the block stops the server as SIGTERM would, and returns when everything is closed.
    """

    application: Application
    server: Server
    port: int

    def __init__(self, make: Callable[[], Application] = Application) -> None:
        """``make`` is called on the thread of the loop that serves."""
        self._make = make
        self._ready = threading.Event()
        self._error: BaseException | None = None

    @property
    def url(self) -> str:
        """Where it serves, without a slash at its end."""
        return f"http://127.0.0.1:{self.port}"

    def _bind(self) -> None:
        self.application = self._make()
        sockets = bind_sockets(0, "127.0.0.1")
        self.port = sockets[0].getsockname()[1]
        self.server = Server(self.application, sockets)

    async def __aenter__(self) -> Self:
        self._bind()
        self._task = asyncio.create_task(self.server.serve())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: object
    ) -> None:
        self.server.stop()
        await self._task

    def __enter__(self) -> Self:
        """Raises what making the application raised."""
        self._thread = threading.Thread(target=self._run, name="tornjango-live-server")
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            self._thread.join()
            raise self._error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.server.stop()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._bind()
        except BaseException as exc:  # noqa: BLE001  raised again where the block begins
            self._error = exc
            self._ready.set()
            return
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        asyncio.get_running_loop().call_soon(self._ready.set)  # when it serves
        await self.server.serve()


class LiveServerTestCase(TransactionTestCase):
    """Django's ``LiveServerTestCase``, with tornjango as the server and its pools on the test database.

    One server for all tests of a class, in a thread of its own; static files of apps are served, too. What a test
    commits, the server sees; after each test the tables are emptied, as in every ``TransactionTestCase``.
    """

    server: ClassVar[LiveServer]

    @classmethod
    def make_application(cls) -> Application:
        """What is served; for tests of an application of their own."""
        return Application(staticfiles=apps.is_installed("django.contrib.staticfiles"))

    @classproperty
    def live_server_url(cls) -> str:
        return cls.server.url

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.enterClassContext(modify_settings(ALLOWED_HOSTS={"append": "127.0.0.1"}))
        cls.server = cls.enterClassContext(LiveServer(cls.make_application))


@asynccontextmanager
async def open_pools() -> AsyncIterator[None]:
    """The pools on the running loop, as in the server, for the length of an ``async with`` block.

    For tests that pytest's plugins run on a loop. Django's own async tests have a thread that waits for them: there
    Django's async methods keep to that thread's connection, pools or not.
    """
    pools.open()
    try:
        yield
    finally:
        await pools.close()


@dataclass(frozen=True)
class Response:
    """An answer as it came over the wire, its chunks joined."""

    version: str
    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]
    body: bytes = b""

    def all(self, name: str) -> list[str]:
        """The values of a header, one for each line that has it; the case of ``name`` does not matter."""
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def header(self, name: str) -> str | None:
        """The value of a header that comes once; None where there is none."""
        values = self.all(name)
        return values[0] if values else None


class RawClient:
    """One connection: sends bytes as they are given, and reads answers as strictly as RFC 9112 frames them."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, port: int, host: str = "127.0.0.1") -> RawClient:
        return cls(*await asyncio.open_connection(host, port))

    async def __aenter__(self) -> RawClient:
        return self

    async def __aexit__(self, kind: object, error: object, tb: object) -> None:
        self.abort()

    async def send(self, data: bytes) -> None:
        """Returns when the system has taken all but the last 64 KiB."""
        self.writer.write(data)
        await self.writer.drain()

    async def request(
        self,
        target: str,
        *,
        method: str = "GET",
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
    ) -> Response:
        """Sends one request, with ``Host`` and (for a body) ``Content-Length``, and reads its answer."""
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
        if not any(name.lower() == "host" for name, _ in headers):
            lines.append("Host: localhost")
        if body:
            lines.append(f"Content-Length: {len(body)}")
        await self.send("\r\n".join([*lines, "\r\n"]).encode() + body)
        return await self.response(method)

    async def response(self, method: str = "GET") -> Response:
        """The next answer, whole. ``method`` is that of its request: an answer to HEAD has no body.

        Raises ``asyncio.IncompleteReadError`` when the server closes before the answer's end.
        """
        head = await self.head()
        if method == "HEAD" or head.status in (204, 304) or head.status < 200:
            return head
        return Response(
            head.version, head.status, head.reason, head.headers, await self._body(head)
        )

    async def head(self) -> Response:
        """The next answer's line and headers; its body stays to be read from ``reader``."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        version, status, reason = lines[0].split(" ", 2)
        pairs = [line.split(": ", 1) for line in lines[1:-2]]
        return Response(version, int(status), reason, tuple((key, value) for key, value in pairs))

    async def _body(self, head: Response) -> bytes:
        if head.header("Transfer-Encoding") == "chunked":
            return b"".join([chunk async for chunk in self._chunks()])
        length = head.header("Content-Length")
        return await (self.reader.readexactly(int(length)) if length else self.reader.read())

    async def chunk(self) -> bytes:
        """The next chunk of a chunked body; empty for the last."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def _chunks(self) -> AsyncIterator[bytes]:
        while chunk := await self.chunk():
            yield chunk

    async def rest(self) -> bytes:
        """Everything until the server closes the connection."""
        return await self.reader.read()

    def abort(self) -> None:
        """Leaves, as a client that has lost its network: nothing more is sent or read."""
        self.writer.transport.abort()
