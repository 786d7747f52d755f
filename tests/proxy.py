from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self


class Proxy:
    """Stands between a client and a server on 127.0.0.1; an answer of the server's can be lost on its way."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        self._losing: bytes | None = None

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.close()
        # Not cancelled: asyncio's server would log it, and a writer might be left unclosed.
        self._ended.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def lose_answer_to(self, part: bytes) -> None:
        """The next answer to a message with `part` in it: it is dropped, and the connection closed."""
        self._losing = part

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        await self._relay(reader, writer)
        self._tasks.discard(task)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        # Of this connection: another one's answers are not to be lost in its place.
        asked = asyncio.Event()
        works = [
            asyncio.ensure_future(self._ask(reader, server_writer, asked)),
            asyncio.ensure_future(self._answer(server_reader, writer, asked)),
            asyncio.ensure_future(self._ended.wait()),
        ]
        try:
            await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in works:
                one.cancel()
            await asyncio.gather(*works, return_exceptions=True)
            for end in (writer, server_writer):
                end.close()
                with suppress(OSError):
                    await end.wait_closed()

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: asyncio.Event
    ) -> None:
        while data := await reader.read(65536):
            if self._losing is not None and self._losing in data:
                self._losing = None
                asked.set()
            writer.write(data)
            await writer.drain()

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: asyncio.Event
    ) -> None:
        while (data := await reader.read(65536)) and not asked.is_set():
            writer.write(data)
            await writer.drain()
