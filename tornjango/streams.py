"""A connection as Tornado's handlers know it: an ``IOStream`` over an asyncio transport."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Any

from tornado.iostream import BaseIOStream, UnsatisfiableReadError

logger = logging.getLogger("tornjango.http1")

#: What may wait for a reader before the client is made to wait, in bytes.
READ_AHEAD = 64 * 1024


class TransportStream(BaseIOStream):
    """What `tornado.iostream.IOStream` promises, where a protocol gives it what arrives.

    A write's future is done when the transport has taken it, and was below its high-water mark before. ``close`` lets
    the transport send what it has taken.
    """

    def __init__(self, transport: asyncio.Transport, send: Callable[[bytes], object]) -> None:
        super().__init__()
        self._transport = transport
        self._send = send
        self._arrived = bytearray()
        self._ended = False
        self._blocked = False
        self._reason: Exception | None = None

    @property
    def socket(self) -> Any:
        """The socket, to ask it things; over TLS the object that knows the client's certificate."""
        info = self._transport.get_extra_info
        return info("ssl_object") or info("socket")

    # What the protocol tells

    def feed(self, data: bytes) -> None:
        self._arrived += data
        self._read()
        if len(self._arrived) > READ_AHEAD:
            self._transport.pause_reading()

    def feed_end(self, reason: Exception | None = None) -> None:
        """Nothing more comes; what has come can still be read."""
        self._ended = True
        self._reason = reason
        self._read()
        while self._arrived and not self.closed() and self._read_to_buffer():
            pass
        if not self.closed():
            self.close(exc_info=reason or False)

    def block(self) -> None:
        """The transport is above its high-water mark."""
        self._blocked = True

    def unblock(self) -> None:
        self._blocked = False
        self._handle_write()

    def _read(self) -> None:
        if self._read_future is None:
            return
        try:
            self._handle_read()
        except UnsatisfiableReadError as exc:
            logger.info("A connection is closed: %s", exc)
            self.close(exc_info=exc)

    # What BaseIOStream asks

    def fileno(self) -> int:
        number: int = self._transport.get_extra_info("socket").fileno()
        return number

    def close_fd(self) -> None:
        self._transport.close()

    def write_to_fd(self, data: memoryview) -> int:
        try:
            if self._blocked:
                return 0
            self._send(bytes(data))
            return len(data)
        finally:
            del data  # BaseIOStream releases it

    def read_from_fd(self, buf: bytearray | memoryview) -> int | None:
        try:
            if not self._arrived:
                return 0 if self._ended else None
            count = min(len(buf), len(self._arrived))
            buf[:count] = self._arrived[:count]
            del self._arrived[:count]
        finally:
            del buf  # BaseIOStream releases it
        if len(self._arrived) <= READ_AHEAD and not self._transport.is_closing():
            self._transport.resume_reading()
        return count

    def get_fd_error(self) -> Exception | None:
        return self._reason

    def set_nodelay(self, value: bool) -> None:
        connected = self._transport.get_extra_info("socket")
        if connected is not None and connected.family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):  # the client may have left
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, int(value))

    def _add_io_state(self, state: int) -> None:
        """The transport watches the socket, and the protocol tells."""
