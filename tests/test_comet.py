from __future__ import annotations

import asyncio
import datetime
import decimal
import os
import threading
import uuid
from collections.abc import Awaitable, Iterator
from functools import partial
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import connection, transaction
from django.test import RequestFactory, override_settings
from django.utils.translation import gettext_lazy

from tests.comet_channels import until_parked
from tests.database import opened
from tornjango import comet, db
from tornjango.comet import hub

FAR = 60.0


@pytest.fixture
def channel() -> str:
    """A channel of this test's own: the logs outlive it, as they do in a server."""
    return f"open:{uuid.uuid4()}"


@pytest.fixture
def database_connection(database: None) -> Iterator[None]:
    connection.ensure_connection()
    yield
    connection.close()


async def _parked(waiting: Awaitable[comet.Answer]) -> asyncio.Future[comet.Answer]:
    parked = asyncio.ensure_future(waiting)
    await until_parked(comet.status()["parked"] + 1)
    return parked


def _data(answer: comet.Answer) -> list[Any]:
    return [message.data for message in answer.messages]


@pytest.mark.gen_test
async def test_message_published_before_waiting_comes_at_once(channel: str) -> None:
    cursor = comet.cursor(channel)
    comet.publish(channel, {"n": 1}, event="new")
    answer = await comet.wait(None, cursor, channel)
    (message,) = answer.messages
    assert (message.channel, message.event, message.data) == (channel, "new", {"n": 1})
    assert (answer.gaps, answer.more, answer.retry) == ([], False, 0)


@pytest.mark.gen_test
async def test_message_published_while_waiting_wakes(channel: str) -> None:
    waiting = await _parked(comet.wait(None, comet.cursor(channel), channel, timeout=FAR))
    comet.publish(channel, 1)
    assert _data(await waiting) == [1]


@pytest.mark.gen_test
async def test_following_by_cursor_brings_everything_once(channel: str) -> None:
    cursor, seen = comet.cursor(channel), []
    for n in range(5):
        comet.publish(channel, n)
        answer = await comet.wait(None, cursor, channel)
        seen += _data(answer)
        cursor = answer.cursor
    assert seen == list(range(5))


@pytest.mark.gen_test
async def test_lost_answer_is_read_again_with_the_same_cursor(channel: str) -> None:
    cursor = comet.cursor(channel)
    comet.publish(channel, 1)
    assert await comet.wait(None, cursor, channel) == await comet.wait(None, cursor, channel)


@pytest.mark.gen_test
async def test_wait_without_a_cursor_brings_one_at_once(channel: str) -> None:
    comet.publish(channel, "before")
    answer = await comet.wait(None, None, channel, timeout=FAR)
    assert answer.messages == []
    comet.publish(channel, "after")
    assert _data(await comet.wait(None, answer.cursor, channel)) == ["after"]


@pytest.mark.gen_test
async def test_channel_added_to_a_poll_starts_now_and_brings_a_cursor_at_once(channel: str) -> None:
    added = f"{channel}-added"
    comet.publish(added, "before")
    answer = await comet.wait(None, comet.cursor(channel), channel, added, timeout=FAR)
    assert answer.messages == []
    comet.publish(added, "after")
    assert _data(await comet.wait(None, answer.cursor, channel, added)) == ["after"]


@pytest.mark.gen_test
async def test_time_out_answers_empty_with_a_cursor_that_has_moved_on(channel: str) -> None:
    cursor = comet.cursor(channel)
    comet.publish(f"{channel}-other", 1)
    answer = await comet.wait(None, cursor, channel, timeout=0.001)
    assert (answer.messages, answer.gaps) == ([], [])
    assert answer.cursor != cursor


@pytest.mark.gen_test
async def test_time_out_of_zero_only_looks(channel: str) -> None:
    answer = await comet.wait(None, comet.cursor(channel), channel, timeout=0)
    assert answer.messages == []


@pytest.mark.gen_test
async def test_time_out_comes_from_the_settings(channel: str) -> None:
    with override_settings(TORNJANGO={"COMET": {"POLL_TIMEOUT": 0.001}}):
        assert (await comet.wait(None, comet.cursor(channel), channel)).messages == []


@pytest.mark.gen_test
async def test_cancelled_wait_is_forgotten(channel: str) -> None:
    before = comet.status()["parked"]
    waiting = await _parked(comet.wait(None, comet.cursor(channel), channel, timeout=FAR))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert comet.status()["parked"] == before


@pytest.mark.gen_test
async def test_message_published_while_the_authoriser_thinks_is_not_lost() -> None:
    thinking, go_on = asyncio.Event(), asyncio.Event()

    async def thoughtful(request: object, name: str) -> bool:
        thinking.set()
        await go_on.wait()
        return True

    channel = f"thoughtful-{uuid.uuid4()}:<str:name>"
    comet.channel(channel)(thoughtful)
    name = channel.replace("<str:name>", "x")
    request = RequestFactory().get("/")
    waiting = asyncio.ensure_future(comet.wait(request, None, name))
    await thinking.wait()
    comet.publish(name, 1)
    go_on.set()
    assert _data(await waiting) == [1]


@pytest.mark.gen_test
async def test_refused_reader_parks_nothing() -> None:
    before = comet.status()["parked"]
    request = RequestFactory().get("/")
    with pytest.raises(comet.ChannelForbidden):
        await comet.wait(request, comet.cursor("number:3"), "number:3")
    assert comet.status()["parked"] == before


@pytest.mark.gen_test
async def test_reader_that_stayed_away_too_long_is_told_of_a_gap(channel: str) -> None:
    short = channel.replace("open", "short")
    cursor = comet.cursor(short, channel)
    comet.publish(channel, "kept")
    for n in range(4):
        comet.publish(short, n)
    answer = await comet.wait(None, cursor, short, channel)
    assert (answer.gaps, _data(answer)) == ([short], ["kept"])
    comet.publish(short, "on")
    assert _data(await comet.wait(None, answer.cursor, short, channel)) == ["on"]


@pytest.mark.gen_test
async def test_restarted_process_tells_a_gap(channel: str) -> None:
    comet.publish(channel, 1)
    cursor = comet.cursor(channel)
    hub._forget()
    comet.publish(channel, 2)
    assert (await comet.wait(None, cursor, channel)).gaps == [channel]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_process_does_not_number_on_under_the_same_epoch() -> None:
    before = hub.get_hub()
    child = os.fork()
    if child == 0:
        os._exit(1 if hub.get_hub() is before else 0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert hub.get_hub() is before


@pytest.mark.gen_test
async def test_many_messages_come_in_bounded_answers_without_waiting(channel: str) -> None:
    cursor = comet.cursor(channel)
    sizes: list[int] = []
    seen: list[Any] = []
    for n in range(150):
        comet.publish(channel, n)
    more = True
    while more:
        answer = await comet.wait(None, cursor, channel, timeout=FAR)
        sizes.append(len(answer.messages))
        seen += _data(answer)
        cursor, more = answer.cursor, answer.more
    assert (sizes, seen) == ([100, 50], list(range(150)))


@pytest.mark.gen_test
async def test_large_messages_come_in_answers_of_bounded_size(channel: str) -> None:
    cursor = comet.cursor(channel)
    for _ in range(14):
        comet.publish(channel, "x" * 60_000)
    answer = await comet.wait(None, cursor, channel)
    assert answer.more
    assert len(answer.json()) < 600_000


@pytest.mark.gen_test
async def test_thread_publishing_as_readers_come_and_go_misses_nobody(channel: str) -> None:
    cursor = comet.cursor(channel)

    async def follow() -> list[Any]:
        own = cursor
        seen: list[Any] = []
        while len(seen) < 200:
            answer = await comet.wait(None, own, channel, timeout=FAR)
            assert not answer.gaps
            seen += _data(answer)
            own = answer.cursor
        return seen

    readers = [asyncio.ensure_future(follow()) for _ in range(20)]
    await until_parked(20)

    def publish() -> None:
        for n in range(200):
            comet.publish(channel, n)

    await asyncio.gather(*[asyncio.to_thread(publish)])
    for seen in await asyncio.gather(*readers):
        assert seen == list(range(200))


def test_publish_before_any_loop_runs_is_kept(channel: str) -> None:
    cursor = comet.cursor(channel)
    comet.publish(channel, 1)
    assert _data(asyncio.run(comet.wait(None, cursor, channel))) == [1]


@pytest.mark.gen_test
async def test_drain_answers_the_parked_with_their_cursor_and_parks_nobody_else(
    channel: str,
) -> None:
    cursor = comet.cursor(channel)
    waiting = await _parked(comet.wait(None, cursor, channel, timeout=FAR))
    assert comet.drain() == 1
    answer = await waiting
    assert (answer.messages, answer.gaps) == ([], [])
    assert answer.retry > 0
    late = await comet.wait(None, answer.cursor, channel, timeout=FAR)
    assert late.retry > 0
    comet.publish(channel, "last")
    assert _data(await comet.wait(None, cursor, channel)) == ["last"]


def test_status_tells_what_is_kept_and_parked(channel: str) -> None:
    before = comet.status()
    comet.publish(channel, 1)
    after = comet.status()
    assert (after["broker"], after["parked"]) == ("memory", 0)
    assert after["published"] == before["published"] + 1


@pytest.mark.gen_test
async def test_answer_is_the_json_that_clients_take(channel: str) -> None:
    cursor = comet.cursor(channel)
    comet.publish(channel, "é \u2028 </script>")
    answer = await comet.wait(None, cursor, channel)
    ((_, at),) = answer.at
    expected = f'{{"messages":[{{"channel":"{channel}","event":null,"data":"é \u2028 </script>"}}],'
    expected += f'"offsets":[{at.offset}],"cursor":"{answer.cursor}","gaps":[],"more":false,"retry":0,'
    expected += f'"epoch":"{at.epoch.hex()}","at":{{"{channel}":{at.offset}}}}}'
    assert answer.json().decode() == expected


# Publishing


@pytest.mark.gen_test
async def test_data_is_anything_django_makes_json_of(channel: str) -> None:
    cursor = comet.cursor(channel)
    moment = datetime.datetime(2009, 6, 1, 12, tzinfo=datetime.UTC)
    comet.publish(channel, [moment, decimal.Decimal("1.50"), gettext_lazy("Yes"), None, {}])
    answer = await comet.wait(None, cursor, channel)
    assert _data(answer) == [["2009-06-01T12:00:00Z", "1.50", "Yes", None, {}]]


@pytest.mark.gen_test
async def test_data_is_what_it_was_when_published(channel: str) -> None:
    cursor, data = comet.cursor(channel), {"n": 1}
    comet.publish(channel, data)
    data["n"] = 2
    assert _data(await comet.wait(None, cursor, channel)) == [{"n": 1}]


@pytest.mark.parametrize(
    ("data", "error"),
    [(object(), TypeError), (float("nan"), ValueError), ("\ud800", ValueError)],
)
def test_data_that_is_no_json_is_an_error_that_names_the_channel(
    channel: str, data: object, error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"published to '{channel}' is not JSON"):
        comet.publish(channel, data)


def test_event_that_is_no_string_is_an_error(channel: str) -> None:
    with pytest.raises(TypeError, match="must be a string, not 7"):
        comet.publish(channel, 1, event=7)  # type: ignore[arg-type]


def test_too_large_message_is_an_error_that_says_what_to_do(channel: str) -> None:
    with pytest.raises(ValueError, match=r"the most is 65536\. .* raise TORNJANGO"):
        comet.publish(channel, "x" * 70_000)
    with pytest.raises(ValueError, match="the most is 300"):
        comet.publish(channel.replace("open", "small"), "x" * 300)


def test_publishing_to_an_undeclared_channel_is_an_error_that_lists_the_declared() -> None:
    with pytest.raises(comet.UnknownChannel, match=r"no channel 'nope'.*channels\.py.*open:<str"):
        comet.publish("nope", 1)
    with pytest.raises(comet.UnknownChannel):
        comet.cursor("nope")


def _published() -> int:
    return int(comet.status()["published"])


@pytest.mark.usefixtures("database_connection")
def test_message_in_a_transaction_goes_out_on_commit(channel: str) -> None:
    before = _published()
    with transaction.atomic():
        with transaction.atomic():
            comet.publish(channel, 1)
        assert _published() == before
    assert _published() == before + 1


@pytest.mark.usefixtures("database_connection")
def test_message_in_a_transaction_or_savepoint_rolled_back_never_goes_out(channel: str) -> None:
    before = _published()
    with transaction.atomic():
        with transaction.atomic():
            comet.publish(channel, "of the savepoint")
            transaction.set_rollback(True)
        comet.publish(channel, "kept")
    assert _published() == before + 1
    with transaction.atomic():
        comet.publish(channel, 1)
        transaction.set_rollback(True)
    assert _published() == before + 1


@pytest.mark.usefixtures("database_connection")
def test_message_published_now_does_not_wait_for_the_transaction(channel: str) -> None:
    before = _published()
    with transaction.atomic():
        comet.publish(channel, 1, now=True)
        transaction.set_rollback(True)
    assert _published() == before + 1


@pytest.mark.usefixtures("database_connection")
def test_error_in_the_data_is_raised_inside_the_transaction(channel: str) -> None:
    with transaction.atomic(), pytest.raises(TypeError):
        comet.publish(channel, object())


@pytest.mark.gen_test
async def test_publishing_on_the_loop_touches_no_database(channel: str) -> None:
    assert connection.connection is None
    before = _published()
    comet.publish(channel, 1)
    assert _published() == before + 1
    assert connection.connection is None


def test_publishing_outside_a_transaction_opens_no_connection(channel: str) -> None:
    opened: list[object] = []

    def publish() -> None:
        comet.publish(channel, 1)
        opened.append(connection.connection)

    thread = threading.Thread(target=publish)
    thread.start()
    thread.join()
    assert opened == [None]


@pytest.mark.usefixtures("database")
@pytest.mark.gen_test
async def test_message_of_a_worker_thread_goes_out_when_its_transaction_commits(
    channel: str,
) -> None:
    cursor = comet.cursor(channel)
    published, commit = threading.Event(), threading.Event()

    def comment() -> None:
        with transaction.atomic():
            comet.publish(channel, "comment")
            published.set()
            commit.wait(FAR)
        connection.close()

    commenting = asyncio.ensure_future(sync_to_async(comment, thread_sensitive=False)())
    await asyncio.to_thread(partial(published.wait, FAR))
    assert (await comet.wait(None, cursor, channel, timeout=0)).messages == []
    waiting = await _parked(comet.wait(None, cursor, channel, timeout=FAR))
    commit.set()
    assert _data(await waiting) == ["comment"]
    await commenting


@pytest.mark.gen_test
async def test_message_of_async_code_goes_out_when_its_transaction_commits(
    channel: str, database: None
) -> None:
    async with opened():
        waiting = await _parked(comet.wait(None, comet.cursor(channel), channel, timeout=FAR))
        async with db.atomic():
            comet.publish(channel, "rolled back")
            transaction.set_rollback(True)
        async with db.atomic():
            comet.publish(channel, "committed")
            comet.publish(channel, "at once", now=True)
            assert _data(await waiting) == ["at once"]
            waiting = await _parked(comet.wait(None, comet.cursor(channel), channel, timeout=FAR))
        assert _data(await waiting) == ["committed"]
