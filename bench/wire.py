"""HTTP/1.1 answers, read from bytes: just enough for the benchmark's clients, which cost what they parse."""

from __future__ import annotations

import dataclasses


class WireError(Exception):
    """The bytes are not an answer that this client understands."""


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    length: int
    """How many bytes of the buffer the whole answer took."""
    keep_alive: bool


def request_bytes(path: str, *, host: str = "127.0.0.1", cookie: str = "") -> bytes:
    """A GET with the headers of a small client."""
    headers = f"Host: {host}\r\nUser-Agent: bench\r\nAccept: */*\r\n"
    if cookie:
        headers += f"Cookie: {cookie}\r\n"
    return f"GET {path} HTTP/1.1\r\n{headers}\r\n".encode()


def parse(buffer: bytes) -> Answer | None:
    """The first whole answer in ``buffer``, or None while bytes are missing. Raises WireError."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    lines = buffer[:end].lower().split(b"\r\n")
    status = _status(lines[0])
    headers = dict(line.split(b":", 1) for line in lines[1:])
    body = _body(buffer, end + 4, headers)
    if body is None:
        return None
    keep_alive = b"close" not in headers.get(b"connection", b"")
    return Answer(status, body[0], body[1], keep_alive)


def _status(line: bytes) -> int:
    if not line.startswith(b"http/1.1 ") or not line[9:12].isdigit():
        raise WireError(f"not the status line of an HTTP/1.1 answer: {line!r}")
    return int(line[9:12])


def _body(buffer: bytes, start: int, headers: dict[bytes, bytes]) -> tuple[bytes, int] | None:
    """The body and where it ends; None while bytes are missing."""
    if b"content-length" in headers:
        end = start + int(headers[b"content-length"])
        return (buffer[start:end], end) if len(buffer) >= end else None
    if headers.get(b"transfer-encoding", b"").strip() == b"chunked":
        return _chunks(buffer, start)
    raise WireError("an answer with neither Content-Length nor chunks")


def _chunks(buffer: bytes, position: int) -> tuple[bytes, int] | None:
    parts: list[bytes] = []
    while (line_end := buffer.find(b"\r\n", position)) >= 0:
        size = int(buffer[position:line_end], 16)
        end = line_end + 2 + size
        if len(buffer) < end + 2:
            return None
        if size == 0:
            return b"".join(parts), end + 2
        parts.append(buffer[line_end + 2 : end])
        position = end + 2
    return None
