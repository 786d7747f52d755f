"""A response on its way to the socket: its head, and its content as the client takes it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import aclosing
from functools import lru_cache
from http import HTTPStatus
from typing import Any, cast

from asgiref.sync import sync_to_async
from django.http import HttpResponse
from django.http.response import HttpResponseBase
from tornado.httputil import HTTPHeaders, HTTPServerRequest, ResponseStartLine, format_timestamp
from tornado.iostream import StreamClosedError

from tornjango.exchanges import Exchange
from tornjango.pipes import Pipe
from tornjango.ranges import Part, Unsatisfiable, wanted
from tornjango.reading import Reader

logger = logging.getLogger("tornjango.sending")

#: What is sent without a wait before others have their turn on the loop, in bytes: a client may be faster than any stream.
TURN = 512 * 1024

# RFC 9110, 7.6.1: of the connection, and so the server's to say; a view may ask to have it closed.
_OF_THE_CONNECTION = {"transfer-encoding", "keep-alive", "proxy-connection", "te", "trailer"}

#: A response that has one of these has to do with ranges, or is not the file as it is.
_SAYS_SO_ITSELF = ("Accept-Ranges", "Content-Range", "Content-Encoding")


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
        #: Whether a worker thread iterates the response, and closes it there.
        self.closes = False
        #: The status, and the bytes of content, that were sent.
        self.status = 0
        self.sent = 0
        self._turn_ends = TURN

    async def send(self, response: HttpResponseBase, *, last: bool) -> None:
        """Returns when the system has taken all of it; ``last`` closes the connection behind it.

        Raises ``StreamClosedError`` when the client leaves before.
        """
        headers = _wire_headers(response)
        content = b"" if response.streaming else cast(HttpResponse, response).content
        status, reason, part = response.status_code, response.reason_phrase, None
        if not response.streaming:
            self._set_length(headers, status, len(content))
        elif status == 200 and _has_parts(response, headers):
            status, part = _choose_part(self.request, headers)
            reason = reason if status == 200 else HTTPStatus(status).phrase
        if last or self._is_last(headers):
            headers["Connection"] = "close"
            close_after(self.connection)
        bodyless = self.request.method == "HEAD" or status in (204, 304, 416)
        start_line = ResponseStartLine("HTTP/1.1", status, reason)
        written = self.connection.write_headers(start_line, headers, b"" if bodyless else content)
        self.begun = True
        self.status = status
        self.sent = 0 if bodyless else len(content)
        await self.flushed(written)
        if response.streaming and not bodyless:
            await self._stream(response, headers, part)
        if not self.finished:
            self._finish()

    def switch(self, response: HttpResponseBase, complete: Callable[[HTTPHeaders], None]) -> None:
        """Sends 101, with the headers that ``complete`` has completed: the connection speaks another protocol then."""
        headers = _wire_headers(response)
        complete(headers)
        start_line = ResponseStartLine("HTTP/1.1", 101, response.reason_phrase)
        self.connection.write_headers(start_line, headers)
        self.begun, self.status = True, 101
        self.connection.finish()

    def _finish(self) -> None:
        self.connection.finish()
        self.finished = True

    def _set_length(self, headers: HTTPHeaders, status: int, length: int) -> None:
        """RFC 9110, 8.6. What is said of content that is not there may be so, and is not touched."""
        told = headers.get("Content-Length")
        if status == 204 or (status == 304 and told == "0"):
            headers.pop("Content-Length", None)
        elif status == 304:
            pass
        elif told is None:
            headers["Content-Length"] = str(length)
        elif told != str(length) and (length or self.request.method != "HEAD"):
            logger.warning(
                "The answer to %s %s has %d bytes, and is sent so; its Content-Length was %r. "
                "Set that header after the content, or not at all.",
                *(self.request.method, self.request.path, length, told),
            )
            headers["Content-Length"] = str(length)

    def _is_last(self, headers: HTTPHeaders) -> bool:
        # To HTTP/1.0 only the connection's end says where a body of unknown length ends.
        endless = self.request.version == "HTTP/1.0" and "Content-Length" not in headers
        return endless or headers.get("Connection", "").lower() == "close"

    # The content

    async def _stream(self, response: Any, headers: HTTPHeaders, part: Part | None) -> None:
        file = getattr(response, "file_to_stream", None)
        if file is not None:
            await self._send_file(file, headers, part)
        elif response.is_async:
            await self._iterate(response)
        else:
            await self._iterate_in_thread(response)

    async def _send_file(self, file: Any, headers: HTTPHeaders, part: Part | None) -> None:
        # A file that grows meanwhile, a log say, is sent as long as it was said to be.
        length = headers.get("Content-Length", "")
        left = int(length) if length.isdecimal() else None
        reader = Reader(file, skip=part.start if part else 0, length=left)
        while chunk := await reader.read():
            await self.write(chunk)

    async def _iterate(self, response: Any) -> None:
        try:
            async with aclosing(aiter(response)) as parts:
                async for part in parts:
                    await self.write(part)
        finally:
            # Closing what Django has around the view's own generator only lets go of it.
            if (close := getattr(response._iterator, "aclose", None)) is not None:
                await close()

    async def _iterate_in_thread(self, response: Any) -> None:
        """In one worker thread from its beginning until it is closed: a database cursor that it reads stays there.

        Where this is cancelled the thread is not waited for: it notices at its next part.
        """
        self.closes = True
        iterating = asyncio.ensure_future(self._iterated(response))
        try:
            await asyncio.shield(iterating)
        except asyncio.CancelledError:
            iterating.add_done_callback(self._tell_of_end)
            raise

    async def _iterated(self, response: Any) -> None:
        loop = asyncio.get_running_loop()
        begun = False

        def iterate() -> None:
            nonlocal begun
            begun = True
            try:
                self._put_all(response, Pipe(loop, self.write))
                asyncio.run_coroutine_threadsafe(self._end(), loop).result()
            finally:
                response.close()

        try:
            await sync_to_async(iterate)()
        finally:
            if not begun:  # no thread had time for it
                response.close()

    def _put_all(self, parts: Iterable[bytes], pipe: Pipe) -> None:
        for part in parts:
            if self._cut.done():  # and the loop may have gone
                raise StreamClosedError
            if part:
                pipe.put(part)
        pipe.flush()

    async def _end(self) -> None:
        self._finish()

    def _tell_of_end(self, iterating: asyncio.Future[None]) -> None:
        """What a stream raises after its client has left is nobody's answer, but may be somebody's fault."""
        error = None if iterating.cancelled() else iterating.exception()
        if error is not None and not isinstance(error, StreamClosedError):
            line = f"{self.request.method} {self.request.path}"
            logger.warning("The stream that answered %s failed after its end", line, exc_info=error)

    async def write(self, chunk: bytes) -> None:
        """Returns when the system has taken it; raises ``StreamClosedError`` when it is no longer wanted."""
        if self._cut.done():
            raise StreamClosedError
        if chunk:
            self.sent += len(chunk)
            await self.flushed(self.connection.write(chunk))
            if self.sent >= self._turn_ends:
                self._turn_ends = self.sent + TURN
                await asyncio.sleep(0)

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
    if isinstance(connection, Exchange):
        return connection.closed
    return connection.stream is None or bool(connection.stream.closed())


def close_after(connection: Any) -> None:
    """Closes the connection behind the answer that is being given."""
    if isinstance(connection, Exchange):
        connection.last = True
    else:
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


def _has_parts(response: Any, headers: HTTPHeaders) -> bool:
    """Whether it is a file of which any part can be sent, and nobody has done so already."""
    file = getattr(response, "file_to_stream", None)
    return (
        file is not None
        and hasattr(file, "seek")
        and hasattr(file, "tell")
        and (not hasattr(file, "seekable") or file.seekable())
        and headers.get("Content-Length", "").isdecimal()
        and not any(name in headers for name in _SAYS_SO_ITSELF)
    )


def _choose_part(request: HTTPServerRequest, headers: HTTPHeaders) -> tuple[int, Part | None]:
    """The status of a file's answer, and what of the file is sent; the headers then say so (RFC 9110, 14)."""
    headers["Accept-Ranges"] = "bytes"
    asked = request.headers.get("Range")
    if asked is None or request.method != "GET":
        return 200, None
    size = int(headers["Content-Length"])
    condition = request.headers.get("If-Range")
    validators = {"etag": headers.get("ETag"), "last_modified": headers.get("Last-Modified")}
    try:
        part = wanted(asked, size, if_range=condition, **validators)
    except Unsatisfiable as exc:
        headers["Content-Range"], headers["Content-Length"] = exc.content_range, "0"
        return 416, None
    if part is None:
        return 200, None
    headers["Content-Range"], headers["Content-Length"] = part.content_range(size), str(part.length)
    return 206, part


def _wire_headers(response: HttpResponseBase) -> HTTPHeaders:
    headers = HTTPHeaders()
    for name, value in response.items():
        if name.lower() not in _OF_THE_CONNECTION:
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
