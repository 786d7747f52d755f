"""How often something may be done: so many a second, and a few more after a pause."""

from __future__ import annotations

import time


class Bucket:
    """A token bucket: ``rate`` come in a second, and at most ``most`` are kept. It begins full."""

    __slots__ = ("_at", "_left", "most", "rate")

    def __init__(self, rate: float, most: float) -> None:
        self.rate, self.most = rate, most
        self._left, self._at = most, time.monotonic()

    def take(self, count: float = 1) -> float:
        """0 where there were so many; else nothing is taken, and they will be there in so many seconds."""
        missing = count - self._fill()
        if missing > 0:
            return missing / self.rate
        self._left -= count
        return 0.0

    def draw(self, count: float = 1) -> float:
        """Takes them, there or not; returns for how many seconds to wait then, so as not to be too quick."""
        self._left = self._fill() - count
        return max(-self._left, 0.0) / self.rate

    def _fill(self) -> float:
        now = time.monotonic()
        self._left = min(self.most, self._left + (now - self._at) * self.rate)
        self._at = now
        return self._left
