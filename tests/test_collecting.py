"""The garbage collector, while a process serves."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tornjango import collecting
from tornjango.collecting import THRESHOLDS, seldom

PYTHONS = 2000, 10, 10
PROJECTS = 5000, 7, 3


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


def test_this_pythons_own_thresholds_are_known_as_such() -> None:
    command = [sys.executable, "-c", "import gc; print(gc.get_threshold())"]
    fresh = ast.literal_eval(subprocess.check_output(command, text=True))
    assert fresh in collecting._PYTHONS_OWN


def test_thresholds_are_raised_inside_and_given_back() -> None:
    gc.set_threshold(*PYTHONS)
    with seldom():
        assert gc.get_threshold() == THRESHOLDS
    assert gc.get_threshold() == PYTHONS


@pytest.mark.parametrize("own", [PROJECTS, (0, 10, 10)])
def test_thresholds_of_the_project_are_left_alone(own: tuple[int, int, int]) -> None:
    gc.set_threshold(*own)
    with seldom():
        assert gc.get_threshold() == own
    assert gc.get_threshold() == own


def test_thresholds_that_the_project_sets_inside_stay() -> None:
    gc.set_threshold(*PYTHONS)
    with seldom():
        gc.set_threshold(*PROJECTS)
    assert gc.get_threshold() == PROJECTS


def test_what_is_there_already_is_not_looked_at_inside_and_what_comes_is() -> None:
    before = gc.get_freeze_count()
    already: list[object] = []
    with seldom():
        assert gc.get_freeze_count() > before
        later: list[object] = []
        looked_at = {id(it) for it in gc.get_objects()}
        assert id(already) not in looked_at
        assert id(later) in looked_at
    assert gc.get_freeze_count() == 0


def test_what_was_garbage_before_is_not_kept() -> None:
    class Knot:
        freed = 0

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            Knot.freed += 1

    Knot()
    with seldom():
        assert Knot.freed == 1


def _fail() -> None:
    with seldom():
        assert gc.get_threshold() == THRESHOLDS
        raise OSError("the port is taken")


def test_all_is_given_back_after_an_error_and_can_be_had_again() -> None:
    gc.set_threshold(*PYTHONS)
    for _ in range(2):
        with pytest.raises(OSError, match="port"):
            _fail()
        assert gc.get_threshold() == PYTHONS
        assert gc.get_freeze_count() == 0
