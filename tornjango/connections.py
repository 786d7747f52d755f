"""One client's HTTP/1.1 connection, as RFC 9112 says: a request, its answer, the next one.

What a client sends is bounded in size and in time, and a client that leaves is noticed whatever it sent before.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import select
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

from tornado.httputil import (
    HTTPInputError,
    format_timestamp,
)
from tornado.iostream import StreamClosedError

from tornjango.exchanges import Exchange
from tornjango.framing import BROKEN, Body, Head, Refusal, is_broken, read_head
from tornjango.streams import TransportStream

if TYPE_CHECKING:
    from tornjango.http1 import HTTP1Server

logger = logging.getLogger("tornjango.http1")

#: Bytes a client may send ahead of what is read of them, before it is made to wait.
READ_AHEAD = 64 * 1024

#: What a client may still send when its last answer is out: closing on unread data would reset the answer away
#: (RFC 9112, 9.6). In bytes, and in seconds.
LINGER_BYTES = 4 * 1024 * 1024
LINGER_SECONDS = 5.0

#: How often the server looks whether a client is still there whose bytes it does not read, in seconds.
LOOK_SECONDS = 5.0

#: Told by poll() behind whatever is unread; elsewhere than on Linux POLLHUP says it.
_HUNG_UP = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)


class State(enum.Enum):
    """Where a connection is."""

    WAITING = "for a request, or the rest of its head"
    BEGUN = "the head is read, and whoever takes the request is told"
    READING = "the request's body"
    ANSWERING = "the request is whole"
    SWITCHED = "to another protocol, which has not begun yet"
    HANDED = "over to a stream"
    LINGERING = "the last answer is out; what still comes is dropped"
    CLOSING = "the last bytes are on their way"
    CLOSED = "and gone"


_IN_FLIGHT = {State.BEGUN, State.READING, State.ANSWERING, State.SWITCHED}
#: Where time is given as long as the client takes what was sent.
_SENT_FIRST = {State.WAITING, State.LINGERING, State.CLOSING}


class Context:
    """Who is on the other side: one for each connection."""

    __slots__ = ("address", "protocol", "remote_ip", "server_address")

    def __init__(self, transport: asyncio.Transport) -> None:
        info = transport.get_extra_info
        peer, own = info("peername"), info("sockname")
        self.address = peer
        #: Empty for a Unix socket.
        self.remote_ip = str(peer[0]) if isinstance(peer, tuple) else ""
        self.protocol = "https" if info("sslcontext") is not None else "http"
        #: Host and port that were connected to.
        self.server_address = (
            (str(own[0]), str(own[1])) if isinstance(own, tuple) else ("unix", "0")
        )

    def __str__(self) -> str:
        return self.remote_ip or "a Unix socket"


class _Gone(asyncio.Transport):
    """Stands where a transport was; a closed connection would otherwise be a cycle with it."""

    def is_closing(self) -> bool:
        return True

    def write(self, data: Any) -> None:
        pass

    def close(self) -> None:
        pass

    abort = resume_reading = pause_reading = close


_GONE = _Gone()


class Connection(asyncio.Protocol):
    """One client: reads its requests, and has the server's delegate answer them."""

    __slots__ = (
        "_at",
        "_body",
        "_dropped",
        "_given",
        "_head_begun",
        "_held",
        "_limit",
        "_reading_paused",
        "_stuck",
        "_unread",
        "_writers",
        "_writing_paused",
        "context",
        "deadline",
        "exchange",
        "gone",
        "server",
        "slot",
        "state",
        "stream",
        "transport",
    )

    context: Context

    def __init__(self, server: HTTP1Server) -> None:
        self.server = server
        self.transport: asyncio.Transport = _GONE
        self.state = State.WAITING
        self.exchange: Exchange | None = None
        self.stream: TransportStream | None = None
        #: Whether nothing can be written any more.
        self.gone = False
        # The wheel's.
        self.deadline = 0.0
        self.slot = 0
        #: When the state has lasted too long; the wheel may look before.
        self._limit = math.inf
        #: The body that is being read.
        self._body: Body | None = None
        # What has arrived, and how much of it is used.
        self._unread = b""
        self._at = 0
        self._head_begun = False
        #: Whether the delegate asked to wait before it is told more.
        self._held = False
        self._reading_paused = False
        #: Bytes that came after the last answer.
        self._dropped = 0
        #: Whether the transport is above its high-water mark, and who waits for it.
        self._writing_paused = False
        self._writers: list[asyncio.Future[None]] | None = None
        #: Bytes given to the transport; and how many of them the client had taken at what time.
        self._given = 0
        self._stuck: tuple[int, float] | None = None

    # The transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.context = Context(self.transport)
        self.server.opened(self)

    def welcome(self) -> None:
        self._within(self.server.config.IDLE_TIMEOUT)

    def turn_away(self) -> None:
        """There are as many connections as there may be."""
        self._refuse(Refusal(503, "The server has too many connections. Please try again."))

    def drop(self) -> None:
        self.gone = True
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.state is State.HANDED:
            assert self.stream is not None
            self.stream.feed(data)
        elif self.state is State.LINGERING:
            self._dropped += len(data)
            if self._dropped > LINGER_BYTES:
                self.drop()
        elif self.state is not State.CLOSING and not self.gone:
            self._unread = self._unread[self._at :] + data if self._unread else data
            self._at = 0
            self.advance()

    def eof_received(self) -> bool:
        """A client that closes its side while it is answered has left: most that do so have, and nobody could tell."""
        if self.state is State.HANDED:
            assert self.stream is not None
            self.stream.feed_end()
        elif self.state in _IN_FLIGHT:
            self._leave()
            self.transport.abort()
        elif not self.gone:
            self._shut()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave(exc)
        self.transport = _GONE
        self._body = self.stream = None
        self.server.closed(self)

    def pause_writing(self) -> None:
        self._writing_paused = True
        now = self.server.loop.time()
        self._is_stuck(now)
        self._look_within(now, self.server.config.SEND_TIMEOUT)
        if self.stream is not None:
            self.stream.block()

    def resume_writing(self) -> None:
        self._writing_paused = False
        writers, self._writers = self._writers, None
        for writer in writers or ():
            if not writer.done():
                writer.set_result(None)
        if self.stream is not None:
            self.stream.unblock()
        if self.state is State.WAITING and self._unread:
            self.advance()

    # Reading

    def advance(self) -> None:
        """Takes what has arrived, as far as it may be taken now."""
        while self._step():
            pass
        self._unread = self._unread[self._at :]
        self._at = 0
        if not self.gone and self.state is not State.HANDED:
            self._regulate()

    def _step(self) -> bool:
        """Whether there may be more to do."""
        if self._held or self.gone:
            return False
        if self.state is State.WAITING:
            return not self._writing_paused and self._take_head()
        if self.state is State.BEGUN:
            return self._take_up()
        return self.state is State.READING and self._take_body()

    def _regulate(self) -> None:
        """Makes a client wait that sends faster than it is read."""
        ahead = self.state in _IN_FLIGHT and len(self._unread) > READ_AHEAD
        if ahead and not self._reading_paused:
            self._reading_paused = True
            self.transport.pause_reading()
            self._look_within(self.server.loop.time(), LOOK_SECONDS)
        elif self._reading_paused and not ahead:
            self._resume_reading()

    def _resume_reading(self) -> None:
        self._reading_paused = False
        self.transport.resume_reading()

    def _take_head(self) -> bool:
        unread, limit = self._unread, self.server.config.MAX_HEADER_SIZE
        while unread.startswith(b"\r\n", self._at):  # RFC 9112, 2.2
            self._at += 2
        begin = self._at
        end = unread.find(b"\r\n\r\n", begin, begin + limit + 4)
        if end < 0:
            self._await_head(unread[begin : begin + limit + 4], limit)
            return False
        self._at = end + 4
        try:
            head = read_head(unread[begin : self._at], limit)
        except Refusal as refusal:
            self._refuse(refusal)
            return False
        self._begin(head)
        return True

    def _await_head(self, part: bytes, limit: int) -> None:
        if is_broken(part[: limit + 3]):
            self._refuse(BROKEN)
        elif len(part) > limit + 3:  # its end may not come within the limit any more
            reason = f"The request line and headers are longer than {limit} bytes."
            self._refuse(Refusal(431, reason))
        elif part.strip(b"\r") and not self._head_begun:
            self._head_begun = True
            self._within(self.server.config.HEADER_TIMEOUT)

    def _begin(self, head: Head) -> None:
        self._head_begun = False
        self._limit = math.inf
        self._body = head.body
        self.state = State.BEGUN
        exchange = self.exchange = Exchange(self, head)
        delegate = self.server.application.start_request(self, exchange)  # type: ignore[arg-type]
        exchange.delegate = delegate
        self._tell(delegate.headers_received, exchange.request, head.headers)

    def _take_up(self) -> bool:
        """Whoever takes the request is ready for its body."""
        exchange = self.exchange
        assert exchange is not None
        if self._body is None:
            self._end_request(exchange)
            return False
        if exchange.declared is not None and exchange.declared > exchange.max_body_size:
            self._refuse_size(exchange)
            return False
        self.state = State.READING
        self._within(exchange.body_timeout)
        if exchange.expects and not exchange.begun and self._at == len(self._unread):
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def _take_body(self) -> bool:
        exchange, body = self.exchange, self._body
        assert exchange is not None
        assert body is not None
        before = self._at
        try:
            content, self._at = body.decode(self._unread, before)
        except Refusal as refusal:
            self._refuse(refusal)
            return False
        if content:
            self._give(exchange, content)
        if self.state is not State.READING or self._held:
            return False
        if body.done:
            self._end_request(exchange)
        elif before < self._at < len(self._unread):  # the others' turn
            self.server.loop.call_soon(self.advance)
        return False

    def _give(self, exchange: Exchange, content: bytes) -> None:
        exchange.received += len(content)
        if exchange.received > exchange.max_body_size:
            self._refuse_size(exchange)
        elif exchange.delegate is not None:
            self._tell(exchange.delegate.data_received, content)

    def _refuse_size(self, exchange: Exchange) -> None:
        size = exchange.max_body_size
        self._refuse(Refusal(413, f"The request body is larger than {size} bytes."))

    def _end_request(self, exchange: Exchange) -> None:
        self.state = State.ANSWERING
        self._body = None
        self._limit = math.inf
        delegate, exchange.delegate = exchange.delegate, None
        if delegate is not None:
            self._tell(delegate.finish)

    def _tell(self, tell: Callable[..., Awaitable[None] | None], *arguments: Any) -> None:
        """Whatever the delegate raises ends its connection, and not the server."""
        try:
            wait = tell(*arguments)
        except HTTPInputError as exc:
            self._refuse(Refusal(400, f"Bad request: {exc}"))
        except Exception:
            logger.exception("A request from %s failed", self.context)
            self.break_off()
        else:
            if wait is not None:
                self._held = True
                asyncio.ensure_future(wait).add_done_callback(self._release)

    def _release(self, held: asyncio.Future[Any]) -> None:
        self._held = False
        if held.cancelled():
            self.break_off()
        elif self.gone:
            held.exception()  # nobody is there to be told
        else:
            self._tell(lambda: held.result() and None)
            self.advance()

    # Writing, for exchanges and streams

    def write(self, data: bytes) -> asyncio.Future[None]:
        if self.gone or self.transport.is_closing():
            return self.failed_write()
        if data:
            self._given += len(data)
            self.transport.write(data)
        if not self._writing_paused:
            return self.server.written
        writer = self.server.loop.create_future()
        if self._writers is None:
            self._writers = []
        self._writers.append(writer)
        return writer

    def failed_write(self) -> asyncio.Future[None]:
        return _fail(self.server.loop.create_future())

    def finished(self, exchange: Exchange) -> None:
        """The answer to ``exchange`` is given to the transport."""
        if exchange.switched:
            self.state = State.SWITCHED
            self._within(self.server.config.IDLE_TIMEOUT)
            return
        whole = self.state is State.ANSWERING
        self.exchange = None
        delegate, exchange.delegate = exchange.delegate, None
        if delegate is not None:
            self.server.loop.call_soon(delegate.on_connection_close)
        if exchange.last or not whole:
            self._end()
            return
        self.state = State.WAITING
        self._within(self.server.config.IDLE_TIMEOUT)
        if self._at < len(self._unread):
            self.server.loop.call_soon(self.advance)

    def open_stream(self) -> TransportStream | None:
        """The connection as a stream, to ask it things; None when it was handed over."""
        if self.state is State.HANDED:
            return None
        if self.stream is None:
            self.stream = TransportStream(self.transport, self.write)
            if self.gone:
                self.stream.close()
        return self.stream

    def hand_over(self) -> TransportStream:
        """Ends HTTP: the stream has what arrived, and what will. Raises ``RuntimeError`` the second time."""
        stream = self.open_stream()
        if stream is None:
            raise RuntimeError("The connection was handed over before.")
        if self.gone:
            return stream
        self.state = State.HANDED
        self._limit = math.inf
        self.exchange = self._body = None
        if self._reading_paused:
            self._resume_reading()
        if rest := self._unread[self._at :]:
            stream.feed(rest)
        self._unread, self._at = b"", 0
        return stream

    # Its end

    def stop(self) -> None:
        """Closes it if nothing is under way on it."""
        if self.state is State.WAITING and not self._unread:
            self._shut()

    def close(self) -> None:
        """Closes it. What is given to the transport is sent, as long as the client takes it."""
        if self.state is State.HANDED and self.stream is not None:
            self.stream.close()
        elif self.state in _IN_FLIGHT:
            self.break_off()
        elif self.state is not State.CLOSING and not self.gone:
            self._shut()

    def break_off(self) -> None:
        """Closes it at once, and drops what was not sent."""
        self.gone = True
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            self.server.loop.call_soon(exchange.leave)
        self.transport.abort()

    def _refuse(self, refusal: Refusal) -> None:
        """Answers what is not taken, and closes."""
        level = logging.INFO if refusal.status == 408 else logging.WARNING
        what = "Connection" if refusal.status == 503 else "Bad request"
        logger.log(level, "%s from %s: %s", what, self.context, refusal.reason)
        exchange, self.exchange = self.exchange, None
        if exchange is None or not exchange.begun:
            line = exchange.request if exchange is not None else None
            content = b"" if line is not None and line.method == "HEAD" else refusal.content
            self.write(_plain_head(refusal) + content)
            self.server.refused(self.context, line, refusal.status, len(content))
        if exchange is not None:
            exchange.leave()
        self._end()

    def _end(self) -> None:
        """Closes it when the client has the last answer, and has closed its side."""
        self._unread, self._at = b"", 0
        self._body = None
        if not self.transport.can_write_eof():  # TLS lingers by itself
            self._shut()
            return
        self.state = State.LINGERING
        self._within(LINGER_SECONDS)
        try:
            self.transport.write_eof()
        except OSError:  # the client has reset the connection
            self.drop()
        else:
            if self._reading_paused:
                self._resume_reading()

    def _shut(self) -> None:
        self.state = State.CLOSING
        self._limit = math.inf
        self._look_within(self.server.loop.time(), self.server.config.SEND_TIMEOUT)
        self.transport.close()

    def _leave(self, reason: Exception | None = None) -> None:
        """The client has left."""
        self.gone = True
        self.state = State.CLOSED
        writers, self._writers = self._writers, None
        for writer in writers or ():
            if not writer.done():
                _fail(writer)
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.leave()
        if self.stream is not None:
            self.stream.feed_end(reason)

    # Time

    def _within(self, seconds: float) -> None:
        """How long the state may last from now on."""
        self._limit = self.server.loop.time() + seconds
        self.server.wheel.set(self, self._limit)

    def _look_within(self, now: float, seconds: float) -> None:
        self.server.wheel.set(self, min(now + seconds, self._limit))

    def look(self, now: float) -> None:
        if self.gone:
            return
        sending = self.transport.get_write_buffer_size() > 0
        if self._is_stuck(now) or (self._reading_paused and self._has_hung_up()):
            self._leave()
            self.transport.abort()
        elif now < self._limit or (sending and self.state in _SENT_FIRST):
            soon = self._reading_paused or self._writing_paused
            seconds = self.server.config.SEND_TIMEOUT
            self._look_within(now, min(seconds, LOOK_SECONDS) if soon else seconds)
        else:
            self._expire()

    def _expire(self) -> None:
        if self.state is State.WAITING and self._head_begun:
            self._refuse(Refusal(408, "The request's headers did not come in time."))
        elif self.state in (State.READING, State.BEGUN):
            self._refuse(Refusal(408, "The request's body did not come in time."))
        elif self.state is State.WAITING:
            self._shut()
        else:
            self.drop()

    def _is_stuck(self, now: float) -> bool:
        """Whether the client has taken nothing for as long as that may last."""
        waiting = self.transport.get_write_buffer_size()
        taken = self._given - waiting
        if not waiting:
            self._stuck = None
        elif self._stuck is None or self._stuck[0] != taken:
            self._stuck = taken, now
        else:
            return now - self._stuck[1] >= self.server.config.SEND_TIMEOUT
        return False

    def _has_hung_up(self) -> bool:
        """Whether the client has closed or reset the connection behind bytes that are not read yet."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), _HUNG_UP)
        return bool(poll.poll(0))


def _fail(writer: asyncio.Future[None]) -> asyncio.Future[None]:
    writer.set_exception(StreamClosedError())
    writer.exception()  # whoever does not ask need not know
    return writer


def _plain_head(refusal: Refusal) -> bytes:
    retry = "Retry-After: 1\r\n" if refusal.status == 503 else ""
    head = (
        f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}\r\n"
        f"Date: {format_timestamp(time.time())}\r\n"
        "Content-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(refusal.content)}\r\n"
        f"{retry}Connection: close\r\n\r\n"
    )
    return head.encode()
