"""WebSockets for Django's views (RFC 6455): a view answers `accept`, and the talk begins when the middleware is done.

    async def echo(request):
        async def talk(socket):
            async for message in socket:
                await socket.send(message)

        return websockets.accept(request, talk)

The request is Django's, with its user, session and host check. While the socket is open no thread and no database
connection is held; what middleware puts back after the view (a language that was only lent, say) is back. Frames are
Tornado's. What is stricter here: a frame without a mask is refused (5.1), frames come at a bounded rate, compressed
messages are independent of each other (RFC 7692, 7.1.1), so that an idle socket keeps no window of 300 KiB and a crowd's
message is compressed once, and a client that sends too much still hears why it is sent away.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from django.http import HttpRequest, HttpResponse
from django.middleware.csrf import CsrfViewMiddleware
from tornado.httputil import HTTPHeaders
from tornado.iostream import StreamClosedError
from tornado.websocket import (
    WebSocketClosedError,
    WebSocketProtocol13,
    _PerMessageDeflateDecompressor,
    _WebSocketParams,
)

from tornjango.rates import Bucket

__all__ = ["WebSocket", "WebSocketClosedError", "WebSocketResponse", "accept"]

logger = logging.getLogger("tornjango.websockets")

VERSION = "13"

#: Text this short is not worth compressing, in bytes.
COMPRESSED_FROM = 1024
_LEVEL = 4
# A crowd is sent the same in one go.
_REMEMBERED = 8

#: Frames that may come at once after a pause, for each that may come in a second.
_BURST = 4

#: Read at once of a message that is too large, in bytes.
_DROPPED_AT_ONCE = 64 * 1024

#: The length of a frame's mask, in bytes.
_MASK = 4

GOING_AWAY, PROTOCOL_ERROR, BAD_DATA, TOO_BIG, FAILED = 1001, 1002, 1007, 1009, 1011

Talk = Callable[["WebSocket"], Awaitable[None]]


class Options(NamedTuple):
    """``max_message`` is in bytes, after decompression; ``ping`` in seconds, with 0 for none."""

    max_message: int
    frames_per_second: float
    ping: float
    subprotocol: str | None


class WebSocketResponse(HttpResponse):
    """101: tornjango's server opens the socket, and has ``talk(socket)`` run until it ends. Made by `accept`."""

    def __init__(self, talk: Talk, options: Options) -> None:
        super().__init__(status=101)
        self.talk = talk
        self.options = options


def accept(
    request: HttpRequest,
    talk: Talk,
    *,
    max_message: int = 1024 * 1024,
    frames_per_second: float = 100,
    ping: float = 20,
    subprotocols: Collection[str] = (),
) -> HttpResponse:
    """What a view answers to open a WebSocket; or a plain refusal, where the request does not ask for one, or may not.

    ``talk`` is cancelled when the client leaves, unless it waits for the next message: then its loop ends. When it returns
    the socket is closed. ``ping`` is how often the client is asked whether it is still there, which has as long to answer.
    A server that stops closes the socket with 1001.

    Refusals (RFC 6455, 4.2.2): 405, 400 or 426 for what is no handshake, 403 for a page of another site (10.2: browsers
    let any page open a WebSocket anywhere, with the user's cookies), which is what Django's CSRF middleware takes for
    one. A request without ``Origin`` is no browser's. 501 under a server that cannot do it.
    """
    if not hasattr(request, "tornado_request"):
        return _refuse(501, "This server speaks no WebSocket: serve the project with tornjango.")
    refusal = _refusal(request)
    if refusal is not None:
        return refusal
    offered = _words(request.headers.get("Sec-WebSocket-Protocol", ""))
    subprotocol = next((name for name in offered if name in subprotocols), None)
    options = Options(max_message, frames_per_second, ping, subprotocol)
    return WebSocketResponse(talk, options)


def _refusal(request: HttpRequest) -> HttpResponse | None:
    headers = request.headers
    if request.method != "GET":
        return _refuse(405, "A WebSocket is opened by GET.", Allow="GET")
    if "websocket" not in _words(headers.get("Upgrade", "").lower()):
        return _refuse_version("This is a WebSocket: ask for an upgrade.", Upgrade="websocket")
    if "upgrade" not in _words(headers.get("Connection", "").lower()):
        return _refuse(400, 'The handshake lacks "Connection: Upgrade". Does a proxy drop it?')
    if headers.get("Sec-WebSocket-Version") != VERSION:
        return _refuse_version(f"The WebSocket version spoken here is {VERSION}.")
    if not _is_key(headers.get("Sec-WebSocket-Key", "")):
        return _refuse(400, "Sec-WebSocket-Key is not 16 bytes in base64.")
    if request.META.get("SERVER_PROTOCOL") == "HTTP/1.0":
        return _refuse(400, "A WebSocket takes HTTP/1.1.")
    # Made anew: it remembers settings.
    csrf: Any = CsrfViewMiddleware(_never)
    if "Origin" in headers and not csrf._origin_verified(request):
        return _refuse(
            403,
            f"A page of {headers['Origin']!r} may not open a WebSocket here: it is neither this host's "
            "nor one of CSRF_TRUSTED_ORIGINS.",
        )
    return None


def _never(request: HttpRequest) -> HttpResponse:
    raise AssertionError("It is asked about origins, and answers no request.")


def _refuse(status: int, reason: str, **headers: str) -> HttpResponse:
    plain = "text/plain; charset=utf-8"
    return HttpResponse(f"{reason}\n", status=status, content_type=plain, headers=headers)


def _refuse_version(reason: str, **headers: str) -> HttpResponse:
    """RFC 9110, 15.5.22, and RFC 6455, 4.4."""
    response = _refuse(426, reason, **headers)
    response["Upgrade"], response["Connection"] = "websocket", "Upgrade"
    response["Sec-WebSocket-Version"] = VERSION
    return response


def _words(header: str) -> list[str]:
    return [word.strip() for word in header.split(",") if word.strip()]


def _is_key(key: str) -> bool:
    try:
        return len(base64.b64decode(key.strip(), validate=True)) == 16
    except (binascii.Error, ValueError):
        return False


class WebSocket:
    """One client's socket. ``async for`` gives its messages, ``str`` for text and ``bytes``, until it is closed.

    The next message is read when the one before has been dealt with: a client that sends more is made to wait.
    """

    __slots__ = (
        "__weakref__",
        "_arrival",
        "_bucket",
        "_handled",
        "_message",
        "_protocol",
        "_task",
        "ended",
        "heard",
        "options",
        "received",
        "request",
        "sent",
        "waiting",
    )

    def __init__(self, request: HttpRequest, options: Options) -> None:
        self.request = request
        self.options = options
        #: Bytes of messages that were given to `send`, and the system has not taken yet.
        self.waiting = 0
        #: Whether anything came from the client since this was last set to False.
        self.heard = False
        self.sent = 0
        self._bucket = Bucket(options.frames_per_second, options.frames_per_second * _BURST)
        self._message: str | bytes | None = None
        self._handled: asyncio.Future[None] | None = None
        self._arrival: asyncio.Future[None] | None = None
        self._protocol = _Protocol(self, options)
        #: Done when the connection is closed.
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # For a conversation

    @property
    def closing(self) -> bool:
        """Whether one side has said that it closes, or the connection is gone."""
        return self.ended.done() or self._protocol.is_closing()

    @property
    def busy(self) -> bool:
        """Whether a message of the client's is being dealt with, so that nothing more is read."""
        return self._handled is not None

    @property
    def close_code(self) -> int | None:
        """What the client has closed with (RFC 6455, 7.4); None if it has not, or without a reason."""
        return self._protocol.close_code

    async def __aiter__(self) -> AsyncIterator[str | bytes]:
        while (message := await self._next()) is not None:
            yield message

    async def _next(self) -> str | bytes | None:
        self._settle()
        if self._message is None and not self.closing:
            self._arrival = asyncio.get_running_loop().create_future()
            try:
                await self._arrival
            finally:
                self._arrival = None
        message, self._message = self._message, None
        return None if self.closing else message

    async def send(self, message: str | bytes, *, binary: bool = False) -> None:
        """Sends text, or with ``binary`` bytes as such; returns when the system has taken it, which bounds what waits.

        Raises WebSocketClosedError where the socket is closing, or is closed meanwhile.
        """
        data = message.encode() if isinstance(message, str) else message
        if self.closing:
            raise WebSocketClosedError
        size = len(data)
        try:
            written = self._protocol.write(data, binary=binary)
            self.sent += size
            self.waiting += size
            try:
                # Shielded, for Tornado asks a write's future for its exception, which one that is cancelled raises.
                await asyncio.shield(written)
            finally:
                self.waiting -= size
        except StreamClosedError as exc:
            raise WebSocketClosedError from exc

    def ping(self) -> None:
        """Asks whether the client is still there; its answer sets ``heard``."""
        if not self.closing:
            self._protocol.write_ping(b"")

    def close(self, code: int = 1000, reason: str | None = None) -> None:
        """Begins to close: the client has five seconds to agree. Harmless a second time."""
        if not self.closing:
            self._protocol.say_goodbye(code, reason)
        self._wake()

    def abort(self) -> None:
        """Closes at once."""
        self._protocol.abort()
        self._task.cancel()  # it may wait for the time to read on
        self._wake()

    # For the server

    def open(self, connection: Any) -> None:
        """Takes over a connection whose 101 is written."""
        self._protocol.stream = connection.detach()
        self._protocol.start_pinging()
        self._task = asyncio.ensure_future(self._receive())

    def shake_hands(self, headers: HTTPHeaders) -> None:
        """Adds what makes an answer a handshake (RFC 6455, 4.2.2), and takes away what describes content."""
        for name in ("Content-Type", "Content-Length", "Content-Encoding"):
            headers.pop(name, None)
        asked = self.request.headers
        headers["Upgrade"], headers["Connection"] = "websocket", "Upgrade"
        headers["Sec-WebSocket-Accept"] = WebSocketProtocol13.compute_accept_value(
            asked["Sec-WebSocket-Key"].strip()
        )
        if self.options.subprotocol is not None:
            headers["Sec-WebSocket-Protocol"] = self.options.subprotocol
        window = _window(asked.get("Sec-WebSocket-Extensions", ""))
        if window is not None:
            self._protocol.compress(window)
            narrow = "" if window == zlib.MAX_WBITS else f"; server_max_window_bits={window}"
            headers["Sec-WebSocket-Extensions"] = (
                f"permessage-deflate; server_no_context_takeover; client_no_context_takeover{narrow}"
            )

    @property
    def expected(self) -> bool:
        """Whether the conversation waits for a message, and so hears of the socket's end."""
        return self._arrival is not None

    async def _receive(self) -> None:
        try:
            await self._protocol._receive_frame_loop()
        except Exception:
            logger.exception("Reading a WebSocket's frames failed")
        finally:
            self._protocol.let_go()
            self.ended.set_result(None)
            self._wake()

    async def pace(self) -> None:
        """Returns when the client's next frame may be read."""
        if seconds := self._bucket.draw():
            await asyncio.sleep(seconds)

    def _settle(self) -> None:
        handled, self._handled = self._handled, None
        if handled is not None and not handled.done():
            handled.set_result(None)

    def _wake(self) -> None:
        """At its end: whoever waits for a message hears of it, and the client's close frame can be read."""
        self._settle()
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    # What Tornado's protocol calls

    def on_message(self, message: str | bytes) -> Awaitable[None] | None:
        self.heard = True
        if self.closing:
            return None
        self._message = message
        self._handled = asyncio.get_running_loop().create_future()
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)
        return self._handled

    def on_ping(self, data: bytes) -> None:
        self.heard = True

    on_pong = on_ping

    def on_ws_connection_close(
        self, close_code: int | None = None, close_reason: str | None = None
    ) -> None:
        """The frames have ended, and `_receive` goes on."""

    def log_exception(self, *error: Any) -> None:
        logger.error("A WebSocket's frame could not be dealt with", exc_info=error)


class _TooBig(Exception):
    """A message of the client's is larger than it may be; it was told so."""


class _Violation(Exception):
    """The client does what RFC 6455 forbids."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class _Protocol(WebSocketProtocol13):
    """Tornado's, with what RFC 6455 asks of a server beyond it."""

    def __init__(self, socket: WebSocket, options: Options) -> None:
        params = _WebSocketParams(ping_interval=options.ping, max_message_size=options.max_message)
        super().__init__(socket, False, params)
        self._socket: WebSocket | None = socket
        self._window: int | None = None
        self._frame_begins = self._length_follows = False
        #: Bytes of the frame that were not read yet.
        self._left = 0
        self._is_too_big = False

    def compress(self, window: int) -> None:
        """Messages may be compressed from now on; each by itself."""
        self._window = window
        self._decompressor = _PerMessageDeflateDecompressor(
            persistent=False, max_wbits=None, max_message_size=self.params.max_message_size
        )

    def write(self, data: bytes, *, binary: bool) -> asyncio.Future[None]:
        """As ``write_message``, which compresses short messages, too, and makes a task for each."""
        opcode, flags = 0x2 if binary else 0x1, 0
        if self._window is not None and len(data) >= COMPRESSED_FROM:
            data, flags = _deflated(data, self._window), self.RSV1
        return self._write_frame(True, opcode, data, flags)

    async def _receive_frame(self) -> None:
        if self._socket is not None:
            await self._socket.pace()
        self._frame_begins = True
        try:
            await super()._receive_frame()
        except _TooBig:
            await self._drop_frame()
        except _Violation as violation:
            self._break_off(violation.code, violation.reason)
        except (zlib.error, UnicodeDecodeError) as exc:
            self._break_off(BAD_DATA, f"Not what it should be: {exc}"[:100])

    def _break_off(self, code: int, reason: str) -> None:
        self.close(code, reason)
        self._abort()

    async def _drop_frame(self) -> None:
        """Reads the rest of a frame: closing on unread data would reset the close frame away, and the client's is behind."""
        while self._left > 0:
            most = min(self._left, _DROPPED_AT_ONCE)
            self._left -= len(await self.stream.read_bytes(most, partial=True))

    async def _read_bytes(self, n: int) -> bytes:
        data = await super()._read_bytes(n)
        if self._frame_begins:
            self._frame_begins = False
            if not data[1] & 0x80:  # RFC 6455, 5.1
                raise _Violation(PROTOCOL_ERROR, "A client's frames are masked.")
            length = data[1] & 0x7F
            self._length_follows = length >= 126
            self._left = _MASK + length
        elif self._length_follows:
            self._length_follows = False
            self._left = _MASK + int.from_bytes(data)
        else:
            self._left -= n
        return data

    def say_goodbye(self, code: int, reason: str | None) -> None:
        """The conversation closes."""
        super().close(code, reason)

    def abort(self) -> None:
        self._is_too_big = False
        self._abort()

    def let_go(self) -> None:
        """Closes at once, and unties the knot with the socket."""
        self.abort()
        self._socket = None
        self.handler = None  # type: ignore[assignment]

    def close(self, code: int | None = None, reason: str | None = None) -> None:
        """What Tornado calls."""
        self._is_too_big = code == TOO_BIG
        super().close(code, reason)

    def _abort(self) -> None:
        if self._is_too_big:  # Tornado would close at once
            self._is_too_big = False
            raise _TooBig
        super()._abort()


@lru_cache(maxsize=_REMEMBERED)
def _deflated(data: bytes, window: int) -> bytes:
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, -window)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


_WINDOWS = {str(bits) for bits in range(8, zlib.MAX_WBITS + 1)}
_TAKEOVERS = ("server_no_context_takeover", "client_no_context_takeover")


def _window(header: str) -> int | None:
    """The window of the first offer of permessage-deflate that can be taken (RFC 7692, 7.1); None where there is none."""
    for offer in _words(header):
        name, *parameters = (part.strip() for part in offer.split(";"))
        if name.lower() == "permessage-deflate" and (window := _offered(parameters)) is not None:
            return window
    return None


def _offered(parameters: Sequence[str]) -> int | None:
    window = zlib.MAX_WBITS
    names = set()
    for parameter in parameters:
        name, _, value = (part.strip().strip('"') for part in parameter.partition("="))
        if name in names:
            return None
        names.add(name)
        if name == "server_max_window_bits" and value in _WINDOWS and value != "8":
            window = int(value)  # zlib writes no raw data with a window of 8
        elif name == "client_max_window_bits" and (not value or value in _WINDOWS):
            continue  # whatever it sends can be read
        elif name not in _TAKEOVERS or value:
            return None
    return window
