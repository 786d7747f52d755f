from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter, deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakKeyDictionary

# Woken in one turn of the loop; then other events have theirs, so that ten thousand answers hold up nobody.
_SLICE = 50

# What a restarted server takes without trouble; readers that a drain sends away are spread out accordingly.
_RETURNING_PER_SECOND = 500
_SPREAD = (1.0, 30.0)


class Client(Protocol):
    """A reader, as far as it is known here: by what its client calls itself, and by its transport."""

    client: str | None
    transport: str

    def supersede(self) -> None:
        """A newer one of the same client is there."""


class Waiter:
    """One parked reader: woken by a message on any of its channels, by its time-out or by a drain."""

    __slots__ = ("_future", "_woken", "channels")

    def __init__(self, channels: Collection[str]) -> None:
        self.channels = channels
        self._future: asyncio.Future[None] | None = None
        self._woken = False

    async def wait(self, deadline: float) -> None:
        """Returns once it was woken since the last call, or when the loop's time is ``deadline``."""
        if not self._woken:
            loop = asyncio.get_running_loop()
            self._future = loop.create_future()
            timer = loop.call_at(deadline, self.wake)
            try:
                await self._future
            finally:
                timer.cancel()
                self._future = None
        self._woken = False

    def wake(self) -> None:
        self._woken = True
        # It may have been woken, timed out or cancelled already in this turn of the loop.
        if self._future is not None and not self._future.done():
            self._future.set_result(None)


class _Parked:
    """The waiters of one event loop; only ``dirty`` is touched by other threads, under the lock of Waiters."""

    __slots__ = (
        "by_channel",
        "by_client",
        "dirty",
        "draining",
        "queue",
        "spread",
        "transports",
        "waiters",
    )

    def __init__(self) -> None:
        self.by_client: dict[str, Client] = {}
        self.transports: Counter[str] = Counter()
        self.by_channel: dict[str, dict[Waiter, None]] = {}
        self.waiters: dict[Waiter, None] = {}
        self.dirty: set[str] = set()
        self.draining = False
        #: Who is to be woken: of each channel's waiters some have their turn, and then those of the next one.
        self.queue: deque[deque[Waiter]] = deque()
        self.spread = 0.0

    def add(self, waiter: Waiter) -> None:
        self.waiters[waiter] = None
        for channel in waiter.channels:
            self.by_channel.setdefault(channel, {})[waiter] = None

    def remove(self, waiter: Waiter) -> None:
        del self.waiters[waiter]
        for channel in waiter.channels:
            waiters = self.by_channel[channel]
            del waiters[waiter]
            if not waiters:
                del self.by_channel[channel]


class Waiters:
    """All parked readers of the process, by event loop and channel."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _Parked] = WeakKeyDictionary()

    @contextmanager
    def registered(self, channels: Collection[str]) -> Iterator[Waiter]:
        """A waiter that hears of every message from now on; forgotten at the end of the block."""
        parked = self._here()
        waiter = Waiter(channels)
        parked.add(waiter)
        try:
            yield waiter
        finally:
            parked.remove(waiter)

    @contextmanager
    def known(self, client: Client) -> Iterator[None]:
        """Inside, the client's reader is this one: an older one is told that it is superseded."""
        parked = self._here()
        parked.transports[client.transport] += 1
        if client.client is not None:
            if (older := parked.by_client.get(client.client)) is not None:
                older.supersede()
            parked.by_client[client.client] = client
        try:
            yield
        finally:
            parked.transports[client.transport] -= 1
            if client.client is not None and parked.by_client.get(client.client) is client:
                del parked.by_client[client.client]

    def change(self, waiter: Waiter, channels: Collection[str]) -> None:
        """From now on a registered waiter hears of these channels, and of no others."""
        parked = self._here()
        parked.remove(waiter)
        waiter.channels = channels
        parked.add(waiter)

    def _here(self) -> _Parked:
        loop = asyncio.get_running_loop()
        with self._lock:
            parked = self._loops.get(loop)
            if parked is None:
                parked = self._loops[loop] = _Parked()
            return parked

    def notify(self, channels: Collection[str] | None) -> None:
        """Wakes the readers of these channels, or all of them, each on its own loop; may be called in any thread."""
        with self._lock:
            for loop, parked in list(self._loops.items()):
                # A burst wakes once. A reader that registers after this line reads after the message was stored.
                wanted = list(parked.by_channel) if channels is None else channels
                found = {name for name in wanted if name in parked.by_channel} - parked.dirty
                if found:
                    parked.dirty |= found
                    self._schedule(loop, parked)

    def _schedule(self, loop: asyncio.AbstractEventLoop, parked: _Parked) -> None:
        try:
            loop.call_soon_threadsafe(self._wake_dirty, loop, parked)
        except RuntimeError:
            if not loop.is_closed():
                raise
            # A loop closed under its tasks: nobody will ever read there.
            del self._loops[loop]

    def _wake_dirty(self, loop: asyncio.AbstractEventLoop, parked: _Parked) -> None:
        with self._lock:
            channels, parked.dirty = parked.dirty, set()
        for channel in channels:
            self._enqueue(loop, parked, parked.by_channel.get(channel, ()))

    def _enqueue(
        self, loop: asyncio.AbstractEventLoop, parked: _Parked, waiters: Collection[Waiter]
    ) -> None:
        if not waiters:
            return
        idle = not parked.queue
        parked.queue.append(deque(waiters))
        if idle:
            self._wake_slice(loop, parked)

    def _wake_slice(self, loop: asyncio.AbstractEventLoop, parked: _Parked) -> None:
        left = _SLICE
        while left and parked.queue:
            waiters = parked.queue.popleft()
            share = min(max(left // (len(parked.queue) + 1), 1), len(waiters))
            for _ in range(share):
                waiters.popleft().wake()
            left -= share
            if waiters:
                parked.queue.append(waiters)
        if parked.queue:
            loop.call_soon(self._wake_slice, loop, parked)

    def drain(self) -> int:
        """Wakes everyone on the running loop and parks nobody there any more; returns how many were parked."""
        loop, parked = asyncio.get_running_loop(), self._here()
        parked.draining = True
        count = len(parked.waiters)
        parked.spread = _spread(count)
        self._enqueue(loop, parked, parked.waiters)
        return count

    def spread(self) -> float:
        """Seconds over which those come back whom a drain sends away, or would send away now."""
        with self._lock:
            drained = max((parked.spread for parked in self._loops.values()), default=0.0)
        return drained or _spread(self.count())

    @property
    def drained(self) -> bool:
        """Whether any loop has been drained."""
        with self._lock:
            return any(parked.draining for parked in self._loops.values())

    @property
    def draining(self) -> bool:
        """Whether the running loop has been drained."""
        return self._here().draining

    def retry(self) -> int:
        """Milliseconds after which a reader should come back: 0, or once draining a random part of the spread."""
        parked = self._here()
        return round(random.uniform(0.2, parked.spread) * 1000) if parked.draining else 0

    def count(self) -> int:
        with self._lock:
            return sum(len(parked.waiters) for parked in self._loops.values())

    def count_of(self, channel: str) -> int:
        """How many readers follow a channel."""
        with self._lock:
            return sum(len(it.by_channel.get(channel, ())) for it in self._loops.values())

    def transports(self) -> dict[str, int]:
        """How many readers there are, by transport."""
        with self._lock:
            found = sum((parked.transports for parked in self._loops.values()), Counter())
        return dict(found)


def _spread(count: int) -> float:
    least, most = _SPREAD
    return min(max(count / _RETURNING_PER_SECOND, least), most)
