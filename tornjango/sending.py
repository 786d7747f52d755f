"""A response on its way to the socket: its head, and its content as the client takes it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import lru_cache
from typing import Any, cast

from asgiref.sync import sync_to_async
from django.http import HttpResponse
from django.http.response import HttpResponseBase
from tornado.httputil import HTTPHeaders, HTTPServerRequest, ResponseStartLine, format_timestamp
from tornado.iostream import StreamClosedError

#: What is read of a file, and given to a worker thread, at a time; in bytes.
FILE_CHUNK = 64 * 1024


class Sending:
    """Sends one response. ``cut`` is done as soon as nobody waits for it any more."""

    def __init__(
        self, connection: Any, request: HTTPServerRequest, cut: asyncio.Future[Any]
    ) -> None:
        self.connection = connection
        self.request = request
        self._cut = cut
        #: Whether the head is out, and there is no way back.
        self.begun = False
        self.finished = False
        #: The status, and the bytes of content, that were sent.
        self.status = 0
        self.sent = 0

    async def send(self, response: HttpResponseBase, *, last: bool) -> None:
        """Returns when the system has taken all of it; ``last`` closes the connection behind it.

        Raises ``StreamClosedError`` when the client leaves before.
        """
        status = response.status_code
        headers = _wire_headers(response)
        bodyless = self.request.method == "HEAD" or status in (204, 304)
        content = b"" if response.streaming else cast(HttpResponse, response).content
        if status == 204:
            headers.pop("Content-Length", None)  # RFC 9110, 8.6
        elif status != 304 and not response.streaming and "Content-Length" not in headers:
            headers["Content-Length"] = str(len(content))
        if last or self._is_last(headers):
            headers["Connection"] = "close"
            close_after(self.connection)
        start_line = ResponseStartLine("HTTP/1.1", status, response.reason_phrase)
        written = self.connection.write_headers(start_line, headers, b"" if bodyless else content)
        self.begun = True
        self.status = status
        self.sent = 0 if bodyless else len(content)
        await self.flushed(written)
        if response.streaming and not bodyless:
            await self._stream(response)
        self.connection.finish()
        self.finished = True

    def _is_last(self, headers: HTTPHeaders) -> bool:
        # To HTTP/1.0 only the connection's end says where a body of unknown length ends.
        endless = self.request.version == "HTTP/1.0" and "Content-Length" not in headers
        return endless or headers.get("Connection") == "close"

    async def _stream(self, response: Any) -> None:
        file = getattr(response, "file_to_stream", None)
        if file is not None:
            read: Callable[[int], Awaitable[bytes]] = sync_to_async(file.read)
            while chunk := await read(FILE_CHUNK):
                await self.write(chunk)
        elif response.is_async:
            async with aclosing(aiter(response)) as parts:
                async for part in parts:
                    await self.write(part)
        else:
            await self._pump_in_thread(response)

    async def _pump_in_thread(self, response: Any) -> None:
        loop = asyncio.get_running_loop()
        pumping = asyncio.ensure_future(sync_to_async(self._pump)(response, loop))
        try:
            await asyncio.shield(pumping)
        except asyncio.CancelledError:
            # The thread notices with its next part. Until then it holds what closing the response would take from it.
            await asyncio.wait({pumping})
            pumping.exception()
            raise

    def _pump(self, response: Any, loop: asyncio.AbstractEventLoop) -> None:
        """Iterates in one worker thread from beginning to end: a database cursor that it reads stays on its thread."""
        for part in response:
            asyncio.run_coroutine_threadsafe(self.write(part), loop).result()

    async def write(self, chunk: bytes) -> None:
        """Returns when the system has taken it; raises ``StreamClosedError`` when it is no longer wanted."""
        if self._cut.done():
            raise StreamClosedError
        if chunk:
            self.sent += len(chunk)
            await self.flushed(self.connection.write(chunk))

    async def flushed(self, written: asyncio.Future[None]) -> None:
        """Returns when the system has taken what was written; raises ``StreamClosedError`` when nobody waits for it."""
        # Tornado forgets the future of a write whose connection closes: it would be waited for without end.
        if not written.done():
            either: set[asyncio.Future[Any]] = {written, self._cut}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._cut.done():
                raise StreamClosedError
        await written


def is_closed(connection: Any) -> bool:
    """Whether the client has left."""
    return connection.stream is None or bool(connection.stream.closed())


def close_after(connection: Any) -> None:
    """Closes the connection behind the answer that is being given."""
    connection._disconnect_on_finish = True


def write_plainly(connection: Any, method: str | None, status: int, reason: str) -> int:
    """Writes an answer that is not Django's, the last one of its connection; returns the size of its content."""
    content = f"{reason}\n".encode()
    headers = HTTPHeaders()
    headers["Content-Type"] = "text/plain; charset=utf-8"
    headers["Content-Length"] = str(len(content))
    headers["Connection"] = "close"
    if status == 503:
        headers["Retry-After"] = "1"
    start_line = ResponseStartLine("HTTP/1.1", status, HttpResponse(status=status).reason_phrase)
    content = b"" if method == "HEAD" else content
    connection.write_headers(start_line, headers, content)
    return len(content)


def refuse_on(connection: Any, method: str | None, status: int, reason: str) -> int:
    """Answers a request that Django does not see, and closes its connection; returns the size of the content."""
    sent = write_plainly(connection, method, status, reason)
    close_after(connection)
    connection.finish()
    return sent


def _wire_headers(response: HttpResponseBase) -> HTTPHeaders:
    headers = HTTPHeaders()
    for name, value in response.items():
        headers[name] = value
    for cookie in response.cookies.values():
        # Without the space that output() begins with, and Tornado refuses.
        headers.add("Set-Cookie", cookie.output(header="").strip())
    stamp(headers)
    return headers


def stamp(headers: HTTPHeaders) -> None:
    """Says when it is answered, and who answers, where that is not said."""
    if "Date" not in headers:
        headers["Date"] = _date(int(time.time()))
    if "Server" not in headers:
        headers["Server"] = "tornjango"


@lru_cache(1)
def _date(second: int) -> str:
    return format_timestamp(second)
