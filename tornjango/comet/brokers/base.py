from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

from tornjango.comet.log import Channel, Position, Reading


class Broker(ABC):
    """Keeps the channels' logs, and says when one has grown.

    What every broker promises:

    - Messages of one channel have growing offsets, and are read in that order. A position never means two things: what
      was lost (a restart, a trimmed or dropped log) is told as a gap.
    - ``notify(name)`` is called, in any thread, after a channel's new message can be read by this process. So a reader
      that is registered for waking first and reads then misses nothing.
    - Reading removes nothing, and readers leave no trace.
    """

    name: ClassVar[str]

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify = notify

    @abstractmethod
    def publish(self, channel: Channel, body: bytes) -> None:
        """Appends a message, in any thread, with or without an event loop. Returns when no later reader can miss it."""

    @abstractmethod
    def ends(self, channels: Iterable[Channel]) -> dict[str, Position]:
        """Each channel's present end, in any thread: where a reader starts that wants what comes from now on."""

    @abstractmethod
    async def read(self, since: Mapping[Channel, Position], *, count: int, size: int) -> Reading:
        """What came after the given positions, on the loop; never waits for news.

        At most ``count`` messages and ``size`` bytes of them, but at least one message if there is one.
        """

    @abstractmethod
    def status(self) -> dict[str, int]:
        """Numbers for the status page: channels, messages, bytes, published."""
