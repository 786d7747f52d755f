"""An event stream as the HTML Standard reads it (9.2.6), over a socket that a test can hold up, or break off."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from tornjango.testing import RawClient, Response


@dataclass(frozen=True)
class Event:
    name: str
    id: str
    text: str

    @property
    def data(self) -> Any:
        return json.loads(self.text)

    @property
    def messages(self) -> list[Any]:
        """What was published, of the answer that this event is."""
        return [message["data"] for message in self.data["messages"]]


class EventSource:
    """``retry`` is the time to come back that was told last, in milliseconds; ``last_id`` what to come back with."""

    def __init__(self, client: RawClient) -> None:
        self.client = client
        self.retry: int | None = None
        self.last_id = ""
        self._buffer = ""

    async def open(
        self, *channels: str, headers: tuple[tuple[str, str], ...] = (), **fields: str
    ) -> Response:
        query = urlencode([*(("channel", name) for name in channels), *fields.items()])
        lines = [f"GET /comet/sse/?{query} HTTP/1.1", "Host: localhost"]
        lines += [f"{name}: {value}" for name, value in headers]
        await self.client.send("\r\n".join([*lines, "\r\n"]).encode())
        self.head = await self.client.head()
        return self.head

    async def next(self) -> Event | None:
        """The next event, None when the stream has ended. Raises IncompleteReadError where it was broken off."""
        while True:
            while "\n\n" not in self._buffer:
                chunk = await self.client.chunk()
                if not chunk:
                    assert not self._buffer
                    return None
                self._buffer += chunk.decode()
            block, _, self._buffer = self._buffer.partition("\n\n")
            if (event := self._read(block)) is not None:
                return event

    async def event(self) -> Event:
        event = await self.next()
        assert event is not None
        return event

    def _read(self, block: str) -> Event | None:
        name, data = "message", []
        for line in block.split("\n"):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "id":
                self.last_id = value
            elif field == "retry":
                self.retry = int(value)
            elif field == "event":
                name = value
            elif field == "data":
                data.append(value)
        return Event(name, self.last_id, "\n".join(data)) if data else None
