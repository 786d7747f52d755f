from __future__ import annotations

import asyncio

import pytest

from tornjango.db.engines import backoff
from tornjango.db.engines.backoff import Backoff


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long is slept, without sleeping."""
    asked: list[float] = []

    async def sleep(delay: float) -> None:
        asked.append(delay)

    monkeypatch.setattr(backoff.asyncio, "sleep", sleep)
    return asked


@pytest.mark.gen_test
async def test_pauses_grow_up_to_a_bound_and_are_never_the_same(sleeps: list[float]) -> None:
    pause = Backoff()
    await pause.wait()
    assert sleeps == []
    for _ in range(20):
        pause.failed()
        await pause.wait()
        pause._due = 0.0
    assert 0.02 < sleeps[0] < 0.07
    assert 2 < sleeps[-1] < 6.1
    assert len(set(sleeps)) == 20


@pytest.mark.gen_test
async def test_failures_side_by_side_count_as_one(sleeps: list[float]) -> None:
    pause = Backoff()
    for _ in range(10):
        pause.failed()
    assert pause.failures == 1


@pytest.mark.gen_test
async def test_a_success_ends_the_pauses(sleeps: list[float]) -> None:
    pause = Backoff()
    pause.failed()
    pause.succeeded()
    await pause.wait()
    assert sleeps == []
    assert asyncio.get_running_loop().time() > 0
