"""An `HTTP1Server` without Django: it says of every request what it took it for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

from tornado.httputil import (
    HTTPHeaders,
    HTTPMessageDelegate,
    HTTPServerConnectionDelegate,
    ResponseStartLine,
)
from tornado.netutil import bind_sockets

from tornjango.conf import Config
from tornjango.http1 import HTTP1Server
from tornjango.testing import RawClient


class Echo(HTTPServerConnectionDelegate):
    """``/park`` is answered when ``go`` is set, and notes in ``left`` that its client leaves."""

    def __init__(self) -> None:
        self.requests: list[EchoRequest] = []
        self.parked = asyncio.Event()
        self.go = asyncio.Event()
        self.left = asyncio.Event()
        #: Bodies wait for it where it is not set.
        self.ready = asyncio.Event()
        self.ready.set()

    def start_request(self, server_conn: object, request_conn: Any) -> EchoRequest:
        request = EchoRequest(self, request_conn)
        self.requests.append(request)
        return request


class EchoRequest(HTTPMessageDelegate):
    def __init__(self, echo: Echo, connection: Any) -> None:
        self.echo, self.connection = echo, connection
        self.body = b""
        self.events: list[str] = []

    def headers_received(self, start_line: Any, headers: HTTPHeaders) -> None:
        self.events.append("headers")
        self.start_line, self.headers = start_line, headers

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        self.body += chunk
        return None if self.echo.ready.is_set() else self._wait()

    async def _wait(self) -> None:
        await self.echo.ready.wait()

    def finish(self) -> None:
        self.events.append("finish")
        if self.start_line.path == "/park":
            self.connection.set_close_callback(self._leave)
            self.task = asyncio.create_task(self._park())
        else:
            self.answer()

    def on_connection_close(self) -> None:
        self.events.append("closed")
        self.echo.left.set()

    def _leave(self) -> None:
        self.events.append("left")
        self.echo.left.set()
        self.task.cancel()

    async def _park(self) -> None:
        self.echo.parked.set()
        await self.echo.go.wait()
        self.answer()

    def answer(self) -> None:
        told = [*self.start_line, sorted(self.headers.get_all()), self.body.decode("latin-1")]
        content = json.dumps(told).encode()
        headers = HTTPHeaders({"Content-Length": str(len(content))})
        self.connection.write_headers(ResponseStartLine("HTTP/1.1", 200, "OK"), headers, content)
        self.connection.finish()


class EchoSite:
    def __init__(self, server: HTTP1Server, echo: Any, port: int, refused: list[int]) -> None:
        self.server, self.echo, self.port = server, echo, port
        #: The statuses of what was answered without the delegate.
        self.refused = refused

    async def connect(self) -> RawClient:
        return await RawClient.connect(self.port)

    async def raw(self, *parts: bytes) -> bytes:
        """What is answered to the parts, sent one by one, until the server closes the connection."""
        async with await self.connect() as client:
            for part in parts:
                await client.send(part)
                await asyncio.sleep(0)
            return await client.rest()


@asynccontextmanager
async def echoing(delegate: Any = None, tls: Any = None, **config: Any) -> AsyncIterator[EchoSite]:
    """Serves ``delegate``, or else an `Echo`, with these keys of ``TORNJANGO``."""
    echo = Echo()
    refused: list[int] = []
    server = HTTP1Server(
        delegate or echo, Config.from_dict(config), lambda *told: refused.append(told[2])
    )
    sockets = bind_sockets(0, "127.0.0.1")
    port = sockets[0].getsockname()[1]
    await server.start(sockets, tls)
    try:
        yield EchoSite(server, delegate or echo, port, refused)
    finally:
        await server.stop()
        await server.close_all_connections()
        assert server.connections == 0
