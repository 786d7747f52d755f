"""Binds, serves, drains and closes: an application on its sockets, from start to stop."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPInputError
from tornado.iostream import IOStream
from tornado.netutil import bind_sockets

from tornjango import comet, green
from tornjango.application import Application
from tornjango.conf import Config, get_config
from tornjango.watchdog import watching

logger = logging.getLogger("tornjango.server")

#: How long requests may take to finish when the code is reloaded in development, in seconds.
RELOAD_TIMEOUT = 1.0

_BARE_400 = b"HTTP/1.1 400 Bad Request\r\n\r\n"


class ServerStream(IOStream):
    """A connection whose client is told what was wrong with a request that could not be read.

    Tornado answers such a request with a bare status line, and one whose head is too long not at all.
    """

    _refused = False

    def write(self, data: bytes | memoryview) -> asyncio.Future[None]:
        if data == _BARE_400 and isinstance(error := sys.exc_info()[1], HTTPInputError):
            return self._refuse(HTTPStatus.BAD_REQUEST, f"Bad request: {error}")
        return super().write(data)

    def _check_max_bytes(self, delimiter: Any, size: int) -> None:
        limit = self._read_max_bytes
        if limit is not None and size > limit and not self._refused:
            self._refuse(*_too_long(delimiter, limit))
        super()._check_max_bytes(delimiter, size)

    def _refuse(self, status: HTTPStatus, reason: str) -> asyncio.Future[None]:
        logger.warning("Bad request from %s: %s", self._peer(), reason)
        self._refused = True
        return super().write(_plain_answer(status, reason))

    def close_fd(self) -> None:
        if self._refused:
            self._take_leave()
        super().close_fd()

    def _take_leave(self) -> None:
        """Reads what has arrived already: closing on unread data would reset the answer away (RFC 9112, 9.6)."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            for _ in range(64):
                if not self.socket.recv(64 * 1024):
                    break

    def _peer(self) -> str:
        with contextlib.suppress(OSError, AttributeError):
            return str(self.socket.getpeername()[0])
        return "a client that left"


def _too_long(delimiter: Any, limit: int) -> tuple[HTTPStatus, str]:
    if delimiter == b"\r\n":  # the only line that Tornado reads by itself is a chunk's size
        return HTTPStatus.BAD_REQUEST, f"A chunk's size has more than {limit} bytes."
    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    return status, f"The request line and headers are longer than {limit} bytes."


def _plain_answer(status: HTTPStatus, reason: str) -> bytes:
    content = f"{reason}\n".encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        "Content-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(content)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + content


class ConnectionServer(HTTPServer):
    """Tornado's HTTP server, over ``ServerStream`` and with the limits of ``TORNJANGO``."""

    def initialize(self, application: Application, config: Config) -> None:  # type: ignore[override]
        super().initialize(
            application,
            idle_connection_timeout=config.HEADER_TIMEOUT,
            body_timeout=config.BODY_TIMEOUT,
            max_header_size=config.MAX_HEADER_SIZE,
        )

    def _handle_connection(self, connection: socket.socket, address: Any) -> None:
        stream = ServerStream(
            connection, max_buffer_size=self.max_buffer_size, read_chunk_size=self.read_chunk_size
        )
        self.handle_stream(stream, address)


class Server:
    """Serves one application until it is told to stop; then drains and closes it."""

    def __init__(self, application: Application, sockets: list[socket.socket]) -> None:
        self.application = application
        self.sockets = sockets
        self.config = get_config()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._grace = self.config.GRACEFUL_TIMEOUT

    async def serve(self) -> None:
        """Returns when ``stop`` was called and everything is closed."""
        self._loop = asyncio.get_running_loop()
        self.application.workers.install(self._loop)
        green.serve(self._loop)
        http = ConnectionServer(self.application, self.config)
        http.add_sockets(self.sockets)
        monitor = self.application.monitor
        with watching(self.config), monitor.measuring() if monitor else contextlib.nullcontext():
            try:
                await self._stop.wait()
            finally:
                await self._drain(http)

    def stop(self, grace: float | None = None) -> None:
        """Begins an orderly stop, from any thread; a second call ends the waiting for requests in flight.

        ``grace`` is how long requests in flight may take, in seconds (``TORNJANGO["GRACEFUL_TIMEOUT"]`` unless given).
        """
        if self._loop is None:  # a signal came before the loop
            self._begin_stop(grace)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._begin_stop, grace)

    def _begin_stop(self, grace: float | None) -> None:
        if self._stop.is_set():
            self._end_all()
        elif grace is not None:
            self._grace = grace
        self._stop.set()

    async def _drain(self, http: HTTPServer) -> None:
        """No new connections; parked readers are answered; requests in flight finish, or are told to come back."""
        http.stop()
        self.application.draining = True
        comet.drain()
        if not await self._all_answered(self._grace):
            count = len(self.application.in_flight) + len(self.application.arriving)
            logger.warning("%d requests did not finish in %g s", count, self._grace)
            self._end_all()
            await self._all_answered(1)
        await http.close_all_connections()
        await self.application.close()

    def _end_all(self) -> None:
        """Those that are being answered are answered 503; those still arriving are not waited for."""
        for handler in list(self.application.in_flight):
            handler.stop()
        for arrival in self.application.arriving:
            if not arrival.done():
                arrival.set_result(None)

    async def _all_answered(self, limit: float) -> bool:
        deadline = time.monotonic() + limit
        while unfinished := self._unfinished():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            await asyncio.wait(unfinished, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        return True

    def _unfinished(self) -> set[asyncio.Future[None]]:
        return {handler.task for handler in self.application.in_flight} | self.application.arriving


class RunserverAdapter:
    """What Django's ``runserver`` takes for its WSGI server class: bound when made, then given its application."""

    daemon_threads = True  # runserver sets it, for a mixin that is not needed here

    def __init__(
        self, address: tuple[str, int], handler: object = None, ipv6: bool = False
    ) -> None:
        """Raises ``OSError``, which runserver explains."""
        family = socket.AF_INET6 if ipv6 else socket.AF_INET
        self.sockets = bind_sockets(address[1], address[0], family)
        self.server_port = self.sockets[0].getsockname()[1]

    def set_app(self, application: Application) -> None:
        self.server = Server(application, self.sockets)

    def serve_forever(self) -> None:
        """Returns after SIGINT or SIGTERM, when everything is closed."""
        with _stopping(self.server):
            asyncio.run(self.server.serve())


@contextlib.contextmanager
def _stopping(server: Server) -> Iterator[None]:
    """Stops ``server`` in order when the process is to end.

    Signals reach the main thread only. Where Django's autoreloader has it, the server runs in a daemon thread: then the
    reloader's exit, for a signal or for changed code, waits for the server.
    """
    if threading.current_thread() is threading.main_thread():
        before = {
            number: signal.signal(number, lambda *_: server.stop())
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return
    done = threading.Event()

    def stop_at_exit() -> None:
        server.stop(min(RELOAD_TIMEOUT, server.config.GRACEFUL_TIMEOUT))
        done.wait(RELOAD_TIMEOUT + 2)

    atexit.register(stop_at_exit)
    try:
        yield
    finally:
        done.set()
        atexit.unregister(stop_at_exit)
