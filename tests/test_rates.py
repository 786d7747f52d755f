from __future__ import annotations

import time

import pytest

from tornjango.rates import Bucket


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_what_is_taken_comes_back_in_time(clock: list[float]) -> None:
    bucket = Bucket(2, 3)
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, 0.5]
    clock[0] += 0.5
    assert [bucket.take(), bucket.take()] == [0, 0.5]


def test_what_is_refused_is_not_taken(clock: list[float]) -> None:
    bucket = Bucket(1, 3)
    assert bucket.take(5) == 2
    assert bucket.take(3) == 0


def test_what_is_drawn_is_waited_for(clock: list[float]) -> None:
    bucket = Bucket(2, 3)
    assert [bucket.draw(3), bucket.draw(), bucket.draw(4)] == [0, 0.5, 2.5]
    clock[0] += 3
    assert [bucket.draw(), bucket.draw()] == [0, 0.5]


def test_no_more_are_kept_than_it_holds(clock: list[float]) -> None:
    bucket = Bucket(1000, 2)
    clock[0] += 3600
    assert [bucket.take() for _ in range(3)] == [0, 0, 0.001]
