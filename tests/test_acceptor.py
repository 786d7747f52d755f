from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
from tornado.netutil import bind_sockets, bind_unix_socket

from tests.http1_echo import echoing
from tests.serving import until
from tornjango import acceptor
from tornjango.acceptor import Acceptor

PEM = Path(__file__).with_name("localhost.pem")


class Listening:
    """A listening socket whose ``accept`` fails as often as it is told to."""

    def __init__(self, real: socket.socket, failures: list[int]) -> None:
        self.real, self.failures, self.calls = real, failures, 0

    def accept(self) -> Any:
        self.calls += 1
        if self.failures:
            raise OSError(self.failures.pop(), "no")
        return self.real.accept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def bound() -> tuple[socket.socket, int]:
    listening = bind_sockets(0, "127.0.0.1")[0]
    return listening, listening.getsockname()[1]


@pytest.mark.gen_test
async def test_a_system_without_files_to_give_is_asked_again_later(
    monkeypatch: pytest.MonkeyPatch, error_log: list[logging.LogRecord]
) -> None:
    monkeypatch.setattr(acceptor, "_RETRY_SECONDS", 0.05)
    made: list[asyncio.Protocol] = []
    real, port = bound()
    listening: Any = Listening(real, [errno.EMFILE])
    accepting = Acceptor(lambda: made.append(asyncio.Protocol()) or made[-1], None, 1)  # type: ignore[func-returns-value]
    accepting.open(listening)
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    await until(lambda: made)
    assert listening.calls <= 4  # it did not spin meanwhile
    assert "No connection is accepted for" in error_log.pop().getMessage()
    await accepting.close()
    writer.transport.abort()


@pytest.mark.gen_test
async def test_a_client_that_left_the_queue_holds_up_nobody() -> None:
    made: list[asyncio.Protocol] = []
    real, port = bound()
    listening: Any = Listening(real, [errno.ECONNABORTED, errno.ECONNRESET])
    accepting = Acceptor(lambda: made.append(asyncio.Protocol()) or made[-1], None, 1)  # type: ignore[func-returns-value]
    accepting.open(listening)
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    await until(lambda: made)
    await accepting.close()
    writer.transport.abort()


@pytest.mark.gen_test
async def test_what_was_accepted_is_a_connection_when_the_acceptor_is_closed() -> None:
    made: list[asyncio.Protocol] = []
    real, port = bound()
    accepting = Acceptor(lambda: made.append(asyncio.Protocol()) or made[-1], None, 1)  # type: ignore[func-returns-value]
    accepting.open(real)
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
    accepting._accept(real)
    await accepting.close()
    assert len(made) == 5
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    for client in clients:
        client.close()


@pytest.mark.gen_test
async def test_only_so_many_clients_shake_hands_at_one_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(acceptor, "_HANDSHAKES", 2)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(PEM)
    trusting = ssl.create_default_context(cafile=PEM)
    trusting.check_hostname = False
    async with echoing(tls=context) as site:
        silent = [await asyncio.open_connection("127.0.0.1", site.port) for _ in range(2)]
        (accepting,) = site.server._acceptors
        await until(lambda: len(accepting._begun) == 2)
        opening = asyncio.ensure_future(
            asyncio.open_connection("127.0.0.1", site.port, ssl=trusting)
        )
        await until(lambda: accepting._paused)
        assert not opening.done()
        for _, writer in silent:
            writer.transport.abort()
        reader, writer = await opening
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.transport.abort()


@pytest.mark.gen_test
async def test_who_speaks_no_tls_is_closed() -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(PEM)
    async with echoing(tls=context, HEADER_TIMEOUT=0.1) as site:
        assert b"HTTP" not in await site.raw(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert await site.raw(b"") == b""  # nor is silence waited for
        assert site.server.connections == 0


@pytest.mark.gen_test
async def test_a_unix_socket_is_served(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    async with echoing() as site:
        await site.server.start([bind_unix_socket(path)])
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.close()
        context = site.echo.requests[0].connection.context
        assert (context.remote_ip, context.server_address) == ("", ("unix", "0"))
