"""Binds, serves, drains and closes: an application on its sockets, from start to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from signal import SIGINT, SIGQUIT, SIGTERM
from typing import Any, ClassVar, NoReturn

from tornado.web import RequestHandler
from tornado.websocket import WebSocketHandler

from tornjango import collecting, comet, green
from tornjango.application import END_TIMEOUT, Application
from tornjango.conf import get_config
from tornjango.http1 import HTTP1Server
from tornjango.status import reporting
from tornjango.watchdog import watching

logger = logging.getLogger("tornjango.server")

#: How long requests may take to finish when the code is reloaded in development, in seconds.
RELOAD_TIMEOUT = 0.5
#: How long a connection that was accepted at the last moment may take to be encrypted, in seconds.
HANDSHAKE = 1.0
#: How often it is looked whether the last connections have closed, in seconds.
LINGER_STEP = 0.05


class Server:
    """Serves one application until it is told to stop; then drains and closes it."""

    def __init__(
        self,
        application: Application,
        sockets: list[socket.socket],
        *,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """``sockets`` listen already, and are closed when it stops; with ``tls`` their connections are encrypted."""
        self.application = application
        self.sockets = sockets
        self.tls = tls
        self.config = get_config()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._grace = self.config.GRACEFUL_TIMEOUT
        #: Whether connections without a request are kept for one more.
        self._lingers = False
        self._streams_end = False
        self._hurry: asyncio.Future[None] | None = None

    async def serve(
        self,
        begun: Callable[[Server], None] | None = None,
        prepare: Callable[[Server], Awaitable[None]] | None = None,
    ) -> None:
        """Returns when ``stop`` was called and everything is closed; ``begun`` is called when requests can come.

        ``prepare`` is awaited before: all that is to be done in this process is done, but taking them on.
        """
        self._loop = asyncio.get_running_loop()
        self._hurry = self._loop.create_future()
        self.application.workers.install(self._loop)
        green.serve(self._loop)
        http = HTTP1Server(self.application, self.config, self.application.refused)
        comet.start()
        if prepare is not None:
            await prepare(self)
        await http.start(self.sockets, self.tls)
        try:
            monitor = self.application.monitor
            with (
                watching(self.config),
                monitor.measuring(http),
                reporting(monitor),
            ):
                if begun is not None:
                    begun(self)
                await self._stop.wait()
        finally:
            await self._drain(http)

    def stop(self, grace: float | None = None, *, streams: bool = True) -> None:
        """Begins an orderly stop, from any thread; a second call is ``end``.

        ``grace`` is how long requests in flight may take, in seconds (``TORNJANGO["GRACEFUL_TIMEOUT"]`` unless given).
        Without ``streams``, answers that are on their way already are broken off at once.
        """
        self._call(self._begin_stop, grace, streams)

    def leave(self) -> None:
        """As ``stop``, where another server has taken over these sockets: no request is lost to a closed connection.

        A connection that is open is kept for one more request, as long as requests in flight may take.
        """
        self._call(self._begin_leave)

    def end(self) -> None:
        """Stops, from any thread, without waiting: requests in flight are answered 503."""
        self._call(self._begin_end)

    def _call(self, step: Callable[..., None], *args: Any) -> None:
        if self._loop is None:  # a signal came before the loop
            step(*args)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(step, *args)

    def _begin_stop(self, grace: float | None, streams: bool) -> None:
        if self._stop.is_set() and not self._lingers:
            self._begin_end()
            return
        if grace is not None:
            self._grace = grace
        self._lingers, self._streams_end = False, not streams
        self._stop.set()

    def _begin_leave(self) -> None:
        if not self._stop.is_set():
            self._lingers = True
            self._stop.set()

    def _begin_end(self) -> None:
        self._lingers, self._grace = False, 0
        self._stop.set()
        if self._hurry is not None and not self._hurry.done():
            self._hurry.set_result(None)

    async def _drain(self, http: HTTP1Server) -> None:
        """No new connections; parked readers are answered; requests in flight finish, or are told to come back."""
        await http.stop(keep_idle=self._lingers)
        self.application.draining = True
        comet.drain()
        self._close_sockets_of_pages()
        if self._streams_end:
            self._end_streams()
        await self._all_answered(self._grace, http)
        if unfinished := self._unfinished():
            if self._grace:
                logger.warning("%d requests did not finish in %g s", len(unfinished), self._grace)
            self._end_all()
            await self._all_answered(END_TIMEOUT, None)
        await http.close_all_connections()
        await comet.stop()
        await self.application.close()

    def _close_sockets_of_pages(self) -> None:
        """WebSockets hear that the server goes away (RFC 6455, 7.4.1); they count as requests until they are closed."""
        for handler in self.application.native.values():
            if isinstance(handler, WebSocketHandler):
                handler.close(1001, "The server is stopping.")
        for answering in self.application.in_flight:
            answering.close_socket()

    def _end_streams(self) -> None:
        for handler in list(self.application.in_flight):
            if handler.is_answering and not handler.heeds_drain:
                handler.stop()

    def _end_all(self) -> None:
        """Those that are being answered are answered 503; those still arriving are not waited for."""
        for handler in list(self.application.in_flight):
            handler.stop()
        for task, native in list(self.application.native.items()):
            _end_native(task, native)
        for arrival in self.application.arriving:
            if not arrival.done():
                arrival.set_result(None)

    async def _all_answered(self, limit: float, http: HTTP1Server | None) -> None:
        """Returns when nothing is unfinished, after ``limit`` seconds, or when ``end`` was called.

        With ``http`` its connections are waited for, too, while they are worth it.
        """
        began = time.monotonic()
        while True:
            unfinished, lingers = self._unfinished(), http is not None and self._keeps(http, began)
            left = began + limit - time.monotonic()
            if left <= 0 or not (unfinished or lingers):
                return
            if lingers:  # that a connection closes is not told
                left = min(left, LINGER_STEP)
            if http is not None and self._hurry is not None:
                if self._hurry.done():
                    return
                unfinished.add(self._hurry)
            await asyncio.wait(unfinished, timeout=left, return_when=asyncio.FIRST_COMPLETED)

    def _keeps(self, http: HTTP1Server, began: float) -> bool:
        """A while at least: connections are still being encrypted that are not counted yet."""
        young = self.tls is not None and time.monotonic() - began < HANDSHAKE
        return self._lingers and (http.connections > 0 or young)

    def _unfinished(self) -> set[asyncio.Future[Any]]:
        answering = {handler.task for handler in self.application.in_flight}
        return answering | set(self.application.native) | self.application.arriving


def _end_native(task: asyncio.Future[None], handler: RequestHandler) -> None:
    """A handler of the user's own, as far as Tornado lets it be ended: 503 where it has not begun to answer."""
    if isinstance(handler, WebSocketHandler) and handler.ws_connection is not None:
        handler.ws_connection._abort()  # it was told, and has not answered
    elif not handler._headers_written:
        handler.clear()
        handler.set_status(503)
        handler.set_header("Retry-After", "1")
        handler.finish("The server is stopping. Please try again in a moment.\n")
    task.cancel()


class RunserverAdapter:
    """What Django's ``runserver`` takes for its WSGI server class: bound when made, then given its application.

    Each run of a command has a subclass with that ``command``, which knows where to listen, and how to serve there.
    """

    daemon_threads = True  # runserver sets it, for a mixin that is not needed here
    command: ClassVar[Any]

    def __init__(
        self, address: tuple[str, int], handler: object = None, ipv6: bool = False
    ) -> None:
        """Raises ``OSError``, which runserver explains."""
        self.sockets: list[socket.socket] = self.command.listen(*address, ipv6=ipv6)
        name = self.sockets[0].getsockname()
        self.server_port = name[1] if isinstance(name, tuple) else 0

    def set_app(self, application: Application | None) -> None:
        self.application = application

    def serve_forever(self) -> None:
        """Returns when everything is closed."""
        self.command.serve(self.application, self.sockets)


def serve(server: Server) -> None:
    """Returns after SIGINT or SIGTERM, or `stopped_at_exit`, when everything is closed."""
    if threading.current_thread() is threading.main_thread():
        _serve_alone(server)
    else:
        _serve_beside(server)


def _serve_alone(server: Server) -> None:
    with on_signals({SIGINT: server.stop, SIGTERM: server.stop, SIGQUIT: server.end}):
        run(server)


def run(
    server: Server,
    begun: Callable[[Server], None] | None = None,
    prepare: Callable[[Server], Awaitable[None]] | None = None,
) -> None:
    """Serves, in a process that has nothing else to do: it ends with the server.

    Python would wait without end for a worker thread whose call does not return.
    """
    with collecting.seldom():
        asyncio.run(_serve_and_go(server, begun, prepare))


async def _serve_and_go(
    server: Server,
    begun: Callable[[Server], None] | None,
    prepare: Callable[[Server], Awaitable[None]] | None,
) -> None:
    await server.serve(begun, prepare)
    if calls := server.application.workers.pool.unfinished:
        _go_at_once(calls, 0)


def _go_at_once(calls: int, code: int) -> NoReturn:
    logger.warning(
        "%d calls in worker threads did not return: the process ends without them", calls
    )
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(code)


@contextlib.contextmanager
def on_signals(handlers: Mapping[signal.Signals, Callable[[], None]]) -> Iterator[None]:
    before = {
        number: signal.signal(number, lambda *_, step=step: step())
        for number, step in handlers.items()
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Beside Django's autoreloader, which has the main thread, and with it all signals


@dataclass
class _Beside:
    server: Server
    done: threading.Event


_beside: _Beside | None = None


def _serve_beside(server: Server) -> None:
    global _beside
    _beside = _Beside(server, threading.Event())
    try:
        asyncio.run(server.serve())
    finally:
        _beside.done.set()


@contextlib.contextmanager
def stopped_at_exit() -> Iterator[None]:
    """Stops the server of the autoreloader's other thread when the process ends or restarts, on the main thread.

    What is on its way to a client is broken off, and other requests have ``RELOAD_TIMEOUT``: who changes code wants to
    see the change.
    """
    code: Any = 0
    try:
        yield
    except SystemExit as exc:
        code = exc.code
        raise
    finally:
        if _beside is not None:
            _stop_beside(_beside, code if isinstance(code, int) else 1)


def _stop_beside(beside: _Beside, code: int) -> None:
    beside.server.stop(min(RELOAD_TIMEOUT, beside.server.config.GRACEFUL_TIMEOUT), streams=False)
    try:
        beside.done.wait(RELOAD_TIMEOUT + END_TIMEOUT + 1)
    except KeyboardInterrupt:
        beside.server.end()
        beside.done.wait(END_TIMEOUT + 1)
    if calls := beside.server.application.workers.pool.unfinished:
        _go_at_once(calls, code)
