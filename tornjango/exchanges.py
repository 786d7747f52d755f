"""One request and its answer on a connection: what Tornado calls ``request.connection``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from tornado.httputil import (
    HTTPHeaders,
    HTTPMessageDelegate,
    HTTPOutputError,
    RequestStartLine,
    ResponseStartLine,
)

from tornjango.framing import Head

if TYPE_CHECKING:
    from tornjango.connections import Connection, Context
    from tornjango.streams import TransportStream

logger = logging.getLogger("tornjango.http1")

#: Content up to this size goes to the system together with its head, in bytes.
_TOGETHER = 64 * 1024


class Exchange:
    """Writes the answer to one request, framed as RFC 9112 says, and tells when the client leaves.

    ``write_headers`` and ``write`` return a future that is done when the system, or the transport below its high-water
    mark, has taken the bytes; it fails with ``StreamClosedError`` when the client leaves before.
    """

    __slots__ = (
        "_chunked",
        "_close_callback",
        "_left",
        "begun",
        "body_timeout",
        "bodyless",
        "connection",
        "declared",
        "delegate",
        "expects",
        "finished",
        "last",
        "max_body_size",
        "received",
        "request",
        "switched",
    )

    def __init__(self, connection: Connection, head: Head) -> None:
        self.connection = connection
        self.request = RequestStartLine(head.method, head.target, head.version)
        #: Who takes the request's body; None when it is there.
        self.delegate: HTTPMessageDelegate | None = None
        self.body_timeout: float = connection.server.config.BODY_TIMEOUT
        self.max_body_size: int = connection.server.config.MAX_BODY_SIZE
        #: The body's length where it was declared; and how much of it has come.
        self.declared = head.length
        self.received = 0
        #: Whether the client waits for a word before it sends the body.
        self.expects = head.expects
        #: Whether the connection is closed behind the answer.
        self.last = not head.keep_alive
        self.begun = False
        self.finished = False
        #: Whether the answer is 101: the connection speaks another protocol then.
        self.switched = False
        #: Whether the answer has no content, whatever is written.
        self.bodyless = False
        self._chunked = False
        #: Bytes of content that have to come yet, where their number was declared.
        self._left: int | None = None
        self._close_callback: Callable[[], None] | None = None

    # What Tornado calls HTTPConnection

    @property
    def context(self) -> Context:
        return self.connection.context

    @property
    def stream(self) -> TransportStream | None:
        """The connection as a stream, to ask it things; None when it was handed over."""
        return self.connection.open_stream()

    @property
    def closed(self) -> bool:
        """Whether the client has left, or was left."""
        # After a write that failed, the transport knows before it tells.
        return self.connection.gone or self.connection.transport.is_closing()

    def set_close_callback(self, callback: Callable[[], None] | None) -> None:
        """``callback`` is called once when the client leaves before the answer is finished."""
        self._close_callback = callback

    def set_body_timeout(self, seconds: float) -> None:
        self.body_timeout = seconds

    def set_max_body_size(self, size: int) -> None:
        self.max_body_size = size

    def detach(self) -> TransportStream:
        """Ends HTTP on this connection: the stream has what the client sent after the request, and will send."""
        self._close_callback = None
        self.finished = True
        return self.connection.hand_over()

    def write_headers(
        self,
        start_line: RequestStartLine | ResponseStartLine,
        headers: HTTPHeaders,
        chunk: bytes | None = None,
    ) -> asyncio.Future[None]:
        """Begins the answer. Nothing is sent, and another one may be begun, where it raises.

        Raises ``ValueError`` for a header that would break the head, and ``HTTPOutputError`` for content that is longer
        than its ``Content-Length``.
        """
        assert isinstance(start_line, ResponseStartLine)
        if self._is_over():
            return self.connection.failed_write()
        if self.begun:
            raise RuntimeError(f"The answer to {self.request} has begun already.")
        self._frame(start_line.code, headers)
        if start_line.code != 101:  # its Connection says that the protocol changes
            self._settle_connection(headers)
        head = _head(start_line, headers)
        content = self._framed(chunk) if chunk else b""
        self.begun = True
        self.switched = start_line.code == 101
        if len(content) <= _TOGETHER:
            return self.connection.write(head + content)
        self.connection.write(head)
        return self.connection.write(content)

    def write(self, chunk: bytes) -> asyncio.Future[None]:
        """Raises ``HTTPOutputError``, and breaks off, when this is more than ``Content-Length`` says."""
        if self._is_over():
            return self.connection.failed_write()
        try:
            return self.connection.write(self._framed(chunk))
        except HTTPOutputError:
            self.close()
            raise

    def finish(self) -> None:
        """Ends the answer. Raises ``HTTPOutputError``, and breaks off, when it is shorter than ``Content-Length`` says."""
        if self._is_over():
            return
        if not self.begun:
            self.close()
            raise HTTPOutputError(f"The answer to {self.request} ends before it has begun.")
        if self._left:
            self.close()
            raise HTTPOutputError(f"The answer ends {self._left} bytes before its Content-Length.")
        if self._chunked:
            self.connection.write(b"0\r\n\r\n")
        self.finished = True
        self._close_callback = None
        self.connection.finished(self)

    def close(self) -> None:
        """Breaks off: what the client has not got, it does not get."""
        if not self.finished:
            self.finished = True
            self._close_callback = None
            self.connection.break_off()

    # What the connection tells

    def leave(self) -> None:
        """The client has left: whoever reads the request, or else whoever answers it, is told."""
        self.finished = True
        delegate, callback = self.delegate, self._close_callback
        self.delegate = self._close_callback = None
        try:
            if delegate is not None:
                delegate.on_connection_close()
            elif callback is not None:
                callback()
        except Exception:
            logger.exception("What %s was told of its client's leaving failed", self.request)

    def _is_over(self) -> bool:
        return self.finished or self.connection.gone

    # Framing

    def _frame(self, code: int, headers: HTTPHeaders) -> None:
        """RFC 9112, 6.3, and RFC 9110, 8.6."""
        declared = None
        if "Content-Length" in headers:  # get() raises and catches where it is not
            declared = headers["Content-Length"]
        if declared is not None and not (declared.isascii() and declared.isdigit()):
            raise ValueError(f"Content-Length is {declared!r}, and not a number.")
        if "Transfer-Encoding" in headers:  # the server's to say
            del headers["Transfer-Encoding"]
        self.bodyless = self.request.method == "HEAD" or code in (204, 304) or 100 <= code < 200
        self._chunked, self._left = False, None
        if self.bodyless:
            return
        if declared is not None:
            self._left = int(declared)
        elif self.request.version == "HTTP/1.1":
            self._chunked = True
            headers["Transfer-Encoding"] = "chunked"
        else:  # only the connection's end says where it ends
            self.last = True

    def _settle_connection(self, headers: HTTPHeaders) -> None:
        if "Connection" in headers and "close" in headers["Connection"].lower():
            self.last = True
        self.last = self.last or self.connection.server.stopping
        if self.last:
            headers["Connection"] = "close"
        elif self.request.version == "HTTP/1.0":
            headers["Connection"] = "keep-alive"

    def _framed(self, chunk: bytes) -> bytes:
        if self.bodyless or not chunk:
            return b""
        if self._chunked:
            return b"%x\r\n%b\r\n" % (len(chunk), chunk)
        if self._left is not None:
            if len(chunk) > self._left:
                raise HTTPOutputError("The answer is longer than its Content-Length.")
            self._left -= len(chunk)
        return chunk


def _head(start_line: ResponseStartLine, headers: HTTPHeaders) -> bytes:
    lines = [f"{name}: {value}\r\n" for name, value in headers.get_all()]
    head = f"HTTP/1.1 {start_line.code} {start_line.reason}\r\n{''.join(lines)}\r\n"
    ends = len(lines) + 2
    if head.count("\n") != ends or head.count("\r") != ends or "\0" in head:
        raise ValueError(f"A header of an answer has CR, LF or NUL in it: {head!r}")
    return head.encode("latin-1")
