from __future__ import annotations

import asyncio
import datetime
import decimal
import os
import threading
import time
import uuid
from collections.abc import Awaitable, Iterator
from functools import partial
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth import alogin
from django.contrib.auth.middleware import AuthenticationMiddleware
from django.contrib.auth.models import AnonymousUser, Group, User
from django.contrib.sessions.backends.db import SessionStore
from django.db import connection, transaction
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory, override_settings
from django.utils.translation import gettext_lazy

from tests.comet_channels import until_parked
from tests.database import opened
from tests.serving import until
from tornjango import comet, db
from tornjango.comet import brokers, cursors, hub
from tornjango.comet.brokers.base import Broker, Sink
from tornjango.comet.hub import Hub
from tornjango.comet.log import Backlog, Channel, Message
from tornjango.comet.publishing import encode
from tornjango.conf import get_config
from tornjango.exceptions import BrokerUnavailable

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
    expected += (
        f'"offsets":[{at.offset}],"cursor":"{answer.cursor}","gaps":[],"more":false,"retry":0,'
    )
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


@pytest.mark.gen_test
async def test_apublish_tells_where_its_message_is(channel: str) -> None:
    first = await comet.apublish(channel, 1)
    second = await comet.apublish(channel, 2)
    assert first is not None
    assert second is not None
    assert (second.epoch, second.offset) == (first.epoch, first.offset + 1)


@pytest.mark.gen_test
async def test_apublish_in_a_transaction_waits_for_the_commit(channel: str, database: None) -> None:
    before = _published()
    async with opened():
        async with db.atomic():
            assert await comet.apublish(channel, 1) is None
            assert _published() == before
            assert await comet.apublish(channel, 2, now=True) is not None
            assert _published() == before + 1
        assert _published() == before + 2


@pytest.mark.gen_test
async def test_batch_stays_together_and_in_order(channel: str) -> None:
    cursor, other = comet.cursor(channel, f"{channel}-b"), f"{channel}-b"
    events = [comet.Event([channel, other][n % 2], n, "counted") for n in range(10)]
    assert comet.publish_batch(events) is not None
    assert await comet.apublish_batch(iter(events[:1])) is not None
    answer = await comet.wait(None, cursor, channel, other)
    assert _data(answer) == [*range(10), 0]
    offsets = [message.offset for message in answer.messages]
    assert offsets == list(range(offsets[0], offsets[0] + 11))
    assert {message.event for message in answer.messages} == {"counted"}


def test_batch_with_an_error_in_it_is_not_published_at_all(channel: str) -> None:
    before = _published()
    with pytest.raises(TypeError):
        comet.publish_batch([comet.Event(channel, 1), comet.Event(channel, object())])
    with pytest.raises(comet.UnknownChannel):
        comet.publish_batch([comet.Event(channel, 1), comet.Event("nope", 2)])
    assert _published() == before


def test_empty_batch_is_none() -> None:
    assert comet.publish_batch([]) is None
    assert asyncio.run(comet.apublish_batch([])) is None


# Audiences


def _request_of(user: User | None) -> HttpRequest:
    request = RequestFactory().get("/")

    async def auser() -> User | AnonymousUser:
        return user or AnonymousUser()

    request.auser = auser
    return request


@pytest.fixture
def users(database: None) -> list[User]:
    """Of whom the second is in a group."""
    first, second = [User.objects.create_user(name) for name in ("first", "second")]
    second.groups.add(Group.objects.create(name="editors"))
    return [first, second]


@pytest.mark.gen_test
async def test_audience_narrows_who_gets_a_message(channel: str, users: list[User]) -> None:
    cursor = comet.cursor(channel)
    first, second = users
    comet.publish(channel, "all")
    comet.publish(channel, "first", users=[first])
    comet.publish(channel, "by key", users=[second.pk, 4711])
    comet.publish(channel, "editors", groups=["editors", "nobody"])
    comet.publish(channel, "either", users=[first], groups=["editors"])
    comet.publish(channel, "nobody", users=[], groups=[])
    seen = {
        name: _data(await comet.wait(request, cursor, channel))
        for name, request in {
            "first": _request_of(first),
            "second": _request_of(second),
            "anonymous": _request_of(None),
            "vouched for": None,
        }.items()
    }
    assert seen == {
        "first": ["all", "first", "either"],
        "second": ["all", "by key", "editors", "either"],
        "anonymous": ["all"],
        "vouched for": ["all"],
    }


@pytest.mark.gen_test
async def test_message_for_others_wakes_nobody_and_moves_the_cursor(
    channel: str, users: list[User]
) -> None:
    cursor = comet.cursor(channel)
    request = _request_of(users[0])
    waiting = await _parked(comet.wait(request, cursor, channel, timeout=FAR))
    comet.publish(channel, "for the second", users=[users[1]])
    comet.publish(channel, "for all")
    answer = await waiting
    assert _data(answer) == ["for all"]
    assert (await comet.wait(request, answer.cursor, channel, timeout=0)).messages == []


@pytest.mark.parametrize("name", ["users", "groups"])
def test_audience_that_is_one_string_is_an_error(name: str, channel: str) -> None:
    with pytest.raises(TypeError, match=f"{name}='ab' must be a list of {name}"):
        comet.publish(channel, 1, **{name: "ab"})  # type: ignore[arg-type]


# Revoking


#: The names of "staff:" channels, each time one is asked for.
asked: list[str] = []


@comet.channel("staff:<str:name>")
async def for_staff(request: HttpRequest, name: str) -> bool:
    asked.append(name)
    return (await request.auser()).is_staff


@pytest.fixture
def staff() -> str:
    asked.clear()
    return f"staff:{uuid.uuid4()}"


async def _logged_in(user: User) -> HttpRequest:
    """As Django's middleware makes it of a session that is in the database."""
    request = RequestFactory().get("/")
    session = SessionStore()
    await session.acreate()
    request.session = session
    await alogin(request, user)
    await session.asave()
    request = RequestFactory().get("/")
    request.session = SessionStore(session.session_key)
    AuthenticationMiddleware(lambda request: HttpResponse()).process_request(request)
    return request


@pytest.fixture
def boss(database: None) -> User:
    return User.objects.create_user("boss", is_staff=True)


@pytest.mark.gen_test
async def test_parked_reader_that_lost_its_right_is_refused_at_once(staff: str, boss: User) -> None:
    """Though its request has known the user all the time."""
    request = await _logged_in(boss)
    waiting = await _parked(comet.wait(request, comet.cursor(staff), staff, timeout=FAR))
    boss.is_staff = False
    await boss.asave()
    comet.revoke(staff)
    comet.publish(staff, "secret")
    with pytest.raises(comet.ChannelForbidden, match="may no longer read") as refused:
        await waiting
    assert refused.value.channels == [staff]


@pytest.mark.gen_test
async def test_parked_reader_that_has_logged_out_is_refused(staff: str, boss: User) -> None:
    request = await _logged_in(boss)
    waiting = await _parked(comet.wait(request, comet.cursor(staff), staff, timeout=FAR))
    await SessionStore(request.session.session_key).aflush()
    await comet.arevoke(staff)
    with pytest.raises(comet.ChannelForbidden):
        await waiting


@pytest.mark.gen_test
async def test_reader_that_keeps_its_right_goes_on_parked(staff: str, boss: User) -> None:
    request = await _logged_in(boss)
    waiting = await _parked(comet.wait(request, comet.cursor(staff), staff, timeout=FAR))
    comet.revoke(staff)
    await until(lambda: len(asked) == 2)
    assert not waiting.done()
    comet.publish(staff, "still")
    answer = await waiting
    assert _data(answer) == ["still"]
    again = await comet.wait(request, comet.cursor(staff), staff, timeout=0, grant=answer.grant)
    assert (len(asked), again.grant) == (2, None)


@pytest.mark.gen_test
async def test_revoking_counts_from_its_commit_on(staff: str, boss: User) -> None:
    request = await _logged_in(boss)
    waiting = await _parked(comet.wait(request, comet.cursor(staff), staff, timeout=FAR))
    async with opened(), db.atomic():
        boss.is_staff = False
        await boss.asave()
        comet.revoke(staff)
        assert not waiting.done()
    with pytest.raises(comet.ChannelForbidden):
        await waiting


@pytest.mark.gen_test
async def test_yes_of_a_reader_that_goes_on_ends_with_its_time(
    staff: str, boss: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = await _logged_in(boss)
    following = comet.follow(request, comet.cursor(staff), staff)
    events = aiter(following)
    first = asyncio.ensure_future(anext(events))
    await until_parked(1)
    boss.is_staff = False
    await boss.asave()
    later = time.time() + 301
    monkeypatch.setattr(time, "time", lambda: later)
    comet.publish(staff, "too late")
    with pytest.raises(comet.ChannelForbidden):
        await first


@pytest.mark.gen_test
async def test_nobody_hears_what_is_published_after_a_revocation_while_it_reads(
    staff: str, boss: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published by another thread, between asking and reading."""
    request = await _logged_in(boss)
    cursor = comet.cursor(staff)
    read = Hub.read
    monkeypatch.setattr(Hub, "read", lambda *args: _revoke_before(read, *args))

    def _revoke() -> None:
        User.objects.update(is_staff=False)
        comet.revoke(staff)
        comet.publish(staff, "secret")

    async def _revoke_before(read: Any, *args: Any) -> Any:
        monkeypatch.undo()
        await sync_to_async(_revoke)()
        return await read(*args)

    with pytest.raises(comet.ChannelForbidden):
        await comet.wait(request, cursor, staff, timeout=FAR)


# Following


@pytest.mark.gen_test
async def test_following_brings_messages_and_gaps_in_order(channel: str) -> None:
    short = channel.replace("open", "short")
    following = comet.follow(None, comet.cursor(channel, short), channel, short)
    for n in range(5):
        comet.publish(short, n)
    comet.publish(channel, "kept")
    events = aiter(following)
    assert await anext(events) == comet.Gap(short)
    message = await anext(events)
    assert isinstance(message, comet.Message)
    assert (message.channel, message.data) == (channel, "kept")
    later = asyncio.ensure_future(anext(events))
    await until_parked(1)
    comet.publish(short, "on")
    assert (await later).data == "on"  # type: ignore[union-attr]
    await events.aclose()  # type: ignore[attr-defined]
    assert comet.status()["parked"] == 0


@pytest.mark.gen_test
async def test_following_that_is_broken_off_anywhere_goes_on_without_loss_or_repetition(
    channel: str,
) -> None:
    other = f"{channel}-other"
    cursor: str | None = comet.cursor(channel, other)
    for n in range(20):
        comet.publish([channel, other][n % 3 == 0], n)
    seen = []
    while len(seen) < 20:
        following = comet.follow(None, cursor, channel, other)
        assert following.cursor == cursor
        async for message in following:
            assert isinstance(message, comet.Message)
            seen.append(message.data)
            if len(seen) % 3 == 0 or len(seen) == 20:
                break
        cursor = following.cursor
    assert seen == list(range(20))


@pytest.mark.gen_test
async def test_following_may_go_on_with_the_same_iterator(channel: str) -> None:
    following = comet.follow(None, comet.cursor(channel), channel)
    for n in range(3):
        comet.publish(channel, n)
    for n in range(3):
        async for message in following:
            assert isinstance(message, comet.Message)
            assert message.data == n
            break


@pytest.mark.gen_test
async def test_following_ends_when_the_server_stops(channel: str) -> None:
    following = comet.follow(None, None, channel)
    seen: list[Any] = []

    async def follow() -> None:
        seen.extend([event async for event in following])

    task = asyncio.ensure_future(follow())
    await until_parked(1)
    comet.publish(channel, "last")
    comet.drain()
    await task
    assert [message.data for message in seen] == ["last"]
    assert following.cursor is not None
    assert (await comet.wait(None, following.cursor, channel, timeout=0)).messages == []


@pytest.mark.gen_test
async def test_following_raises_what_waiting_would() -> None:
    request = RequestFactory().get("/")
    with pytest.raises(comet.ChannelForbidden):
        await anext(aiter(comet.follow(request, None, "number:3")))
    with pytest.raises(comet.InvalidCursor):
        await anext(aiter(comet.follow(None, "forged", "number:2")))


# Crowds, and a broker


class _Broker(Broker):
    """Has a hundred messages of one channel, and its log begins after all of them."""

    name = "counting"

    def __init__(self, channel: str) -> None:
        self.asked = 0
        self.messages = [
            Message(channel, n, time.monotonic(), encode(channel, n, None)) for n in range(1, 101)
        ]

    def append(self, batch: bytes, drafts: Any, known: Any) -> comet.Position:
        raise BrokerUnavailable("It only reads.")

    def tail(self, sink: Sink) -> None:
        if sink.end is None:
            sink.begin(self.head())
        sink.connected()

    def backlog(self, channel: Channel) -> Backlog:
        if channel.name != self.messages[0].channel:
            return Backlog([], 0)
        self.asked += 1
        return Backlog(self.messages, 0)

    def head(self) -> comet.Position:
        return comet.Position(b"12345678", 100)

    def status(self) -> dict[str, int | float | str]:
        return {}

    def close(self) -> None:
        pass


@pytest.mark.gen_test
async def test_thousand_readers_that_come_back_at_once_ask_the_broker_once(
    channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = _Broker(channel)
    monkeypatch.setattr(hub, "_hub", (brokers.key(get_config()), Hub(get_config().COMET, broker)))
    await comet.ready()
    stood = [n % 100 for n in range(1000)]
    starts = [cursors.encode({channel: comet.Position(b"12345678", n)}) for n in stood]
    waits = [comet.wait(None, cursor, channel, timeout=FAR) for cursor in starts]
    for n, answer in zip(stood, await asyncio.gather(*waits), strict=True):
        assert _data(answer) == list(range(n + 1, 101))
    assert broker.asked == 1
    comet.get_hub().close(0)


@pytest.mark.gen_test
async def test_what_a_crowd_is_told_is_made_once(channel: str) -> None:
    cursor = comet.cursor(channel)
    waiting = [comet.wait(None, cursor, channel, timeout=FAR) for _ in range(50)]
    crowd = asyncio.gather(*waiting)
    await until_parked(50)
    comet.publish(channel, "x" * 1000)
    answers = [answer.json() for answer in await crowd]
    assert all(answer is answers[0] for answer in answers)
