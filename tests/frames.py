"""A WebSocket as bytes: frames that no library would send."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tornjango.testing import RawClient, Response

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA
CONTINUED = 0x0

HANDSHAKE = {
    "Host": "localhost",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def frame(
    opcode: int, data: bytes = b"", *, final: bool = True, masked: bool = True, flags: int = 0
) -> bytes:
    """RFC 6455, 5.2."""
    first = (0x80 if final else 0) | flags | opcode
    bit = 0x80 if masked else 0
    if len(data) < 126:
        head = struct.pack("!BB", first, bit | len(data))
    elif len(data) < 1 << 16:
        head = struct.pack("!BBH", first, bit | 126, len(data))
    else:
        head = struct.pack("!BBQ", first, bit | 127, len(data))
    if not masked:
        return head + data
    # The same at each run: tests are named after what they send.
    mask = b"\x1b\xad\xf0\x0d"
    masks = mask * (len(data) // 4 + 1)
    return head + mask + bytes(a ^ b for a, b in zip(data, masks, strict=False))


def closing(code: int) -> bytes:
    return frame(CLOSE, struct.pack("!H", code))


@dataclass
class Frame:
    opcode: int
    data: bytes
    flags: int

    @property
    def code(self) -> int:
        """Of a close frame."""
        assert self.opcode == CLOSE
        return int(struct.unpack("!H", self.data[:2])[0])


async def shake_hands(client: RawClient, target: str, **headers: str | None) -> Response:
    """The answer to a handshake; a header of it is changed with ``Sec_WebSocket_Key="..."``, or left out with None."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}" for name, value in (HANDSHAKE | given).items() if value is not None]
    await client.send("\r\n".join([f"GET {target} HTTP/1.1", *lines, "\r\n"]).encode())
    head = await client.head()
    if head.status != 101:
        length = int(head.header("Content-Length") or 0)
        body = await client.reader.readexactly(length)
        return Response(head.version, head.status, head.reason, head.headers, body)
    return head


async def read_frame(client: RawClient) -> Frame:
    """Raises ``asyncio.IncompleteReadError`` where the server has closed the connection."""
    first, length = await client.reader.readexactly(2)
    assert not length & 0x80, "a server's frames are not masked"
    if length == 126:
        (length,) = struct.unpack("!H", await client.reader.readexactly(2))
    elif length == 127:
        (length,) = struct.unpack("!Q", await client.reader.readexactly(8))
    return Frame(first & 0xF, await client.reader.readexactly(length), first & 0x70)
