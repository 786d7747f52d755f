"""The life of a request: its body arrives, Django answers it, the answer goes out, or the client leaves before that."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core import signals
from django.dispatch import Signal
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.urls import ResolverMatch, set_script_prefix
from tornado.httputil import (
    HTTPHeaders,
    HTTPMessageDelegate,
    HTTPServerRequest,
    ResponseStartLine,
    format_timestamp,
)
from tornado.iostream import StreamClosedError
from tornado.web import RequestHandler

from tornjango.conf import get_config
from tornjango.requests import Body, TornadoRequest

if TYPE_CHECKING:
    from tornjango.application import Application

logger = logging.getLogger("tornjango.handlers")
access_log = logging.getLogger("django.server")

#: What is read of a file, and given to a worker thread, at a time; in bytes.
FILE_CHUNK = 64 * 1024


class BodyReceiver(HTTPMessageDelegate):
    """Takes a request's body as it comes, and starts the handler when it is there."""

    def __init__(
        self,
        application: Application,
        request: HTTPServerRequest,
        handler_class: type[DjangoHandler],
        match: ResolverMatch | None,
    ) -> None:
        self.application = application
        self.request = request
        self.handler_class = handler_class
        self.match = match
        self.body = Body()
        self.refused = False
        self._limit = get_config().MAX_BODY_SIZE

    def headers_received(self, start_line: Any, headers: HTTPHeaders) -> None:
        connection: Any = self.request.connection
        connection.set_max_body_size(sys.maxsize)  # ours answers 413, Tornado's a bare 400
        declared = headers.get("Content-Length", "")
        if declared.isdecimal() and int(declared) > self._limit:
            self._refuse()

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        if self.refused:
            return None
        self.body.size += len(chunk)
        if self.body.size > self._limit:
            self._refuse()
        elif self.body.on_disk:
            loop = asyncio.get_running_loop()
            return loop.run_in_executor(self.application.workers.pool, self.body.write, chunk)
        else:
            self.body.write(chunk)
        return None

    def finish(self) -> None:
        if not self.refused:
            handler = self.handler_class(self.application, self.request)
            handler.start(self.body, self.match)

    def on_connection_close(self) -> None:
        self.body.close()

    def _refuse(self) -> None:
        """Answers at once; Tornado then closes the connection rather than read the rest."""
        self.refused = True
        self.body.close()
        refuse(self.request, 413, f"The request body is larger than {self._limit} bytes.")


def refuse(request: HTTPServerRequest, status: int, reason: str) -> None:
    """Answers a request that is not let in, logs it once, and closes its connection."""
    logger.warning("%s %s from %s: %s", request.method, request.path, request.remote_ip, reason)
    refuse_on(request.connection, status, reason)


def refuse_on(connection: Any, status: int, reason: str) -> None:
    content = reason.encode()
    headers = HTTPHeaders()
    headers["Content-Type"] = "text/plain; charset=utf-8"
    headers["Content-Length"] = str(len(content))
    headers["Connection"] = "close"
    start_line = ResponseStartLine("HTTP/1.1", status, HttpResponse(status=status).reason_phrase)
    connection.write_headers(start_line, headers, content)
    connection.finish()


class DjangoHandler(RequestHandler):
    """Answers one request with what Django's middleware and the project's view answer.

    ``application.routes`` has one subclass for each view. The view's task is cancelled when its client leaves.
    """

    application: Application
    #: The view that the URL pattern names, for logs; Django's own answers (404, redirects) have none.
    view_name = ""

    def start(self, body: Body, match: ResolverMatch | None) -> None:
        self._left = asyncio.get_running_loop().create_future()
        self._body = body
        self._match = match
        self.application.in_flight.add(self)
        self.task = asyncio.create_task(self._live())

    # Tornado's side

    def clear(self) -> None:
        """Headers are Django's: none are set before its response is there."""
        self._headers = HTTPHeaders()
        self._write_buffer: list[bytes] = []
        self._status_code = 200
        self._reason = "OK"

    def on_connection_close(self) -> None:
        """The client has left: everything that is done for it is cancelled."""
        if not self._left.done():
            self._left.set_result(None)
            self.task.cancel()

    def stop(self) -> None:
        """The server does not wait for this request any longer: it is answered 503."""
        self.task.cancel()

    # Its life

    async def _live(self) -> None:
        try:
            await self._answer()
        except StreamClosedError:
            pass  # the client left while it was being written to
        except asyncio.CancelledError:
            if not self._left.done():
                self._answer_plainly(503, "The server is stopping.")
        except Exception:
            # Not the view's: Django has answered those. The last stand between a fault and the server.
            logger.exception(
                "%s %s failed outside of Django", self.request.method, self.request.uri
            )
            self._answer_plainly(500, "Internal Server Error")
        finally:
            self.application.in_flight.discard(self)
            self._body.close()

    async def _answer(self) -> None:
        self.application.workers.enter()
        request = TornadoRequest(self.request, self._body)
        request.route_match = self._match
        set_script_prefix(f"{request.script_name}/")
        await _send_signal(signals.request_started, type(self), environ=request.META)
        try:
            response = await self.get_response(request)
        except asyncio.CancelledError:
            request.close()
            await _send_signal(signals.request_finished, type(self))
            raise
        response._handler_class = type(self)  # type: ignore[attr-defined]
        try:
            await self._send(response)
        finally:
            await _close(response)
        self._log(response)

    async def get_response(self, request: HttpRequest) -> HttpResponseBase:
        return cast(HttpResponseBase, await self.application.chain.get_response_async(request))

    # Its answer

    async def _send(self, response: HttpResponseBase) -> None:
        self.set_status(response.status_code, response.reason_phrase)
        start_line = ResponseStartLine("HTTP/1.1", response.status_code, response.reason_phrase)
        headers = _wire_headers(response)
        connection = self.request.connection
        assert connection is not None
        bodyless = self.request.method == "HEAD" or response.status_code in (204, 304)
        if self.application.draining:
            headers["Connection"] = "close"
        if not response.streaming:
            content: bytes = response.content  # type: ignore[attr-defined]
            if response.status_code not in (204, 304):
                headers.setdefault("Content-Length", str(len(content)))
            self._sent = len(content)
            connection.write_headers(start_line, headers, b"" if bodyless else content)
        else:
            self._sent = 0
            await self._flushed(connection.write_headers(start_line, headers))
            if not bodyless:
                await self._stream(response)
        connection.finish()
        if self.request.version == "HTTP/1.0" and "Content-Length" not in headers:
            connection.close()  # type: ignore[attr-defined]  # only its end says where the body ends

    async def _stream(self, response: Any) -> None:
        file = getattr(response, "file_to_stream", None)
        if file is not None:
            read: Callable[[int], Awaitable[bytes]] = sync_to_async(file.read)
            while chunk := await read(FILE_CHUNK):
                await self._write(chunk)
        elif response.is_async:
            async with aclosing(aiter(response)) as parts:
                async for part in parts:
                    await self._write(part)
        else:
            await sync_to_async(self._pump)(response, asyncio.get_running_loop())

    def _pump(self, response: Any, loop: asyncio.AbstractEventLoop) -> None:
        """Iterates in one worker thread from beginning to end: a database cursor that it reads stays on its thread."""
        for part in response:
            asyncio.run_coroutine_threadsafe(self._write(part), loop).result()

    async def _write(self, chunk: bytes) -> None:
        """Returns when the client has taken it; raises ``StreamClosedError`` when it has left."""
        if chunk:
            assert self.request.connection is not None
            self._sent += len(chunk)
            await self._flushed(self.request.connection.write(chunk))

    async def _flushed(self, written: asyncio.Future[None]) -> None:
        # Tornado forgets the future of a write whose connection closes: it would be waited for without end.
        if not written.done():
            await asyncio.wait({written, self._left}, return_when=asyncio.FIRST_COMPLETED)
        if self._left.done():
            raise StreamClosedError
        await written

    def _answer_plainly(self, status: int, reason: str) -> None:
        connection: Any = self.request.connection
        if connection.stream is None or connection.stream.closed():
            return
        if (
            connection._response_start_line is not None
        ):  # it has begun: there is no way back but to break off
            connection.close()
            return
        refuse_on(connection, status, reason)

    def _log(self, response: HttpResponseBase) -> None:
        """A line as runserver writes it."""
        if settings.DEBUG and access_log.isEnabledFor(logging.INFO):
            line = f"{self.request.method} {self.request.uri} {self.request.version}"
            level = logging.INFO if response.status_code < 400 else logging.WARNING
            access_log.log(
                level if response.status_code < 500 else logging.ERROR,
                '"%s" %s %s',
                line,
                response.status_code,
                self._sent,
                extra={
                    "request": self.request,
                    "server_time": time.strftime("%d/%b/%Y %H:%M:%S"),
                    "status_code": response.status_code,
                },
            )


def _wire_headers(response: HttpResponseBase) -> HTTPHeaders:
    headers = HTTPHeaders()
    for name, value in response.items():
        headers.add(name, value)
    for cookie in response.cookies.values():
        # Without the space that output() begins with, and Tornado refuses.
        headers.add("Set-Cookie", cookie.output(header="").strip())
    headers.setdefault("Date", format_timestamp(time.time()))
    headers.setdefault("Server", "tornjango")
    return headers


async def _send_signal(signal: Signal, sender: type, **kwargs: Any) -> None:
    """In a worker thread where a receiver of the project's, or of a library's, might wait; at once otherwise."""
    if _only_django_listens(signal):
        signal.send(sender=sender, **kwargs)
    else:
        await signal.asend(sender=sender, **kwargs)


async def _close(response: HttpResponseBase) -> None:
    """Closes what the response holds, which also sends ``request_finished``."""
    iterates = response.streaming and not getattr(response, "file_to_stream", None)
    if _only_django_listens(signals.request_finished) and not iterates:
        response.close()
    else:
        await sync_to_async(response.close)()


def _only_django_listens(signal: Signal) -> bool:
    """Django's own receivers of the request signals only look at what the loop's thread does not have."""
    for entry in signal.receivers:
        receiver = entry[1]
        receiver = receiver() if hasattr(receiver, "__callback__") else receiver
        module = getattr(receiver, "__module__", "") or ""
        if receiver is not None and not module.startswith("django."):
            return False
    return True
