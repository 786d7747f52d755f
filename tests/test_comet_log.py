from __future__ import annotations

import json
import secrets
from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tornjango.comet.log import EPOCH_BYTES, Channel, Limits, Logs, Message, Position, Reading

LIMITS = Limits(history=100, ttl=60, max_bytes=10_000)
ROOM = Channel("room", LIMITS)
HALL = Channel("hall", LIMITS)


def _logs(max_channels: int = 100) -> Logs:
    logs = Logs(max_channels=max_channels, max_bytes=10**9)
    logs.restart(Position(secrets.token_bytes(EPOCH_BYTES), 0))
    return logs


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


def test_position_beyond_the_end_is_a_gap() -> None:
    logs = _logs()
    epoch, offset = logs.end
    assert _read(logs, (ROOM, Position(epoch, offset + 1))).gaps == ["room"]


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
    _append(logs, HALL, b"2", now=10)
    assert logs.status()["channels"] == 1
    assert not _read(logs, (ROOM, start), now=10).has_news


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


def test_readers_leave_no_trace() -> None:
    logs = _logs()
    for n in range(1000):
        _read(logs, (Channel(f"made up {n}", LIMITS), logs.end))
    assert logs.status()["channels"] == 0


def test_answer_is_bounded_in_messages_and_continues_where_it_ended() -> None:
    logs = _logs()
    start = logs.end
    for n in range(6):
        logs.append(ROOM if n % 2 else HALL, b"%d" % n, now=0)
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
        self.logs = Logs(max_channels=3)
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
        self.logs = Logs(max_channels=3)
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
