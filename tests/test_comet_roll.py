from __future__ import annotations

import pytest

from tornjango.comet.roll import Member, Roll

ANN, BOB = Member("1", 7, "ann"), Member("2")


@pytest.fixture
def roll() -> Roll:
    return Roll()


def _changed(roll: Roll) -> set[str]:
    changed, roll.changed = roll.changed, set()
    return changed


def test_members_are_told_the_longest_present_first(roll: Roll) -> None:
    assert roll.join("p", "room", ANN)
    assert roll.join("q", "room", BOB)
    assert roll.members("room") == [ANN, BOB]
    assert roll.members("room", 1) == [ANN]
    assert (roll.count("room"), _changed(roll)) == (2, {"room"})


def test_member_by_two_processes_counts_once_until_both_let_go(roll: Roll) -> None:
    roll.join("p", "room", ANN)
    _changed(roll)
    assert roll.join("q", "room", ANN)
    assert roll.leave("p", "room", ANN.id)
    assert (roll.members("room"), roll.holders("room"), _changed(roll)) == ([ANN], ["q"], set())
    assert roll.leave("q", "room", ANN.id)
    assert (roll.members("room"), list(roll.channels()), _changed(roll)) == ([], [], {"room"})


def test_coming_twice_and_leaving_twice_is_no_news(roll: Roll) -> None:
    roll.join("p", "room", ANN)
    assert not roll.join("p", "room", ANN)
    roll.leave("p", "room", ANN.id)
    assert not roll.leave("p", "room", ANN.id)
    assert not roll.leave("q", "hall", ANN.id)
    assert roll.count("room") == 0


def test_member_whose_user_is_another_one_has_changed(roll: Roll) -> None:
    roll.join("p", "room", Member("1"))
    _changed(roll)
    assert roll.join("p", "room", ANN)
    assert (roll.members("room"), _changed(roll)) == ([ANN], {"room"})
    roll.leave("p", "room", ANN.id)
    assert roll.count("room") == 0


def test_state_that_replaces_another_changes_only_what_differs(roll: Roll) -> None:
    for channel in ("same", "other", "left"):
        roll.join("p", channel, ANN)
    _changed(roll)
    roll.replace("p", [("same", ANN), ("other", BOB)])
    assert _changed(roll) == {"other", "left"}
    assert sorted(roll.entries("p")) == [("other", BOB), ("same", ANN)]


def test_process_that_is_gone_takes_its_members_along(roll: Roll) -> None:
    roll.join("p", "room", ANN)
    roll.join("q", "room", BOB)
    roll.remove("p")
    assert (roll.members("room"), list(roll.processes)) == ([BOB], ["q"])
