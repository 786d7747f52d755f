from __future__ import annotations

import json
import secrets
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tornjango.comet.log import (
    EPOCH_BYTES,
    Audience,
    Backlog,
    Channel,
    Limits,
    Logs,
    Message,
    Position,
    Reading,
)

LIMITS = Limits(history=100, ttl=60, max_bytes=10_000)
ROOM = Channel("room", LIMITS)
HALL = Channel("hall", LIMITS)


LATEST = Channel("latest", LIMITS._replace(latest=True))


def _logs(
    max_channels: int = 100, max_bytes: int = 10**9, *, broker: bool = False, start: int = 0
) -> Logs:
    logs = Logs(max_channels=max_channels, max_bytes=max_bytes, broker=broker)
    logs.restart(Position(secrets.token_bytes(EPOCH_BYTES), start))
    return logs


def _missing(logs: Logs, *since: tuple[Channel, Position], now: float = 0) -> list[str]:
    reading = _read(logs, *since, now=now)
    positions = {channel.name: position for channel, position in since}
    assert all(reading.positions[name] == positions[name] for name in reading.missing)
    return reading.missing


def _message(channel: Channel, offset: int, body: bytes = b"x", now: float = 0) -> Message:
    return Message(channel.name, offset, now, body)


def _append(logs: Logs, channel: Channel, body: bytes, *, now: float) -> Position:
    logs.append(channel.limits, Message(channel.name, logs.sequence + 1, now, body))
    return logs.end


def _read(
    logs: Logs,
    *since: tuple[Channel, Position],
    now: float = 0,
    count: int = 100,
    size: int = 10**6,
) -> Reading:
    return logs.read(dict(since), now=now, count=count, size=size)


def _bodies(reading: Reading) -> list[bytes]:
    return [message.body for message in reading.messages]


def test_reader_gets_what_came_after_its_position_once_and_in_order() -> None:
    logs = _logs()
    _append(logs, ROOM, b"before", now=0)
    start = logs.end
    _append(logs, ROOM, b"1", now=0)
    _append(logs, ROOM, b"2", now=0)
    reading = _read(logs, (ROOM, start))
    assert _bodies(reading) == [b"1", b"2"]
    assert not reading.gaps
    assert not _read(logs, (ROOM, reading.positions["room"])).has_news


def test_reading_removes_nothing() -> None:
    logs = _logs()
    start = logs.end
    _append(logs, ROOM, b"1", now=0)
    assert _read(logs, (ROOM, start)) == _read(logs, (ROOM, start))


def test_messages_of_several_channels_come_in_the_order_of_publishing() -> None:
    logs = _logs()
    start = logs.end
    for body, channel in [(b"1", ROOM), (b"2", HALL), (b"3", ROOM), (b"4", HALL)]:
        _append(logs, channel, body, now=0)
    assert _bodies(_read(logs, (HALL, start), (ROOM, start))) == [b"1", b"2", b"3", b"4"]


def test_channel_that_was_not_asked_for_is_not_read() -> None:
    logs = _logs()
    start = logs.end
    _append(logs, HALL, b"1", now=0)
    assert not _read(logs, (ROOM, start)).has_news


def test_trimming_by_count_tells_only_those_who_lost_something() -> None:
    logs, room = _logs(), Channel("room", LIMITS._replace(history=2))
    positions = [logs.end, *(_append(logs, room, b"%d" % n, now=0) for n in range(4))]
    assert _read(logs, (room, positions[1])).gaps == ["room"]
    reading = _read(logs, (room, positions[2]))
    assert (_bodies(reading), reading.gaps) == ([b"2", b"3"], [])


def test_trimming_by_bytes_keeps_the_newest_that_fit() -> None:
    logs, room = _logs(), Channel("room", LIMITS._replace(max_bytes=10))
    positions = [logs.end, *(_append(logs, room, b"x" * 4, now=0) for _ in range(4))]
    assert _read(logs, (room, positions[1])).gaps == ["room"]
    assert len(_read(logs, (room, positions[2])).messages) == 2
    assert logs.status()["bytes"] == 8


def test_trimming_by_age_happens_when_reading_too() -> None:
    logs = _logs()
    start = logs.end
    first = _append(logs, ROOM, b"old", now=0)
    _append(logs, ROOM, b"new", now=30)
    assert len(_read(logs, (ROOM, start), now=59).messages) == 2
    assert _read(logs, (ROOM, start), now=60).gaps == ["room"]
    assert _bodies(_read(logs, (ROOM, first), now=60)) == [b"new"]


def test_reader_that_had_seen_everything_has_no_gap_when_all_is_forgotten() -> None:
    logs = _logs()
    position = _append(logs, ROOM, b"1", now=0)
    assert not _read(logs, (ROOM, position), now=1000).has_news
    _append(logs, HALL, b"2", now=1000)
    assert logs.status()["channels"] == 1
    assert not _read(logs, (ROOM, position), now=1000).has_news


def test_log_without_messages_stays_for_a_while_so_that_quiet_channels_beside_it_have_no_gap() -> (
    None
):
    limits = LIMITS._replace(ttl=1)
    logs, typing, quiet = _logs(), Channel("typing", limits), Channel("quiet", limits)
    start = logs.end
    _append(logs, typing, b"1", now=0)
    _append(logs, HALL, b"2", now=30)
    _append(logs, quiet, b"3", now=30)
    reading = _read(logs, (quiet, start), (typing, start), now=30)
    assert (_bodies(reading), reading.gaps) == ([b"3"], ["typing"])


def test_gap_repeats_nothing_and_continues_from_the_present() -> None:
    logs, room = _logs(), Channel("room", LIMITS._replace(history=1))
    start = logs.end
    _append(logs, room, b"1", now=0)
    _append(logs, room, b"2", now=0)
    reading = _read(logs, (room, start))
    assert (reading.gaps, reading.messages) == (["room"], [])
    _append(logs, room, b"3", now=0)
    assert _bodies(_read(logs, (room, reading.positions["room"]))) == [b"3"]


def test_gap_in_one_channel_does_not_hold_back_another() -> None:
    logs, room = _logs(), Channel("room", LIMITS._replace(history=1))
    start = logs.end
    for channel, body in [(room, b"1"), (room, b"2"), (HALL, b"3")]:
        _append(logs, channel, body, now=0)
    reading = _read(logs, (room, start), (HALL, start))
    assert (reading.gaps, _bodies(reading)) == (["room"], [b"3"])


def test_position_of_another_epoch_is_a_gap_though_its_offset_would_do() -> None:
    before, after = _logs(), _logs()
    position = _append(before, ROOM, b"before", now=0)
    _append(after, ROOM, b"after", now=0)
    assert _read(after, (ROOM, position)).gaps == ["room"]


def test_reader_from_before_a_restart_is_told_once_however_far_it_was() -> None:
    before, after = _logs(), _logs()
    for _ in range(5):
        _append(before, ROOM, b"before", now=0)
    _append(after, HALL, b"1", now=0)
    reading = _read(after, (ROOM, before.end))
    assert reading.gaps == ["room"]
    _append(after, ROOM, b"2", now=0)
    assert _bodies(_read(after, (ROOM, reading.positions["room"]))) == [b"2"]


def test_position_ahead_waits_until_this_process_has_caught_up() -> None:
    logs = _logs()
    ahead = Position(logs.epoch, 2)
    assert not _read(logs, (ROOM, ahead)).has_news
    for body in (b"1", b"2"):
        _append(logs, ROOM, body, now=0)
        reading = _read(logs, (ROOM, ahead))
        assert (reading.has_news, reading.positions["room"]) == (False, ahead)
    _append(logs, ROOM, b"3", now=0)
    assert _bodies(_read(logs, (ROOM, ahead))) == [b"3"]


def test_messages_come_in_the_order_of_their_numbers_or_not_at_all() -> None:
    logs = _logs(start=5)
    for offset in (5, 7):
        with pytest.raises(ValueError, match=f"{offset} came after 5"):
            logs.append(LIMITS, _message(ROOM, offset))
    logs.append(LIMITS, _message(ROOM, 6))
    assert logs.end.offset == 6


def test_dropped_and_recreated_log_is_a_gap_for_those_who_lost_something() -> None:
    logs = _logs()
    start = logs.end
    seen = _append(logs, ROOM, b"1", now=0)
    _append(logs, HALL, b"2", now=100)
    assert _read(logs, (ROOM, start), now=100).gaps == ["room"]
    _append(logs, ROOM, b"3", now=100)
    assert _read(logs, (ROOM, start), now=100).gaps == ["room"]
    assert _bodies(_read(logs, (ROOM, seen), now=100)) == [b"3"]


def test_short_lived_channels_that_go_cause_no_gap_in_quiet_ones() -> None:
    logs, typing = _logs(), Channel("typing", LIMITS._replace(ttl=1))
    start = logs.end
    _append(logs, typing, b"1", now=0)
    _append(logs, HALL, b"2", now=100)
    assert logs.status()["channels"] == 1
    assert not _read(logs, (ROOM, start), now=100).has_news


def test_too_many_channels_drop_the_longest_untouched() -> None:
    logs = _logs(max_channels=2)
    start = logs.end
    for n, name in enumerate(["a", "b", "a", "c"]):
        _append(logs, Channel(name, LIMITS), b"x", now=n)
    assert logs.status() == {"channels": 2, "messages": 3, "bytes": 3, "published": 4}
    assert _read(logs, (Channel("b", LIMITS), start)).gaps == ["b"]
    assert len(_read(logs, (Channel("a", LIMITS), start)).messages) == 2


def test_too_many_channels_of_different_limits_drop_the_longest_untouched_of_all() -> None:
    logs, other = _logs(max_channels=1), Channel("other", LIMITS._replace(history=5))
    start = logs.end
    _append(logs, ROOM, b"1", now=0)
    _append(logs, other, b"2", now=1)
    assert _read(logs, (ROOM, start)).gaps == ["room"]
    assert _bodies(_read(logs, (other, start))) == [b"2"]


def test_too_many_bytes_in_all_drop_the_longest_untouched() -> None:
    logs = _logs(max_bytes=100)
    start = logs.end
    for n, name in enumerate(["a", "b", "c"]):
        _append(logs, Channel(name, LIMITS), b"x" * 40, now=n)
    assert (logs.status()["bytes"], logs.status()["channels"]) == (80, 2)
    assert _read(logs, (Channel("a", LIMITS), start)).gaps == ["a"]
    assert len(_read(logs, (Channel("b", LIMITS), start)).messages) == 1


def test_one_channel_alone_may_have_what_its_limits_allow() -> None:
    logs = _logs(max_bytes=10)
    start = logs.end
    _append(logs, ROOM, b"x" * 40, now=0)
    assert len(_read(logs, (ROOM, start)).messages) == 1
    _append(logs, HALL, b"x" * 40, now=1)
    assert (logs.status()["bytes"], logs.status()["channels"]) == (40, 1)


def test_latest_is_the_newest_only_and_never_an_older_one_again() -> None:
    logs = _logs()
    start = logs.end
    for body in (b"1", b"2", b"3"):
        _append(logs, LATEST, body, now=0)
    reading = _read(logs, (LATEST, start))
    assert (_bodies(reading), reading.gaps) == ([b"3"], [])
    assert not _read(logs, (LATEST, reading.positions["latest"])).has_news


def test_latest_has_no_gap_when_older_messages_are_forgotten() -> None:
    logs, latest = _logs(), Channel("latest", LIMITS._replace(latest=True, history=1))
    start = logs.end
    for body in (b"1", b"2", b"3"):
        _append(logs, latest, body, now=0)
    assert _bodies(_read(logs, (latest, start))) == [b"3"]


def _append_for(logs: Logs, user: str | None, body: bytes) -> Position:
    audience = None if user is None else Audience(frozenset({user}), frozenset())
    logs.append(LATEST.limits, Message("latest", logs.sequence + 1, 0, body, audience))
    return logs.end


def test_latest_is_the_newest_for_all_and_since_then_the_newest_for_each_audience() -> None:
    logs = _logs()
    start = logs.end
    for user, body in [
        (None, b"1"),
        ("a", b"2"),
        (None, b"3"),
        ("a", b"4"),
        ("b", b"5"),
        ("a", b"6"),
    ]:
        _append_for(logs, user, body)
    assert _bodies(_read(logs, (LATEST, start))) == [b"3", b"5", b"6"]


def test_latest_for_some_does_not_hide_that_the_latest_for_all_is_forgotten() -> None:
    logs, latest = _logs(), Channel("latest", LIMITS._replace(latest=True, history=1))
    start = logs.end
    audience = Audience(frozenset({"a"}), frozenset())
    logs.append(latest.limits, Message("latest", 1, 0, b"1"))
    logs.append(latest.limits, Message("latest", 2, 0, b"2", audience))
    assert _read(logs, (latest, start)).gaps == ["latest"]


def test_latest_has_a_gap_when_its_newest_message_is_forgotten() -> None:
    logs = _logs()
    start = logs.end
    _append(logs, LATEST, b"1", now=0)
    assert _read(logs, (LATEST, start), now=1000).gaps == ["latest"]


def test_latest_comes_after_what_was_published_before_it_when_the_answer_is_cut() -> None:
    logs = _logs()
    start = logs.end
    for channel, body in [(LATEST, b"1"), (ROOM, b"2"), (ROOM, b"3"), (LATEST, b"4")]:
        _append(logs, channel, body, now=0)
    cut = _read(logs, (ROOM, start), (LATEST, start), count=1)
    assert (_bodies(cut), cut.more) == ([b"2"], True)
    positions = ((ROOM, cut.positions["room"]), (LATEST, cut.positions["latest"]))
    assert _bodies(_read(logs, *positions)) == [b"3", b"4"]


def test_with_a_broker_what_came_before_this_process_is_missing_and_not_a_gap() -> None:
    logs = _logs(broker=True, start=10)
    before = Position(logs.epoch, 8)
    assert _missing(logs, (ROOM, before)) == ["room"]
    assert not _missing(logs, (ROOM, logs.end))
    _append(logs, ROOM, b"11", now=0)
    assert _missing(logs, (ROOM, before)) == ["room"]
    assert _bodies(_read(logs, (ROOM, Position(logs.epoch, 10)))) == [b"11"]


def test_missing_channel_holds_back_no_other() -> None:
    logs = _logs(broker=True, start=10)
    _append(logs, HALL, b"11", now=0)
    before, end = Position(logs.epoch, 8), Position(logs.epoch, 10)
    reading = _read(logs, (ROOM, before), (HALL, end))
    assert (_bodies(reading), reading.missing) == ([b"11"], ["room"])
    assert reading.positions == {"room": before, "hall": logs.end}


def test_filled_channel_has_what_the_broker_had_and_what_came_meanwhile() -> None:
    logs = _logs(broker=True, start=10)
    before, asked = Position(logs.epoch, 5), logs.end
    _append(logs, ROOM, b"11", now=0)
    backlog = [_message(ROOM, 6, b"6"), _message(ROOM, 10, b"10"), _message(ROOM, 11, b"11")]
    logs.fill(ROOM, Backlog(backlog, 4), asked, 0)
    assert _bodies(_read(logs, (ROOM, before))) == [b"6", b"10", b"11"]
    assert _bodies(_read(logs, (ROOM, Position(logs.epoch, 4)))) == [b"6", b"10", b"11"]
    assert _read(logs, (ROOM, Position(logs.epoch, 3))).gaps == ["room"]


def test_backlog_that_is_ahead_of_this_process_brings_nothing_twice() -> None:
    logs = _logs(broker=True, start=10)
    before = Position(logs.epoch, 9)
    logs.fill(ROOM, Backlog([_message(ROOM, 10), _message(ROOM, 12)], 0), logs.end, 0)
    _append(logs, HALL, b"11", now=0)
    _append(logs, ROOM, b"12", now=0)
    assert [message.offset for message in _read(logs, (ROOM, before)).messages] == [10, 12]


def test_channel_that_the_broker_knows_nothing_of_is_missing_no_longer() -> None:
    logs = _logs(broker=True, start=10)
    logs.fill(ROOM, Backlog([], 0), logs.end, 0)
    reading = _read(logs, (ROOM, Position(logs.epoch, 3)))
    assert (reading.has_news, reading.missing, reading.positions["room"]) == (False, [], logs.end)


def test_backlog_asked_for_before_a_log_was_dropped_is_not_taken_for_all() -> None:
    logs = _logs(max_channels=1, broker=True, start=10)
    before, asked = Position(logs.epoch, 9), logs.end
    _append(logs, ROOM, b"11", now=0)
    _append(logs, HALL, b"12", now=1)
    logs.fill(ROOM, Backlog([_message(ROOM, 10)], 9), asked, 1)
    assert _missing(logs, (ROOM, before)) == ["room"]
    logs.fill(ROOM, Backlog([_message(ROOM, 10), _message(ROOM, 11)], 9), logs.end, 1)
    assert [message.offset for message in _read(logs, (ROOM, before), now=1).messages] == [10, 11]


def test_backlog_asked_for_before_the_logs_began_anew_is_not_taken_for_all() -> None:
    logs = _logs(broker=True, start=10)
    before, asked = Position(logs.epoch, 9), logs.end
    logs.restart(Position(logs.epoch, 20))
    logs.fill(ROOM, Backlog([_message(ROOM, 10)], 9), asked, 0)
    assert _missing(logs, (ROOM, before)) == ["room"]


@pytest.mark.parametrize("of_the_answer", [False, True])
def test_backlog_of_another_epoch_is_not_taken(of_the_answer: bool) -> None:
    logs = _logs(broker=True, start=10)
    before, asked = Position(logs.epoch, 9), logs.end
    other = secrets.token_bytes(EPOCH_BYTES)
    if not of_the_answer:
        logs.restart(Position(other, 10))
        before = Position(other, 9)
    logs.fill(ROOM, Backlog([_message(ROOM, 10)], 0, other), asked, 0)
    assert _missing(logs, (ROOM, before)) == ["room"]


def test_filled_channel_is_within_its_limits() -> None:
    logs, room = _logs(broker=True, start=10), Channel("room", LIMITS._replace(history=2))
    backlog = [_message(room, n, b"four") for n in range(1, 6)]
    logs.fill(room, Backlog(backlog, 0), logs.end, 0)
    assert (logs.status()["messages"], logs.status()["bytes"]) == (2, 8)
    assert _read(logs, (room, Position(logs.epoch, 2))).gaps == ["room"]
    assert len(_read(logs, (room, Position(logs.epoch, 3))).messages) == 2


def test_channel_that_was_just_filled_is_the_last_to_be_dropped() -> None:
    logs = _logs(max_channels=1, broker=True, start=10)
    _append(logs, ROOM, b"11", now=5)
    before = Position(logs.epoch, 3)
    for channel in (HALL, ROOM):
        logs.fill(channel, Backlog([], 0), logs.end, 5)
        assert not _missing(logs, (channel, before), now=5)
        assert logs.status()["channels"] == 1


def test_latest_needs_no_broker_when_a_message_is_here() -> None:
    logs = _logs(broker=True, start=10)
    before = Position(logs.epoch, 8)
    assert _missing(logs, (LATEST, before)) == ["latest"]
    _append(logs, LATEST, b"11", now=0)
    assert _bodies(_read(logs, (LATEST, before))) == [b"11"]


def test_restart_under_the_same_epoch_loses_nothing_that_the_broker_has() -> None:
    logs = _logs(broker=True)
    _append(logs, ROOM, b"1", now=0)
    seen = logs.end
    logs.restart(Position(logs.epoch, 10))
    assert logs.status() == {"channels": 0, "messages": 0, "bytes": 0, "published": 1}
    assert _missing(logs, (ROOM, seen)) == ["room"]
    logs.fill(ROOM, Backlog([_message(ROOM, 1), _message(ROOM, 7)], 0), logs.end, 0)
    assert [message.offset for message in _read(logs, (ROOM, seen)).messages] == [7]


def test_restart_under_another_epoch_is_a_gap_for_everyone() -> None:
    logs = _logs(broker=True, start=10)
    end = logs.end
    logs.restart(Position(secrets.token_bytes(EPOCH_BYTES), 10))
    assert _read(logs, (ROOM, end), (LATEST, end)).gaps == ["room", "latest"]


def test_readers_leave_no_trace() -> None:
    logs = _logs()
    for n in range(1000):
        _read(logs, (Channel(f"made up {n}", LIMITS), logs.end))
    assert logs.status()["channels"] == 0


def test_answer_is_bounded_in_messages_and_continues_where_it_ended() -> None:
    logs = _logs()
    start = logs.end
    for n in range(6):
        _append(logs, ROOM if n % 2 else HALL, b"%d" % n, now=0)
    first = _read(logs, (ROOM, start), (HALL, start), count=4)
    assert (_bodies(first), first.more) == ([b"0", b"1", b"2", b"3"], True)
    positions = ((ROOM, first.positions["room"]), (HALL, first.positions["hall"]))
    rest = _read(logs, *positions, count=4)
    assert (_bodies(rest), rest.more) == ([b"4", b"5"], False)


def test_answer_is_bounded_in_bytes_but_never_empty() -> None:
    logs = _logs()
    start = logs.end
    for _ in range(3):
        _append(logs, ROOM, b"x" * 10, now=0)
    assert len(_read(logs, (ROOM, start), size=20).messages) == 2
    assert len(_read(logs, (ROOM, start), size=19).messages) == 1
    assert len(_read(logs, (ROOM, start), size=1).messages) == 1


def test_reader_ahead_in_one_channel_stays_ahead_when_the_answer_is_cut() -> None:
    logs = _logs()
    start = logs.end
    for n in range(3):
        _append(logs, ROOM, b"%d" % n, now=0)
    ahead = _append(logs, HALL, b"seen", now=0)
    cut = _read(logs, (ROOM, start), (HALL, ahead), count=1)
    positions = ((ROOM, cut.positions["room"]), (HALL, cut.positions["hall"]))
    assert _bodies(_read(logs, *positions)) == [b"1", b"2"]


def test_a_burst_of_expired_channels_is_dropped_in_portions() -> None:
    logs = _logs()
    for n in range(50):
        _append(logs, Channel(f"{n}", LIMITS), b"x", now=0)
    for _ in range(10):
        _append(logs, ROOM, b"x", now=1000)
    assert logs.status()["channels"] == 1


class Readers(RuleBasedStateMachine):
    """Any mixture of publishing, time going by, and readers that come back with whichever cursor they remember."""

    NAMES = ("a", "b", "c", "d")
    CHANNELS = (
        Channel("a", Limits(history=3, ttl=50, max_bytes=1000)),
        Channel("b", Limits(history=3, ttl=50, max_bytes=1000)),
        Channel("c", Limits(history=20, ttl=7, max_bytes=40)),
        Channel("d", Limits(history=5, ttl=1000, max_bytes=25)),
    )

    def __init__(self) -> None:
        super().__init__()
        self.logs = _logs(max_channels=3)
        self.now = 0.0
        self.published: dict[str, list[int]] = {name: [] for name in self.NAMES}
        # What each remembered cursor stands for: its positions, and how many messages of each channel are behind it.
        self.cursors: list[tuple[dict[str, Position], dict[str, int]]] = []
        self._remember({channel.name: self.logs.end for channel in self.CHANNELS})

    def _remember(self, positions: dict[str, Position]) -> None:
        behind = {name: len(self.published[name]) for name in positions}
        self.cursors.append((positions, behind))

    @rule(channel=st.sampled_from(CHANNELS), width=st.integers(1, 12))
    def publish(self, channel: Channel, width: int) -> None:
        number = len(self.published[channel.name])
        self.published[channel.name].append(number)
        _append(self.logs, channel, json.dumps(number).encode().rjust(width), now=self.now)

    @rule(seconds=st.sampled_from([0.5, 3, 10, 60, 2000]))
    def time_goes_by(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def restart(self) -> None:
        self.logs = _logs(max_channels=3)
        for name in self.NAMES:
            # What nobody has read is gone; the cursors from before must all be told.
            self.published[name].append(-1)

    @rule(channels=st.sets(st.sampled_from(CHANNELS), min_size=1))
    def new_reader(self, channels: set[Channel]) -> None:
        self._remember({channel.name: self.logs.end for channel in channels})

    @rule(data=st.data(), count=st.integers(1, 5), size=st.integers(1, 60))
    def read(self, data: st.DataObject, count: int, size: int) -> None:
        positions, behind = data.draw(st.sampled_from(self.cursors))
        since = {
            channel: positions[channel.name]
            for channel in self.CHANNELS
            if channel.name in positions
        }
        reading = self.logs.read(since, now=self.now, count=count, size=size)
        after = {}
        for name in positions:
            seen = [json.loads(m.body) for m in reading.messages if m.channel == name]
            if name in reading.gaps:
                assert not seen
                after[name] = len(self.published[name])
            else:
                start = behind[name]
                assert seen == self.published[name][start : start + len(seen)]
                after[name] = start + len(seen)
                if not reading.more:
                    assert after[name] == len(self.published[name])
        assert reading.messages or reading.gaps or not reading.more
        self.cursors.append((reading.positions, after))

    @invariant()
    def bounded(self) -> None:
        assert self.logs.status()["channels"] <= 3

    @invariant()
    def offsets_grow(self) -> None:
        reading = self.logs.read(
            {channel: Position(self.logs.epoch, 0) for channel in self.CHANNELS},
            now=self.now,
            count=1000,
            size=10**6,
        )
        assert all(a.offset < b.offset for a, b in pairwise(reading.messages))


Readers.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestReaders = Readers.TestCase
