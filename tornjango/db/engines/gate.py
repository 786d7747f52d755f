from __future__ import annotations

import asyncio
from collections import OrderedDict

from tornjango.exceptions import Overloaded


class Gate:
    """Lets ``size`` callers in at one time; the others wait in the order they came.

    At most ``queue`` may wait, each at most ``timeout`` seconds; past either, ``enter`` raises ``Overloaded`` with
    ``name`` in its message. Whoever was let in calls ``leave`` once.
    """

    def __init__(self, name: str, *, size: int, queue: int, timeout: float) -> None:
        self.name = name
        self.size = size
        self.queue = queue
        self.timeout = timeout
        self.inside = 0
        #: With the time until which each waits: the first one's is the earliest.
        self._waiting: OrderedDict[asyncio.Future[None], float] = OrderedDict()
        #: One for all: most are let in long before.
        self._timer: asyncio.TimerHandle | None = None
        self._emptied: asyncio.Future[None] | None = None
        self._closed: type[Exception] | None = None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def enter(self) -> None:
        """Returns when the caller is in. Cancelled, or too late, it is not in, and the next one is not held up."""
        if self._closed:
            raise self._closed_error()
        if self.inside < self.size:
            self.inside += 1
            return
        if len(self._waiting) >= self.queue:
            raise Overloaded(
                f"All {self.size} connections of {self.name} are in use and {self.queue} queries wait "
                'for one (TORNJANGO["POOL_SIZE"], TORNJANGO["POOL_QUEUE"]).'
            )
        await self._wait()

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waiting[future] = loop.time() + self.timeout
        if self._timer is None:
            self._timer = loop.call_later(self.timeout, self._expire, loop)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and not future.exception():
                # Let in and cancelled in the same turn of the loop.
                self.leave()
            raise
        finally:
            self._waiting.pop(future, None)

    def leave(self) -> None:
        """Lets the first one in who still waits."""
        while self._waiting:
            future, _ = self._waiting.popitem(last=False)
            if not future.done():
                future.set_result(None)
                return
        self.inside -= 1
        if self._emptied and not self._emptied.done() and not self.inside:
            self._emptied.set_result(None)

    def close(self, error: type[Exception]) -> None:
        """Those who wait, and all who come from now on, get an ``error`` that says the pool is closed."""
        self._closed = error
        if self._timer is not None:
            self._timer.cancel()
        while self._waiting:
            future, _ = self._waiting.popitem(last=False)
            if not future.done():
                future.set_exception(self._closed_error())

    async def emptied(self) -> None:
        """Returns when nobody is inside."""
        if self.inside:
            self._emptied = self._emptied or asyncio.get_running_loop().create_future()
            await asyncio.shield(self._emptied)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        while self._waiting:
            future, deadline = next(iter(self._waiting.items()))
            if deadline > now:
                self._timer = loop.call_at(deadline, self._expire, loop)
                return
            self._waiting.popitem(last=False)
            if not future.done():
                future.set_exception(self._late())

    def _late(self) -> Overloaded:
        return Overloaded(
            f"No connection of {self.name} became free within {self.timeout:g} seconds "
            f'(TORNJANGO["POOL_TIMEOUT"]); {self.size} are in use.'
        )

    def _closed_error(self) -> Exception:
        assert self._closed
        return self._closed(f"The pool of {self.name} is closed.")
