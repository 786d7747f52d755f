from __future__ import annotations

import asyncio

import pytest

from tornjango.db.engines.gate import Gate
from tornjango.exceptions import Overloaded


def gate(size: int = 1, queue: int = 100, timeout: float = 10) -> Gate:
    return Gate("the gate", size=size, queue=queue, timeout=timeout)


async def turns(number: int = 5) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


@pytest.mark.gen_test
async def test_those_who_wait_are_let_in_as_they_came() -> None:
    one, order = gate(), []

    async def come(number: int) -> None:
        await one.enter()
        order.append(number)
        one.leave()

    await one.enter()
    tasks = [asyncio.create_task(come(number)) for number in range(10)]
    await turns()
    assert (one.inside, one.waiting) == (1, 10)
    one.leave()
    await asyncio.gather(*tasks)
    assert order == list(range(10))
    assert (one.inside, one.waiting) == (0, 0)


@pytest.mark.gen_test
async def test_one_who_is_cancelled_is_passed_over() -> None:
    one = gate()
    await one.enter()
    first, second = (asyncio.create_task(one.enter()) for _ in range(2))
    await turns()
    first.cancel()
    await turns()
    assert one.waiting == 1
    one.leave()
    await second
    assert one.inside == 1


@pytest.mark.gen_test
async def test_one_who_is_cancelled_while_being_let_in_lets_the_next_one_in() -> None:
    one = gate()
    await one.enter()
    first, second = (asyncio.create_task(one.enter()) for _ in range(2))
    await turns()
    one.leave()
    first.cancel()
    await second
    with pytest.raises(asyncio.CancelledError):
        await first
    one.leave()
    assert one.inside == 0


@pytest.mark.gen_test
async def test_past_the_queue_and_past_the_time_nobody_waits() -> None:
    one = gate(queue=1, timeout=0.01)
    await one.enter()
    waiting = asyncio.create_task(one.enter())
    await turns()
    with pytest.raises(Overloaded, match="1 connections of the gate are in use and 1 queries wait"):
        await one.enter()
    with pytest.raises(Overloaded, match=r"within 0.01 seconds"):
        await waiting
    assert (one.inside, one.waiting) == (1, 0)
    one.leave()
    await one.enter()


@pytest.mark.gen_test
async def test_closed_it_turns_everybody_away_and_tells_when_it_is_empty() -> None:
    one = gate()
    await one.enter()
    waiting = asyncio.create_task(one.enter())
    emptied = asyncio.create_task(one.emptied())
    await turns()
    one.close(ValueError)
    for coming in (waiting, one.enter()):
        with pytest.raises(ValueError, match="the gate is closed"):
            await coming
    assert not emptied.done()
    one.leave()
    await emptied
    await one.emptied()
