"""What RFC 9112 says a request is: its head is read, and its body's end is found. No I/O.

Only what everybody reads alike is taken: where two servers see a request's end in different places, one client's bytes
become another's request (RFC 9112, 11.2). llhttp reads the fields; the request line and the framing are judged here.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Protocol

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from tornado.httputil import HTTPHeaders, HTTPInputError

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_LINE = re.compile(rb"(" + _TOKEN + rb") ([^\x00-\x20\x7f]+) HTTP/([0-9])\.([0-9])\r\n")
_TEXT = rb"[^\x00-\x08\x0a-\x1f\x7f]*"
# 16 digits are more than anybody sends, and no more than 64 bits.
_SIZE = re.compile(rb"([0-9a-fA-F]{1,16})(?:[ \t]*;" + _TEXT + rb")?")
_SIZE_BEGUN = re.compile(rb"(?:[0-9a-fA-F]{1,16}[ \t]*(?:;" + _TEXT + rb")?\r?)?")
_TRAILER = re.compile(_TOKEN + rb":" + _TEXT)

#: Chunks decoded in one go: a client that sends them one byte long does not have the loop for itself.
_CHUNKS_AT_ONCE = 1000


class Refusal(Exception):
    """What came is not taken: the status of the answer, and its reason in words."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        #: What the client is shown.
        self.content = f"{reason}\n".encode()


class Body(Protocol):
    """Finds a body's end in the bytes that arrive."""

    done: bool

    def decode(self, data: bytes, at: int) -> tuple[bytes, int]:
        """What of the body is in ``data`` from ``at`` on, and where the rest begins. Raises ``Refusal``."""


@dataclass(slots=True)
class Head:
    """A request's line and fields, and what they say about the connection."""

    method: str
    target: str
    version: str
    headers: HTTPHeaders
    #: None where the request has no body.
    body: Body | None
    #: The body's length where it was declared.
    length: int | None
    keep_alive: bool
    #: Whether the client waits for a word before it sends the body.
    expects: bool


def is_broken(part: bytes) -> bool:
    """Whether a part of a head has what no head may have: NUL, or CR or LF alone. A CR at its end may yet get its LF."""
    ends = part.count(b"\r\n")
    alone = part.count(b"\r") - part.endswith(b"\r")
    return part.count(b"\n") != ends or alone != ends or b"\x00" in part


BROKEN = Refusal(400, "Malformed request: a line does not end with CR and LF, or has a NUL in it.")


def read_head(data: bytes, limit: int) -> Head:
    """Reads all up to and with the empty line. ``limit`` is for what a chunked body has beside its content, in bytes.

    Raises ``Refusal``.
    """
    if is_broken(data):
        raise BROKEN
    line = _LINE.match(data)
    if line is None:
        raise Refusal(400, "Malformed request line.")
    method, target = line[1].decode("latin-1"), line[2].decode("latin-1")
    if line[3] != b"1":
        raise Refusal(505, "This server speaks HTTP/1.1, and no other version.")
    _check_target(method, target)
    version = "HTTP/1.0" if line[4] == b"0" else "HTTP/1.1"  # RFC 9110, 2.5: 1.2 would be no less
    headers = _read_fields(data[line.end() :])
    body, length = _framing(headers, version, limit)
    keep_alive = _keeps_alive(headers, version)
    expects = _expects(headers, version) and body is not None
    return Head(method, target, version, headers, body, length, keep_alive, expects)


def _check_target(method: str, target: str) -> None:
    """RFC 9112, 3.2."""
    if method == "CONNECT":
        raise Refusal(501, "This server is no tunnel: CONNECT is not for it.")
    if target[0] == "/" or (target == "*" and method == "OPTIONS"):
        return
    if not target[:8].lower().startswith(("http://", "https://")):
        raise Refusal(400, "Malformed request target.")


class _Fields:
    """What llhttp calls back."""

    __slots__ = ("_names", "headers", "whole")

    def __init__(self) -> None:
        self.headers = HTTPHeaders()
        self._names: set[bytes] = set()
        self.whole = False

    def on_header(self, name: bytes, value: bytes) -> None:
        text = value.decode("latin-1").rstrip(" \t")
        lower = name.lower()
        if lower in self._names:
            self.headers.add(name.decode(), text)
        else:  # without the checks of add(), which llhttp has done
            self._names.add(lower)
            self.headers[name.decode()] = text

    def on_headers_complete(self) -> None:
        self.whole = True


def _read_fields(data: bytes) -> HTTPHeaders:
    fields = _Fields()
    parser = HttpRequestParser(fields)
    # What these let through is judged by _framing().
    parser.set_dangerous_leniencies(lenient_chunked_length=True, lenient_transfer_encoding=True)
    try:
        parser.feed_data(b"GET / HTTP/1.1\r\n" + data)
    except HttpParserUpgrade:
        pass
    except (HttpParserError, HTTPInputError) as exc:
        raise Refusal(400, f"Malformed header: {exc}.") from None
    if not fields.whole:
        raise Refusal(400, "Malformed header.")
    return fields.headers


def _framing(headers: HTTPHeaders, version: str, limit: int) -> tuple[Body | None, int | None]:
    """RFC 9112, 6.3."""
    coding = headers.get("Transfer-Encoding") if "Transfer-Encoding" in headers else None
    if coding is not None:
        if "Content-Length" in headers:
            raise Refusal(400, "A request has both Content-Length and Transfer-Encoding.")
        if version == "HTTP/1.0":
            raise Refusal(400, "HTTP/1.0 has no Transfer-Encoding.")
        _check_coding(coding)
        return Chunks(limit), None
    if "Content-Length" not in headers:
        return None, None
    declared = headers["Content-Length"]
    if not (declared.isascii() and declared.isdigit() and len(declared) <= 20):
        raise Refusal(400, "Content-Length is not one number.")
    length = int(declared)
    return (Counted(length) if length else None), length


def _check_coding(coding: str) -> None:
    codings = [part.strip(" \t").lower() for part in coding.split(",")]
    if codings[-1] != "chunked" or codings.count("chunked") > 1:
        raise Refusal(400, "The last Transfer-Encoding, and no other, has to be chunked.")
    if len(codings) > 1:
        raise Refusal(501, "This server knows no Transfer-Encoding but chunked.")


def _keeps_alive(headers: HTTPHeaders, version: str) -> bool:
    """RFC 9112, 9.3."""
    if "Connection" not in headers:
        return version == "HTTP/1.1"
    options = {option.strip(" \t").lower() for option in headers["Connection"].split(",")}
    return "close" not in options and (version == "HTTP/1.1" or "keep-alive" in options)


def _expects(headers: HTTPHeaders, version: str) -> bool:
    """RFC 9110, 10.1.1."""
    if "Expect" not in headers or version == "HTTP/1.0":
        return False
    if headers["Expect"].lower() != "100-continue":
        raise Refusal(417, "This server meets no expectation but 100-continue.")
    return True


class Counted:
    """A body of as many bytes as ``Content-Length`` says."""

    __slots__ = ("_left", "done")

    def __init__(self, length: int) -> None:
        self._left = length
        self.done = False

    def decode(self, data: bytes, at: int) -> tuple[bytes, int]:
        content = data[at : at + self._left]
        self._left -= len(content)
        self.done = not self._left
        return content, at + len(content)


class _Next(enum.Enum):
    """What comes next in a chunked body."""

    SIZE = "a chunk's size"
    CONTENT = "a chunk's content"
    END = "a chunk's end"
    TRAILER = "a trailer, or the end"


class Chunks:
    """A chunked body (RFC 9112, 7.1). Extensions and trailers are read and dropped, ``limit`` bytes of them in all."""

    __slots__ = ("_left", "_limit", "_next", "done")

    def __init__(self, limit: int) -> None:
        self.done = False
        self._next = _Next.SIZE
        self._left = 0
        self._limit = limit

    def decode(self, data: bytes, at: int) -> tuple[bytes, int]:
        content: list[bytes] = []
        for _ in range(_CHUNKS_AT_ONCE * 3):
            before = self._next, at
            if self._next is _Next.CONTENT:
                at = self._take_content(data, at, content)
            elif self._next is _Next.END:
                at = self._take_end(data, at)
            else:
                at = self._take_line(data, at)
            if self.done or before == (self._next, at):
                break
        return b"".join(content), at

    def _take_content(self, data: bytes, at: int, content: list[bytes]) -> int:
        part = data[at : at + self._left]
        content.append(part)
        self._left -= len(part)
        if not self._left:
            self._next = _Next.END
        return at + len(part)

    def _take_end(self, data: bytes, at: int) -> int:
        end = data[at : at + 2]
        if not b"\r\n".startswith(end):
            raise Refusal(400, "A chunk is longer than its size says.")
        if len(end) < 2:
            return at
        self._next = _Next.SIZE
        return at + 2

    def _take_line(self, data: bytes, at: int) -> int:
        end = data.find(b"\r\n", at)
        line = data[at : end if end >= 0 else at + self._limit + 1]
        if len(line) > self._limit:
            raise Refusal(400, "Chunk extensions and trailers are too long.")
        if self._next is _Next.SIZE:
            return self._take_size(line, at, end)
        return self._take_trailer(line, at, end)

    def _take_size(self, line: bytes, at: int, end: int) -> int:
        size = (_SIZE if end >= 0 else _SIZE_BEGUN).fullmatch(line)
        if size is None:
            raise Refusal(400, "Malformed size of a chunk.")
        if end < 0:
            return at
        self._limit -= len(line) - len(size[1])
        self._left = int(size[1], 16)
        self._next = _Next.CONTENT if self._left else _Next.TRAILER
        return end + 2

    def _take_trailer(self, line: bytes, at: int, end: int) -> int:
        if is_broken(line) or (end >= 0 and line and not _TRAILER.fullmatch(line)):
            raise Refusal(400, "Malformed trailer of a chunked body.")
        if end < 0:
            return at
        self._limit -= len(line)
        self.done = not line
        return end + 2
