"""COMET over WebSocket, through the server: a browser's library on the other side, or one that sends what none would."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlencode

import pytest
from django.contrib.auth.models import User
from django.test import Client
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.comet_channels import thinking, until_parked
from tests.frames import CLOSE, PING, PONG, TEXT, closing, frame, read_frame, shake_hands
from tests.serving import Site, serving, until
from tornjango import comet, watchdog, websockets
from tornjango.comet import clients, sockets
from tornjango.comet.clients import Rates
from tornjango.comet.readers import Answer, Reader
from tornjango.db import pools
from tornjango.exceptions import BrokerUnavailable
from tornjango.testing import RawClient

URL = "/comet/socket/"


@pytest.fixture(autouse=True)
def _no_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_rates", Rates(5))


@pytest.fixture
def channel() -> str:
    return f"open:{uuid.uuid4()}"


@asynccontextmanager
async def site(**bounds: Any) -> AsyncIterator[Site]:
    async with serving(ROOT_URLCONF="tests.comet_urls", TORNJANGO={"COMET": bounds}) as served:
        yield served


class Page:
    """What a page does with its socket."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    async def send(self, **command: Any) -> None:
        await self.socket.send(json.dumps(command))

    async def next(self) -> Any:
        """The next frame, which is text."""
        text = await self.socket.recv()
        assert isinstance(text, str)
        return json.loads(text)

    async def data(self, count: int) -> list[Any]:
        """What the next so many messages say."""
        found: list[Any] = []
        while len(found) < count:
            answer = await self.next()
            assert not answer["gaps"]
            found += [message["data"] for message in answer["messages"]]
        return found

    async def close_code(self) -> int:
        """Once the server has closed it; what comes before is passed over."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self.socket.recv()
        assert self.socket.close_code is not None
        return self.socket.close_code


def target(*channels: str, **query: str) -> str:
    pairs = [("channel", channel) for channel in channels]
    return f"{URL}?{urlencode([*pairs, *query.items()])}"


@asynccontextmanager
async def opened(site: Site, *channels: str, **query: Any) -> AsyncIterator[Page]:
    headers = query.pop("headers", {})
    address = f"ws://127.0.0.1:{site.port}{target(*channels, **query)}"
    async with connect(address, additional_headers=headers) as socket:
        yield Page(socket)


# Following


@pytest.mark.gen_test
async def test_page_hears_where_it_stands_and_then_every_message(channel: str) -> None:
    async with site() as served, opened(served, channel) as page:
        answer = await page.next()
        assert (answer["messages"], answer["gaps"], answer["retry"]) == ([], [], 0)
        assert answer["cursor"]
        assert answer["grant"]
        for number in range(5):
            comet.publish(channel, number, event="counted")
        answer = await page.next()
        assert answer["messages"][0] == {"channel": channel, "event": "counted", "data": 0}
        seen = [message["data"] for message in answer["messages"]]
        assert seen + await page.data(5 - len(seen)) == list(range(5))


@pytest.mark.gen_test
async def test_page_that_comes_back_goes_on_where_it_was(channel: str) -> None:
    async with site() as served:
        async with opened(served, channel) as page:
            cursor = (await page.next())["cursor"]
            comet.publish(channel, 1)
            await page.data(1)  # an answer that it may not have dealt with
        comet.publish(channel, 2)
        async with opened(served, channel, cursor=cursor) as page:
            assert await page.data(2) == [1, 2]
        answer = await comet.wait(None, cursor, channel, timeout=0)  # and on another transport
        assert [message.data for message in answer.messages] == [1, 2]


@pytest.mark.gen_test
async def test_channels_come_and_go_while_it_is_open(channel: str) -> None:
    other, third = f"{channel}-2", f"{channel}-3"
    cursor = comet.cursor(other)
    comet.publish(other, "missed")
    async with site() as served, opened(served) as page:
        await page.send(follow=[channel])
        assert (await page.next())["messages"] == []
        await page.send(follow=[other, channel], cursor=cursor)
        assert await page.data(1) == ["missed"]
        await page.send(leave=[channel, "open:never"])
        await page.send(follow=[third])
        await page.next()  # so it has left by now
        comet.publish(channel, "unheard")
        comet.publish(other, 1)
        comet.publish(third, 2)
        assert await page.data(2) == [1, 2]


@pytest.mark.gen_test
async def test_channel_that_was_left_can_be_followed_again(channel: str) -> None:
    async with site() as served, opened(served, channel) as page:
        cursor = (await page.next())["cursor"]
        await page.send(leave=[channel])
        await page.send(follow=[f"{channel}-2"])
        await page.next()
        comet.publish(channel, 1)
        await page.send(follow=[channel], cursor=cursor)
        assert await page.data(1) == [1]


@pytest.mark.gen_test
async def test_gap_is_told() -> None:
    short = f"short:{uuid.uuid4()}"
    cursor = comet.cursor(short)
    for number in range(5):
        comet.publish(short, number)
    async with site() as served, opened(served, short, cursor=cursor) as page:
        answer = await page.next()
        assert (answer["gaps"], answer["messages"]) == ([short], [])


@pytest.mark.gen_test
async def test_messages_go_on_while_an_authoriser_thinks(channel: str) -> None:
    name = str(uuid.uuid4())
    thinking[name] = asyncio.Event()
    async with site() as served, opened(served, channel) as page:
        await page.next()
        await page.send(follow=[f"slow:{name}"])
        for number in range(20):
            comet.publish(channel, number)
            assert await page.data(1) == [number]
        comet.publish(f"slow:{name}", "meanwhile")
        thinking.pop(name).set()
        assert await page.data(1) == ["meanwhile"]


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("names", "status", "reason"),
    [
        (["nope"], 404, "no channel 'nope'"),
        (["number:2", "number:3"], 403, "may not read the channel 'number:3'"),
        (["raises:missing"], 404, "no such thing"),
        (["raises:denied"], 403, "forbidden"),
        ([f"open:{n}" for n in range(32)], 400, "33 channels are too many"),
    ],
)
async def test_refused_follow_says_why_and_changes_nothing(
    channel: str, names: list[str], status: int, reason: str
) -> None:
    async with site() as served, opened(served, channel) as page:
        await page.next()
        await page.send(follow=names)
        refused = await page.next()
        assert (refused["status"], refused["channels"]) == (status, names)
        assert reason in refused["error"]
        comet.publish("number:2", 1)
        comet.publish(channel, 2)
        assert await page.data(1) == [2]


@pytest.mark.gen_test
async def test_refusal_of_the_first_channels_is_told_over_the_socket() -> None:
    async with site() as served, opened(served, "number:3", cursor="forged") as page:
        refused = await page.next()
        assert (refused["status"], refused["channels"]) == (400, ["number:3"])
        await page.send(follow=["number:3"])
        assert (await page.next())["status"] == 403


@pytest.mark.gen_test
async def test_authoriser_that_fails_is_logged(error_log: list[logging.LogRecord]) -> None:
    async with site() as served, opened(served, "raises:broken") as page:
        assert (await page.next())["status"] == 500
    record = error_log.pop()
    assert record.exc_info
    assert record.exc_info[0] is ZeroDivisionError


@pytest.mark.gen_test
async def test_revoked_channel_is_named_and_the_others_go_on(
    channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = ["number:4", "number:6"]
    async with site() as served, opened(served, channel, *numbers) as page:
        await page.next()
        await _refuse(monkeypatch, "number:4")
        comet.revoke("number:4")
        comet.publish("number:4", "unheard")
        refused = await page.next()
        assert (refused["status"], refused["channels"]) == (403, ["number:4"])
        comet.publish("number:6", 1)
        comet.publish(channel, 2)
        assert await page.data(2) == [1, 2]


async def _refuse(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from tornjango.comet import channels

    ask = channels.Match.ask

    def refuse(match: channels.Match, request: Any) -> Any:
        return False if match.channel.name == name else ask(match, request)

    monkeypatch.setattr(channels.Match, "ask", refuse)


@pytest.mark.gen_test
@pytest.mark.usefixtures("database")
async def test_authoriser_and_publisher_know_the_user_of_the_session() -> None:
    session = await asyncio.to_thread(_log_in, "ann")
    cookie = {"Cookie": f"sessionid={session}"}
    async with site() as served, opened(served, "own:ann", headers=cookie) as page:
        assert (await page.next())["grant"]
        await page.send(publish={"channel": "own:ann", "data": 1}, id=1)
        assert {"published": 1} in [await page.next(), await page.next()]
        assert all(it["in_use"] == 0 for it in pools.status().values())
        await page.send(follow=["own:bob"])
        assert (await page.next())["status"] == 403


def _log_in(name: str) -> str:
    client = Client()
    client.force_login(User.objects.create_user(name))
    return str(client.session.session_key)


# What is said without being asked


@pytest.mark.gen_test
async def test_heartbeats_advance_the_cursor(channel: str) -> None:
    async with site(HEARTBEAT=0.05) as served, opened(served, channel) as page:
        cursor = (await page.next())["cursor"]
        comet.publish(f"{channel}-other", 1)
        beat = await page.next()
        assert beat["messages"] == []
        while beat["cursor"] == cursor:
            beat = await page.next()


@pytest.mark.gen_test
async def test_client_that_answers_pings_stays(channel: str) -> None:
    async with site(HEARTBEAT=0.02) as served, opened(served, channel) as page:
        for _ in range(8):
            await page.next()
        comet.publish(channel, 1)
        assert await page.data(1) == [1]


@pytest.mark.gen_test
async def test_client_that_is_gone_without_a_word_is_noticed(channel: str) -> None:
    async with site(HEARTBEAT=0.05) as served, await served.connect() as client:
        await shake_hands(client, target(channel))
        frames = await _frames(client)
        assert PING in [it.opcode for it in frames]
        assert CLOSE not in [it.opcode for it in frames]
        await until(lambda: not served.application.in_flight)


async def _frames(client: RawClient) -> list[Any]:
    """All until the server closes the connection."""
    frames = []
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
        while True:
            frames.append(await read_frame(client))
    return frames


@pytest.mark.gen_test
async def test_client_is_not_taken_for_gone_while_its_own_frame_is_dealt_with(channel: str) -> None:
    name = str(uuid.uuid4())
    thinking[name] = asyncio.Event()
    async with site(HEARTBEAT=0.02) as served, opened(served, channel) as page:
        await page.send(follow=[f"slow:{name}"])
        for _ in range(8):
            await page.next()
        thinking.pop(name).set()
        comet.publish(f"slow:{name}", 1)
        assert await page.data(1) == [1]


@pytest.mark.gen_test
async def test_client_is_sent_away_for_later_while_the_broker_cannot_be_reached(
    channel: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(reader: Reader, timeout: float) -> Answer:  # noqa: ASYNC109
        raise BrokerUnavailable("It is away.")

    monkeypatch.setattr(Reader, "next", fail)
    async with site() as served, opened(served, channel) as page:
        assert await page.close_code() == 1013
    assert "It is away." in caplog.text


@pytest.mark.gen_test
async def test_watchdog_knows_the_tasks_of_a_socket(channel: str) -> None:
    async with site() as served, opened(served, channel) as page:
        await page.next()
        names = [watchdog._view_of(task) for task in asyncio.all_tasks()]
        assert names.count("tornjango.comet.sockets.socket") == 2


@pytest.mark.gen_test
async def test_newer_reader_of_the_same_client_takes_its_place(channel: str) -> None:
    async with site() as served, opened(served, channel, client="tab") as page:
        await page.next()
        async with opened(served, channel, client="tab") as newer:
            await newer.next()
            assert await page.close_code() == 4000
            poll = f"/comet/poll/?{urlencode({'channel': channel, 'client': 'tab'})}"
            await served.request(poll)
            assert await newer.close_code() == 4000


@pytest.mark.gen_test
async def test_client_with_a_long_name_is_refused(channel: str) -> None:
    async with site() as served, await served.connect() as client:
        refused = await shake_hands(client, target(channel, client="x" * 65))
        assert (refused.status, b"the most is 64" in refused.body) == (400, True)


@pytest.mark.gen_test
async def test_stopping_server_tells_every_socket_when_to_come_back(channel: str) -> None:
    async with site() as served, contextlib.AsyncExitStack() as stack:
        pages = [
            await stack.enter_async_context(opened(served, *[channel][: n % 4])) for n in range(200)
        ]
        await until_parked(200)
        served.server.stop()

        async def last(page: Page) -> tuple[int, int]:
            answer = await page.next()
            while not answer["retry"]:
                answer = await page.next()
            return answer["retry"], await page.close_code()

        ends = await asyncio.gather(*map(last, pages))
        await served._task
        assert {code for _, code in ends} == {1012}
        assert len({retry for retry, _ in ends}) > 50  # spread out
        assert not served.application.in_flight


@pytest.mark.gen_test
async def test_open_sockets_hold_no_thread(channel: str) -> None:
    async with site() as served, contextlib.AsyncExitStack() as stack:
        async with opened(served, "number:2", channel) as page:  # with a thread for the authoriser
            await page.next()
        before = threading.active_count()
        pages = [await stack.enter_async_context(opened(served, channel)) for _ in range(50)]
        for page in pages:
            await page.next()
        comet.publish(channel, 1)
        for page in pages:
            assert await page.data(1) == [1]
        assert threading.active_count() <= before


# What clients should not send


@pytest.mark.gen_test
@pytest.mark.parametrize(
    "sent",
    [
        "",
        "hello",
        "[1]",
        "null",
        "{}",
        "[" * 60_000,
        '{"follow": ["open:a"], "leave": ["open:b"]}',
        '{"follow": ["open:a"], "secret": 1}',
        '{"follow": "open:a"}',
        '{"follow": [1]}',
        '{"follow": ["open:a"], "cursor": 7}',
        '{"follow": ["open:a"], "grant": {}}',
        json.dumps({"follow": [f"open:{n}" for n in range(5000)]}),
        json.dumps({"leave": [f"open:{n}" for n in range(5000)]}),
        '{"publish": {}, "id": []}',
        '{"publish": {}, "id": "%s"}' % ("x" * 65),
        '{"leave": NaN}',
    ],
)
async def test_frame_that_makes_no_sense_is_refused(sent: str, channel: str) -> None:
    async with site() as served, opened(served, channel) as page:
        await page.next()
        await page.socket.send(sent)
        assert (await page.next())["status"] == 400
        comet.publish(channel, 1)
        assert await page.data(1) == [1]


@pytest.mark.gen_test
async def test_socket_is_closed_after_several_of_them() -> None:
    async with site() as served, opened(served) as page:
        for _ in range(sockets.MISTAKES):
            await page.socket.send("{}")
        assert await page.close_code() == 1008


@pytest.mark.gen_test
@pytest.mark.parametrize(("data", "code"), [(b"binary", 1003), ("x" * 90_000, 1009)])
async def test_frame_of_the_wrong_kind_closes_the_socket(data: str | bytes, code: int) -> None:
    async with site() as served, opened(served) as page:
        await page.socket.send(data)
        assert await page.close_code() == code


@pytest.mark.gen_test
async def test_message_of_ten_megabytes_is_not_taken() -> None:
    async with site() as served, opened(served) as page:
        with contextlib.suppress(ConnectionClosed):
            await page.send(publish={"channel": "chat:a", "data": "x" * 10_000_000})
        assert await page.close_code() == 1009


@pytest.mark.gen_test
async def test_page_of_another_site_is_refused(channel: str) -> None:
    async with site() as served, await served.connect() as client:
        refused = await shake_hands(client, target(channel), Origin="https://evil.example")
        assert refused.status == 403
        assert (await shake_hands(client, target(channel), Origin="http://localhost")).status == 101


@pytest.mark.gen_test
async def test_client_that_follows_and_leaves_without_end_is_read_slowly(
    channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = _Changes()
    monkeypatch.setattr(sockets, "Bucket", lambda rate, most: changes)
    async with site(CHANNELS_PER_CLIENT=2) as served, await served.connect() as client:
        await shake_hands(client, URL)
        both = json.dumps({"follow": [channel, f"{channel}-2"]}).encode()
        neither = json.dumps({"leave": [channel, f"{channel}-2"]}).encode()
        await client.send((frame(TEXT, both) + frame(TEXT, neither)) * 1000)
        await changes.spent.wait()
        await client.send(frame(TEXT, both))
        assert (changes.drawn, comet.status()["parked"]) == (7, 1)
        client.abort()
        served.server.stop(0)
        await served._task


class _Changes:
    """A bucket that has six in it, and then none for days."""

    def __init__(self) -> None:
        self.drawn, self.spent = 0, asyncio.Event()

    def draw(self, count: float) -> float:
        self.drawn += 1
        if self.drawn <= 6:
            return 0
        self.spent.set()
        return 1e6


# Slow clients


@pytest.mark.gen_test
async def test_client_that_never_reads_is_bounded_and_closed_and_the_others_hear_all(
    channel: str,
) -> None:
    bounds = {"HEARTBEAT": 0.3, "HISTORY": 20_000, "MAX_BYTES": 100_000_000}
    async with (
        site(**bounds) as served,
        await served.connect() as stuck,
        opened(served, channel) as page,
    ):
        await page.next()
        await shake_hands(stuck, target(channel))
        stuck.writer.transport.pause_reading()
        most = 0
        text = "x" * 1000
        for number in range(10_000):
            comet.publish(channel, [number, text])
            if number % 100 == 0:
                seen = await page.data(100 if number else 1)
                assert seen[-1][0] == number
            most = max(most, *_waiting(served))
        assert [number for number, _ in await page.data(99)][-1] == 9999
        assert most < 600_000  # one answer
        await until(lambda: len(served.application.in_flight) == 1)


def _waiting(served: Site) -> list[int]:
    return [0, *(it._socket.waiting for it in served.application.in_flight if it._socket)]


@pytest.mark.gen_test
async def test_answers_to_a_client_that_reads_nothing_are_bounded(channel: str) -> None:
    async with site(BYTES_WAITING=1000) as served, await served.connect() as stuck:
        cursor = comet.cursor(channel)
        for _ in range(10):
            comet.publish(channel, "x" * 60_000)
        for _ in range(20):
            comet.publish(f"{channel}-2", "x" * 50_000)
        await shake_hands(stuck, target(channel, f"{channel}-2", cursor=cursor))
        [handler] = served.application.in_flight
        # The system takes some.
        stuck.writer.transport.pause_reading()
        while not _waiting(served)[-1]:
            comet.publish(channel, "x" * 60_000)
            await asyncio.sleep(0)
        await stuck.send(frame(TEXT, b"{}"))
        await until(lambda: handler._socket.closing)
        stuck.writer.transport.resume_reading()
        codes = []
        for it in await _until_close(stuck):
            codes += [it.code] if it.opcode == CLOSE else []
        assert codes == [1013]


async def _until_close(client: RawClient) -> list[Any]:
    frames = [await read_frame(client)]
    while frames[-1].opcode != CLOSE:
        frames.append(await read_frame(client))
    await client.send(closing(1013))
    return frames


@pytest.mark.gen_test
async def test_crowd_is_sent_what_was_compressed_once(channel: str) -> None:
    async with site() as served, contextlib.AsyncExitStack() as stack:
        pages = [await stack.enter_async_context(opened(served, channel)) for _ in range(20)]
        for page in pages:
            await page.next()
        before = websockets._deflated.cache_info().misses
        comet.publish(channel, "x" * 5000)
        for page in pages:
            assert await page.data(1) == ["x" * 5000]
        assert websockets._deflated.cache_info().misses == before + 1


# Publishing


@pytest.mark.gen_test
async def test_client_publishes_where_it_may(channel: str) -> None:
    chat = channel.replace("open", "chat")
    async with site() as served, opened(served, chat) as page, opened(served, chat) as other:
        await page.next()
        await other.next()
        await page.send(publish={"channel": chat, "event": "said", "data": "hello"}, id=1)
        frames = [await page.next(), await page.next()]
        assert {"published": 1} in frames
        answer = await other.next()
        assert answer["messages"] == [{"channel": chat, "event": "said", "data": "hello"}]
        for message, status in [
            ({"channel": channel, "data": 1}, 403),
            ({"channel": "chat:silent", "data": 1}, 403),
            ({"channel": "nope", "data": 1}, 404),
            ({"channel": chat}, 400),
        ]:
            await page.send(publish=message, id="a")
            refused = await page.next()
            assert (refused["status"], refused["published"]) == (status, "a")


@pytest.mark.gen_test
async def test_messages_of_a_client_keep_their_order(channel: str) -> None:
    chat = channel.replace("open", "chat")
    async with site(PUBLISHES_PER_SECOND=1000) as served, opened(served) as page:
        cursor = comet.cursor(chat)
        for number in range(50):
            await page.send(publish={"channel": chat, "data": number}, id=number)
        for number in range(50):
            assert await page.next() == {"published": number}
        answer = await comet.wait(None, cursor, chat, timeout=0)
        assert [message.data for message in answer.messages] == list(range(50))


@pytest.mark.gen_test
async def test_client_that_publishes_too_much_is_told_to_wait(channel: str) -> None:
    chat = channel.replace("open", "chat")
    async with site(PUBLISHES_PER_SECOND=0.01) as served, opened(served) as page:
        await page.send(publish={"channel": chat, "data": 1}, id=1)
        assert await page.next() == {"published": 1}
        await page.send(publish={"channel": chat, "data": 1}, id=2)
        refused = await page.next()
        assert (refused["status"], refused["published"]) == (429, 2)
        assert 90_000 <= refused["retry"] <= 100_000


@pytest.mark.gen_test
async def test_message_published_just_before_closing_arrives(channel: str) -> None:
    chat = channel.replace("open", "chat")
    async with site() as served, await served.connect() as client:
        cursor = comet.cursor(chat)
        await shake_hands(client, URL)
        message = json.dumps({"publish": {"channel": chat, "data": 1}}).encode()
        await client.send(frame(TEXT, message) + closing(1000))
        assert (await read_frame(client)).data == b'{"published": null}'
        assert (await read_frame(client)).code == 1000
        answer = await comet.wait(None, cursor, chat, timeout=0)
        assert [message.data for message in answer.messages] == [1]


@pytest.mark.gen_test
async def test_pings_of_a_client_are_answered() -> None:
    async with site() as served, await served.connect() as client:
        await shake_hands(client, URL)
        await client.send(frame(PING, b"there?"))
        answer = await read_frame(client)
        assert (answer.opcode, answer.data) == (PONG, b"there?")
