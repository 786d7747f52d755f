from __future__ import annotations

import asyncio

import pytest

from tornjango.timers import Wheel


class Item:
    def __init__(self, wheel: Wheel) -> None:
        self.wheel, self.deadline, self.slot = wheel, 0.0, 0
        self.looks: list[float] = []
        self.looked = asyncio.Event()

    def look(self, now: float) -> None:
        assert now >= self.deadline
        self.looks.append(now - self.deadline)
        self.looked.set()


def now() -> float:
    return asyncio.get_running_loop().time()


@pytest.mark.gen_test
async def test_an_item_is_looked_at_when_its_deadline_has_passed() -> None:
    wheel = Wheel(0.01)
    items = [Item(wheel) for _ in range(50)]
    for number, item in enumerate(items):
        wheel.set(item, now() + number / 500)
    await asyncio.gather(*(item.looked.wait() for item in items))
    assert [len(item.looks) for item in items] == [1] * 50
    assert not wheel._slots
    assert wheel._timer is None


@pytest.mark.gen_test
async def test_a_deadline_may_be_put_off_and_brought_forward() -> None:
    wheel = Wheel(0.01)
    late, early, last = Item(wheel), Item(wheel), Item(wheel)
    wheel.set(late, now() + 0.01)
    wheel.set(late, now() + 60)
    wheel.set(early, now() + 60)
    wheel.set(early, now() + 0.01)
    wheel.set(last, now() + 0.06)
    await last.looked.wait()
    assert (len(late.looks), len(early.looks)) == (0, 1)
    wheel.close()


@pytest.mark.gen_test
async def test_what_is_dropped_is_not_looked_at() -> None:
    wheel = Wheel(0.01)
    dropped, last = Item(wheel), Item(wheel)
    wheel.set(dropped, now())
    wheel.drop(dropped)
    wheel.drop(dropped)
    wheel.set(last, now() + 0.04)
    await last.looked.wait()
    assert not dropped.looks


@pytest.mark.gen_test
async def test_a_look_may_set_the_next_deadline_and_drop_others() -> None:
    wheel = Wheel(0.01)
    other = Item(wheel)

    class Again(Item):
        def look(self, now: float) -> None:
            super().look(now)
            self.wheel.drop(other)
            if len(self.looks) < 3:
                self.looked.clear()
                self.wheel.set(self, now)

    item = Again(wheel)
    wheel.set(item, now())
    wheel.set(other, now() + 0.02)
    while len(item.looks) < 3:
        await item.looked.wait()
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)
    assert not other.looks


@pytest.mark.gen_test
async def test_what_a_look_drops_or_puts_off_is_not_looked_at_in_the_same_turn() -> None:
    import time

    wheel = Wheel(0.001)
    dropped, put_off, last = Item(wheel), Item(wheel), Item(wheel)

    class First(Item):
        def look(self, now: float) -> None:
            super().look(now)
            wheel.drop(dropped)
            wheel.set(put_off, now + 60)

    wheel.set(First(wheel), now())
    for number, item in enumerate((dropped, put_off, last), 1):
        wheel.set(item, now() + number * 0.002)
    time.sleep(0.02)  # noqa: ASYNC251  the loop is held up, so that all are due in one turn
    await last.looked.wait()
    assert (dropped.looks, put_off.looks) == ([], [])
    wheel.close()


@pytest.mark.gen_test
async def test_a_loop_that_was_held_up_misses_nothing() -> None:
    import time

    wheel = Wheel(0.001)
    items = [Item(wheel) for _ in range(5)]
    for number, item in enumerate(items):
        wheel.set(item, now() + number / 100)
    time.sleep(0.1)  # noqa: ASYNC251
    await asyncio.gather(*(item.looked.wait() for item in items))
