from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping

from tornjango.comet.brokers.base import Broker
from tornjango.comet.log import Channel, Logs, Position, Reading


class MemoryBroker(Broker):
    """The logs of one process, in its memory: other processes neither see them nor outlive them.

    A message is readable as soon as ``publish`` returns, and messages are in one order across all channels.
    """

    name = "memory"

    def __init__(self, notify: Callable[[str], None], *, max_channels: int) -> None:
        super().__init__(notify)
        self._lock = threading.Lock()
        self._logs = Logs(max_channels=max_channels)

    def publish(self, channel: Channel, body: bytes) -> None:
        with self._lock:
            self._logs.append(channel, body, now=time.monotonic())
        self._notify(channel.name)

    def ends(self, channels: Iterable[Channel]) -> dict[str, Position]:
        with self._lock:
            end = self._logs.end
        return {channel.name: end for channel in channels}

    async def read(self, since: Mapping[Channel, Position], *, count: int, size: int) -> Reading:
        with self._lock:
            return self._logs.read(since, now=time.monotonic(), count=count, size=size)

    def status(self) -> dict[str, int]:
        with self._lock:
            return self._logs.status()
