"""Accepts connections on listening sockets, and gives each a protocol."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable

from tornjango.sockets import backlog

logger = logging.getLogger("tornjango.http1")

#: Connections accepted in one round of the loop.
_AT_ONCE = 64

#: Connections that may be shaking hands (TLS) at one time; the next ones wait in the system's queue.
_HANDSHAKES = 1000

#: How long nothing is accepted when the system has no more files or memory to give, in seconds. (asyncio's own server
#: logs that a thousand times a second.)
_RETRY_SECONDS = 1.0

#: How long a TLS client may take to say goodbye, in seconds; and how long a stop waits for those that say hello.
_GOODBYE_SECONDS = 5.0
_HELLO_SECONDS = 1.0

#: After how long the system asks whether a client is still there that sends nothing, in seconds.
_QUIET_SECONDS = 60


class Acceptor:
    """Accepts until it is closed. ``make`` is called for each connection, over TLS when hands are shaken."""

    def __init__(
        self,
        make: Callable[[], asyncio.Protocol],
        tls: ssl.SSLContext | None,
        handshake_timeout: float,
    ) -> None:
        self._make = make
        self._tls = tls
        self._handshake_timeout = handshake_timeout
        self._loop = asyncio.get_running_loop()
        self._sockets: list[socket.socket] = []
        #: What was accepted, and is no connection yet.
        self._begun: set[asyncio.Task[None]] = set()
        self._paused = False

    def open(self, listening: socket.socket) -> None:
        _keep_alive(listening)
        listening.setblocking(False)
        listening.listen(backlog())
        self._sockets.append(listening)
        self._loop.add_reader(listening.fileno(), self._accept, listening)

    async def close(self) -> None:
        """Closes the sockets. What was accepted before is a connection when this returns, or had a second for it."""
        self._stop_reading()
        if self._begun:
            await asyncio.wait(self._begun, timeout=_HELLO_SECONDS)
        for task in self._begun:
            task.cancel()
        for listening in self._sockets:
            listening.close()
        self._sockets.clear()

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            if len(self._begun) >= _HANDSHAKES:
                self._pause()
                return
            try:
                accepted, _address = listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:  # the client has left the queue
                continue
            except OSError as exc:
                logger.error("No connection is accepted for %g s: %s", _RETRY_SECONDS, exc)
                self._pause()
                self._loop.call_later(_RETRY_SECONDS, self._resume)
                return
            self._begin(accepted)

    def _begin(self, accepted: socket.socket) -> None:
        accepted.setblocking(False)
        task = self._loop.create_task(self._connect(accepted))
        self._begun.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._begun.discard(task)
        if self._paused and len(self._begun) == _HANDSHAKES // 2:
            self._resume()

    async def _connect(self, accepted: socket.socket) -> None:
        tls = self._tls
        try:
            await self._loop.connect_accepted_socket(
                self._make,
                accepted,
                ssl=tls,
                ssl_handshake_timeout=self._handshake_timeout if tls else None,
                ssl_shutdown_timeout=_GOODBYE_SECONDS if tls else None,
            )
        except OSError as exc:  # it speaks no TLS, or not in time, or has left
            logger.info("A connection was not begun: %s", exc)
            accepted.close()

    def _pause(self) -> None:
        self._paused = True
        self._stop_reading()

    def _stop_reading(self) -> None:
        for listening in self._sockets:
            self._loop.remove_reader(listening.fileno())

    def _resume(self) -> None:
        self._paused = False
        for listening in self._sockets:  # none are left when it is closed
            self._loop.add_reader(listening.fileno(), self._accept, listening)


def _keep_alive(listening: socket.socket) -> None:
    """A client that has lost its network sends nothing; its connections inherit that the system asks for it."""
    if listening.family != socket.AF_UNIX:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _QUIET_SECONDS)
