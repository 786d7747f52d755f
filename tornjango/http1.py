"""HTTP/1.1 for an application: accepts connections, bounds their number, and closes them.

What a client sends is bounded in size and in time, and a client that leaves is noticed whatever it sent before.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable

from tornado.httputil import HTTPServerConnectionDelegate, RequestStartLine

from tornjango.acceptor import Acceptor
from tornjango.conf import Config
from tornjango.connections import LINGER_SECONDS, Connection, Context
from tornjango.timers import Wheel

#: Connections beyond MAX_CONNECTIONS that are told so; the next ones are dropped without a word.
TURNED_AWAY = 1000

#: Told of the connection, the request line where it could be read, the status, and the size of what was sent.
Refused = Callable[[Context, RequestStartLine | None, int, int], None]


class HTTP1Server:
    """Accepts connections, and has ``application.start_request`` answer what comes on them."""

    def __init__(
        self, application: HTTPServerConnectionDelegate, config: Config, refused: Refused
    ) -> None:
        """On the loop that serves. ``refused`` is told of what is answered without the application."""
        self.application = application
        self.refused = refused
        self.config = config
        self.loop = asyncio.get_running_loop()
        #: Whether every answer is the last of its connection.
        self.stopping = False
        #: Whether connections that come nevertheless are told to come back.
        self.turns_away = False
        #: What a write returns when nobody has to wait.
        self.written: asyncio.Future[None] = self.loop.create_future()
        self.written.set_result(None)
        self.wheel = Wheel(_tick(config))
        self._acceptors: list[Acceptor] = []
        self._open: set[Connection] = set()
        self._emptied: asyncio.Future[None] | None = None

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._open)

    async def start(self, sockets: list[socket.socket], ssl: ssl.SSLContext | None = None) -> None:
        """Accepts on these sockets, which are closed by `stop`; over TLS if there is a context for it."""
        acceptor = Acceptor(lambda: Connection(self), ssl, self.config.HEADER_TIMEOUT)
        self._acceptors.append(acceptor)
        for listening in sockets:
            acceptor.open(listening)

    async def stop(self, *, keep_idle: bool = False) -> None:
        """Accepts no more. Idle connections are closed, or (with ``keep_idle``) kept for one more request; the others
        are closed behind the answer that is being given."""
        self.stopping, self.turns_away = True, not keep_idle
        while self._acceptors:
            await self._acceptors.pop().close()
        if not keep_idle:
            for connection in list(self._open):
                connection.stop()

    async def close_all_connections(self) -> None:
        """Returns when all are closed: a client has ``LINGER_SECONDS`` to take what was sent to it already."""
        for connection in list(self._open):
            connection.close()
        if self._open:
            self._emptied = self.loop.create_future()
            await asyncio.wait({self._emptied}, timeout=LINGER_SECONDS)
        for connection in list(self._open):
            connection.drop()
        self.wheel.close()

    # Its connections'

    def opened(self, connection: Connection) -> None:
        count = len(self._open)
        self._open.add(connection)
        if count < self.config.MAX_CONNECTIONS and not self.turns_away:
            connection.welcome()
        elif count < self.config.MAX_CONNECTIONS + TURNED_AWAY:
            connection.turn_away()
        else:
            connection.drop()

    def closed(self, connection: Connection) -> None:
        self._open.discard(connection)
        self.wheel.drop(connection)
        if not self._open and self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)


def _tick(config: Config) -> float:
    shortest = min(
        config.HEADER_TIMEOUT, config.IDLE_TIMEOUT, config.BODY_TIMEOUT, config.SEND_TIMEOUT
    )
    return min(1.0, shortest / 4)
