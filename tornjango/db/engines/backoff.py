from __future__ import annotations

import asyncio
import random

# Pauses between attempts, in seconds: the first at most FIRST, then doubled each time, up to LAST.
FIRST = 0.05
LAST = 5.0


class Backoff:
    """When the next attempt to reach a server is due: later after each failure, and never at the same time as others'."""

    def __init__(self) -> None:
        self.failures = 0
        self._due = 0.0

    def failed(self) -> None:
        """Attempts that were under way side by side count as one."""
        now = asyncio.get_running_loop().time()
        if now < self._due:
            return
        longest = min(LAST, FIRST * 2**self.failures)
        self.failures += 1
        self._due = now + random.uniform(longest / 2, longest)

    def succeeded(self) -> None:
        self.failures = 0
        self._due = 0.0

    async def wait(self) -> None:
        """Returns when an attempt is due."""
        delay = self._due - asyncio.get_running_loop().time()
        if delay > 0:
            await asyncio.sleep(delay * random.uniform(1, 1.2))
