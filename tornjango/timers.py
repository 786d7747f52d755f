"""Many deadlines, one timer: what is put off again and again costs an assignment each time."""

from __future__ import annotations

import asyncio
from typing import Protocol


class Timed(Protocol):
    """What a `Wheel` looks after. ``deadline`` and ``slot`` are the wheel's to write."""

    deadline: float
    #: Where it is on the wheel; 0 where it is not.
    slot: int

    def look(self, now: float) -> None:
        """Called when the deadline has passed; it may set another."""


class Wheel:
    """Calls `Timed.look` when a deadline has passed: never before, and at most two ``tick`` seconds after.

    An item is in one slot, which is not later than its deadline. A deadline that is put off leaves the item where it is:
    when its slot comes round, it moves on.
    """

    def __init__(self, tick: float) -> None:
        self.tick = tick
        self._loop = asyncio.get_running_loop()
        self._slots: dict[int, set[Timed]] = {}
        self._due_now: set[Timed] = set()
        self._turned = self._slot(self._loop.time())
        self._timer: asyncio.TimerHandle | None = None

    def set(self, item: Timed, deadline: float) -> None:
        """``deadline`` is a time of the loop's clock."""
        item.deadline = deadline
        slot = self._slot(deadline)
        if not item.slot or slot < item.slot:
            self.drop(item)
            self._add(item, slot)

    def drop(self, item: Timed) -> None:
        """Forgets an item; a second time does nothing."""
        self._due_now.discard(item)
        if item.slot:
            items = self._slots[item.slot]
            items.discard(item)
            if not items:
                del self._slots[item.slot]
            item.slot = 0

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._slots.clear()

    def _slot(self, time: float) -> int:
        return int(time / self.tick) + 1

    def _add(self, item: Timed, slot: int) -> None:
        item.slot = max(slot, self._turned + 1)
        self._slots.setdefault(item.slot, set()).add(item)
        if self._timer is None:
            self._timer = self._loop.call_later(self.tick, self._turn)

    def _turn(self) -> None:
        now = self._loop.time()
        self._timer = None
        due = self._due(int(now / self.tick))
        for item in due:
            item.slot = 0
        # Less those that the look of another has dropped, or put off.
        self._due_now.update(due)
        for item in due:
            if item not in self._due_now:
                continue
            self._due_now.discard(item)
            if item.deadline <= now:
                item.look(now)
            else:
                self._add(item, self._slot(item.deadline))
        if self._slots and self._timer is None:
            self._timer = self._loop.call_later(self.tick, self._turn)

    def _due(self, slot: int) -> list[Timed]:
        """What is in the slots up to this one."""
        if slot - self._turned > len(self._slots):
            numbers = [number for number in self._slots if number <= slot]
        else:
            numbers = list(range(self._turned + 1, slot + 1))
        self._turned = max(slot, self._turned)
        return [item for number in numbers for item in self._slots.pop(number, ())]
