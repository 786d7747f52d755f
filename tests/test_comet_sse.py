"""Event streams through the server: real sockets, Django's middleware, clients that leave, stop reading and come back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.core.exceptions import PermissionDenied
from django.db import connections
from django.http import HttpRequest
from django.test import AsyncClient, Client, override_settings
from django.utils.decorators import async_only_middleware

from tests.comet_channels import until_parked
from tests.database import Watcher
from tests.event_source import EventSource
from tests.serving import until
from tornjango import comet
from tornjango.comet.hub import get_hub
from tornjango.exceptions import BrokerUnavailable, Overloaded
from tornjango.testing import LiveServer, RawClient

Log = list[logging.LogRecord]

#: Names of "listed:" channels that may not be read; a name that begins so raises.
refused: set[str] = set()


@comet.channel("listed:<str:name>")
async def not_refused(request: HttpRequest, name: str) -> bool:
    if name.startswith("broken") and name in refused:
        raise ZeroDivisionError
    if name.startswith("denied") and name in refused:
        raise PermissionDenied
    return name not in refused


@comet.channel("counted:<str:name>")
def counted(request: HttpRequest, name: str) -> bool:
    return User.objects.count() >= 0


@pytest.fixture(autouse=True)
def _urls() -> Iterator[None]:
    with override_settings(ROOT_URLCONF="tests.comet_urls"):
        yield
    refused.clear()


@pytest.fixture
def channel() -> str:
    return f"open:{uuid.uuid4()}"


@contextlib.asynccontextmanager
async def _served(**options: Any) -> AsyncIterator[LiveServer]:
    comet_options = options.pop("COMET", {})
    with override_settings(TORNJANGO={**options, "COMET": comet_options}):
        async with LiveServer() as server:
            yield server


@contextlib.asynccontextmanager
async def _source(server: LiveServer) -> AsyncIterator[EventSource]:
    async with await RawClient.connect(server.port) as client:
        yield EventSource(client)


@contextlib.asynccontextmanager
async def _following(
    server: LiveServer, *channels: str, **options: Any
) -> AsyncIterator[EventSource]:
    """A stream whose first event has come."""
    async with _source(server) as source:
        head = await source.open(*channels, **options)
        assert head.status == 200, await source.client.rest()
        await source.event()
        yield source


def _streams() -> int:
    return int(comet.status()["readers"].get("sse", 0))


# What it says


@pytest.mark.gen_test
async def test_stream_begins_with_a_cursor_and_brings_what_is_published(channel: str) -> None:
    async with _served() as server, _source(server) as source:
        head = await source.open(channel)
        assert (head.status, head.header("Content-Type")) == (200, "text/event-stream")
        assert head.header("Cache-Control") == "no-store, no-transform"
        assert head.header("X-Accel-Buffering") == "no"
        first = await source.event()
        assert (first.messages, first.id) == ([], first.data["cursor"])
        for n in range(3):
            comet.publish(channel, n)
            event = await source.event()
            assert (event.name, event.messages) == ("message", [n])
            assert event.id == event.data["cursor"] != first.id


@pytest.mark.gen_test
async def test_stream_tells_a_time_to_come_back_before_anything_else(channel: str) -> None:
    async with _served() as server, _following(server, channel) as source:
        assert source.retry is not None
        assert 1000 <= source.retry <= 3000


@pytest.mark.gen_test
async def test_last_event_id_goes_before_the_cursor_of_the_query(channel: str) -> None:
    async with _served() as server:
        async with _following(server, channel) as source:
            first = source.last_id
            comet.publish(channel, 1)
            last = (await source.event()).id
        comet.publish(channel, 2)
        headers = (("Last-Event-ID", last),)
        async with _source(server) as source:
            await source.open(channel, cursor=first, headers=headers)
            assert (await source.event()).messages == [2]
        async with _source(server) as source:
            await source.open(channel, cursor=first, headers=(("Last-Event-ID", ""),))
            assert (await source.event()).messages == [1, 2]


@pytest.mark.gen_test
async def test_reader_may_change_its_transport_at_any_event(channel: str) -> None:
    async with _served() as server:
        async with _following(server, channel) as source:
            comet.publish(channel, 1)
            cursor = (await source.event()).id
        comet.publish(channel, 2)
        async with await RawClient.connect(server.port) as client:
            polled = await client.request(f"/comet/poll/?channel={channel}&cursor={cursor}")
            answer = json.loads(polled.body)
            assert [message["data"] for message in answer["messages"]] == [2]
        comet.publish(channel, 3)
        async with _source(server) as source:
            await source.open(channel, cursor=answer["cursor"], grant=answer["grant"])
            event = await source.event()
            assert (event.messages, "grant" in event.data) == ([3], False)


@pytest.mark.gen_test
async def test_what_does_not_fit_into_one_answer_follows_at_once(channel: str) -> None:
    cursor = comet.cursor(channel)
    for n in range(150):
        comet.publish(channel, n)
    async with _served() as server, _source(server) as source:
        await source.open(channel, cursor=cursor)
        first, second = await source.event(), await source.event()
        assert (first.data["more"], second.data["more"]) == (True, False)
        assert first.messages + second.messages == list(range(150))


@pytest.mark.gen_test
async def test_lost_messages_are_named(channel: str) -> None:
    short = channel.replace("open", "short")
    cursor = comet.cursor(short)
    for n in range(4):
        comet.publish(short, n)
    async with _served() as server, _source(server) as source:
        await source.open(short, cursor=cursor)
        event = await source.event()
        assert (event.data["gaps"], event.messages) == ([short], [])


@pytest.mark.gen_test
async def test_stream_without_news_tells_from_time_to_time_where_its_reader_stands(
    channel: str,
) -> None:
    async with (
        _served(COMET={"HEARTBEAT": 0.02}) as server,
        _following(server, channel) as source,
    ):
        before = source.last_id
        comet.publish(f"{channel}-other", 1)
        event = await source.event()
        while event.id == before:
            event = await source.event()
        assert event.messages == []


@pytest.mark.gen_test
async def test_line_breaks_in_what_is_published_break_nothing(channel: str) -> None:
    data = {"text": "a\n\nid: forged\r\ndata: {}\u2028\x00"}
    async with _served() as server, _following(server, channel) as source:
        comet.publish(channel, data)
        assert (await source.event()).messages == [data]


# Who may not


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("", 400),
        ("channel=nope", 404),
        ("channel=number:3", 403),
        ("channel=open:a&cursor=forged", 400),
        (f"channel=open:a&client={'x' * 65}", 400),
        ("&".join(f"channel=open:{n}" for n in range(33)), 400),
    ],
)
@pytest.mark.gen_test
async def test_refusal_is_an_answer_and_no_stream(query: str, status: int) -> None:
    response = await AsyncClient().get(f"/comet/sse/?{query}")
    assert (response.status_code, response.streaming) == (status, False)
    assert list(json.loads(response.content)) == ["error"]


@pytest.mark.parametrize("method", ["post", "head", "options", "put"])
def test_other_methods_are_not_allowed(method: str, channel: str) -> None:
    response = getattr(Client(), method)(f"/comet/sse/?channel={channel}")
    assert (response.status_code, response.headers["Allow"]) == (405, "GET")


def test_under_wsgi_there_are_polls_only(channel: str, error_log: Log) -> None:
    response = Client().get(f"/comet/sse/?channel={channel}")
    assert (response.status_code, response.streaming) == (501, False)
    assert error_log.pop().getMessage() == "Not Implemented: /comet/sse/"


@pytest.mark.parametrize("error", [BrokerUnavailable("pg at db.internal"), Overloaded("THREADS")])
@pytest.mark.gen_test
async def test_what_cannot_be_read_now_is_503_with_a_time_to_come_back(
    error: Exception, channel: str, monkeypatch: pytest.MonkeyPatch, error_log: Log
) -> None:
    async def ready() -> None:
        raise error

    monkeypatch.setattr(get_hub(), "ready", ready)
    for transport in ("sse", "poll"):
        response = await AsyncClient().get(f"/comet/{transport}/?channel={channel}")
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) >= 1
        assert str(error) not in response.content.decode()
        assert error_log.pop().getMessage() == f"Service Unavailable: /comet/{transport}/"


@pytest.mark.gen_test
async def test_revoked_channel_is_told_of_and_the_others_go_on() -> None:
    kept, lost = f"listed:{uuid.uuid4()}", f"listed:{uuid.uuid4()}"
    async with _served() as server, _following(server, kept, lost) as source:
        refused.add(lost.removeprefix("listed:"))
        comet.revoke(lost)
        comet.publish(lost, "secret")
        comet.publish(kept, "open")
        event = await source.event()
        assert (event.name, event.data["status"]) == ("refused", 403)
        assert event.data["channels"] == [lost]
        assert lost in event.data["error"]
        assert (await source.event()).messages == ["open"]


@pytest.mark.parametrize("name", ["plain", "denied"])
@pytest.mark.gen_test
async def test_stream_ends_with_its_last_channel(name: str) -> None:
    lost = f"listed:{name}-{uuid.uuid4()}"
    async with _served() as server, _following(server, lost) as source:
        refused.add(lost.removeprefix("listed:"))
        comet.revoke(lost)
        assert (await source.event()).name == "refused"
        assert await source.next() is None
        await until(lambda: not _streams())
        back = EventSource(source.client)
        assert (await back.open(lost)).status == 403


@pytest.mark.gen_test
async def test_reader_that_may_stay_gets_a_new_grant_when_others_are_revoked() -> None:
    kept = f"listed:{uuid.uuid4()}"
    async with _served() as server, _following(server, kept) as source:
        comet.revoke(kept)
        comet.publish(kept, 1)
        event = await source.event()
        assert event.messages == [1]
        assert event.data["grant"]


@pytest.mark.gen_test
async def test_error_in_an_authoriser_asked_again_ends_the_stream_and_is_logged(
    error_log: Log,
) -> None:
    broken = f"listed:broken-{uuid.uuid4()}"
    async with _served() as server, _following(server, broken) as source:
        refused.add(broken.removeprefix("listed:"))
        comet.revoke(broken)
        with pytest.raises(asyncio.IncompleteReadError):
            await source.next()
        await until(lambda: error_log)
        assert "/comet/sse/" in error_log.pop().getMessage()
        assert not _streams()


# Who comes and goes


@pytest.mark.gen_test
async def test_newer_reader_of_a_client_takes_the_place_of_the_older(channel: str) -> None:
    async with (
        _served() as server,
        _following(server, channel, client="tab") as older,
        _following(server, channel, client="tab") as newer,
    ):
        assert await older.next() is None
        comet.publish(channel, 1)
        assert (await newer.event()).messages == [1]
        assert _streams() == 1


@pytest.mark.gen_test
async def test_another_session_cannot_take_the_place_of_a_client(channel: str) -> None:
    other = (("Cookie", f"{settings.SESSION_COOKIE_NAME}=another"),)
    async with (
        _served() as server,
        _following(server, channel, client="tab") as older,
        _following(server, channel, client="tab", headers=other),
    ):
        comet.publish(channel, 1)
        assert (await older.event()).messages == [1]


@async_only_middleware
def wrapping(get_response: Any) -> Any:
    """Puts a generator of its own around streams."""

    async def again(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for part in parts:
            yield part

    async def answer(request: HttpRequest) -> Any:
        response = await get_response(request)
        if response.streaming:
            response.streaming_content = again(response.streaming_content)
        return response

    return answer


@pytest.mark.parametrize("middleware", [[], [f"{__name__}.wrapping"]])
@pytest.mark.parametrize("how", ["leaves", "closes its half"])
@pytest.mark.gen_test
async def test_client_that_is_gone_is_forgotten(
    how: str, middleware: list[str], channel: str
) -> None:
    with override_settings(MIDDLEWARE=[*middleware, *settings.MIDDLEWARE]):
        async with _served() as server, _following(server, channel) as source:
            assert _streams() == 1
            if how == "leaves":
                source.client.abort()
            else:
                source.client.writer.write_eof()
            await until(lambda: not (_streams() or server.application.in_flight))
            assert comet.status()["parked"] == 0


@pytest.mark.gen_test
async def test_streams_hold_no_thread_and_no_connection(
    database: None, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of the authoriser either, with ATOMIC_REQUESTS."""
    for options in connections.settings.values():
        monkeypatch.setitem(options, "ATOMIC_REQUESTS", True)
    name = f"counted:{uuid.uuid4()}"
    threads = 2
    async with _served(THREADS=threads) as server, contextlib.AsyncExitStack() as stack:
        before = threading.active_count()
        sources = [await stack.enter_async_context(_following(server, name)) for _ in range(20)]
        assert threading.active_count() <= before + threads
        assert not watcher.rows(
            "select pid from pg_stat_activity where state like 'idle in transaction%'"
        )
        comet.publish(name, 1)
        for source in sources:
            assert (await source.event()).messages == [1]


# What is between


@pytest.mark.gen_test
async def test_stream_is_held_back_by_nothing_that_compresses_or_compares(channel: str) -> None:
    middleware = [
        "django.middleware.gzip.GZipMiddleware",
        "django.middleware.http.ConditionalGetMiddleware",
        *settings.MIDDLEWARE,
    ]
    headers = (("Accept-Encoding", "gzip"),)
    with override_settings(MIDDLEWARE=middleware):
        async with _served() as server, _following(server, channel, headers=headers) as source:
            assert source.head.header("Content-Encoding") == "identity"
            assert source.head.header("ETag") is None
            for n in range(3):
                comet.publish(channel, n)
                assert (await source.event()).messages == [n]


@pytest.mark.gen_test
async def test_stream_to_http_1_0_ends_with_its_connection(channel: str) -> None:
    async with _served() as server, await RawClient.connect(server.port) as client:
        await client.send(f"GET /comet/sse/?channel={channel} HTTP/1.0\r\n\r\n".encode())
        head = await client.head()
        assert head.status == 200
        assert head.header("Transfer-Encoding") is None
        await until_parked(1)
        comet.publish(channel, "to an old client")
        assert b"to an old client" in await client.reader.readuntil(b"old client")
        comet.drain()
        assert (await client.rest()).endswith(b"\n\n")


# Who reads slowly, or not at all


async def _connect_narrow(server: LiveServer) -> RawClient:
    """A client whose system takes little that is not read."""
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.setblocking(False)
    await asyncio.get_running_loop().sock_connect(narrow, ("127.0.0.1", server.port))
    return RawClient(*await asyncio.open_connection(sock=narrow, limit=1024))


def _buffered(server: LiveServer) -> int:
    """Bytes that wait in the process for the one client that there is."""
    (handler,) = server.application.in_flight
    exchange: Any = handler.request.connection
    return int(exchange.connection.transport.get_write_buffer_size())


@pytest.mark.gen_test
async def test_nothing_queues_for_a_client_that_takes_nothing(channel: str) -> None:
    size, answer, waiting = 60_000, 600_000, 0
    async with _served() as server, await _connect_narrow(server) as client:
        source = EventSource(client)
        await source.open(channel)
        await until_parked(1)
        for n in range(500):
            comet.publish(channel, f"{n} {'x' * size}")
            await asyncio.sleep(0)
            waiting = max(waiting, _buffered(server))
        assert 0 < waiting < answer
        # It reads again: what the log has forgotten meanwhile is a gap, and the rest comes.
        seen, gap = [], False
        while not seen or seen[-1] != "499":
            event = await source.event()
            assert not (event.data["gaps"] and gap)
            gap = gap or bool(event.data["gaps"])
            seen += [text.split()[0] for text in event.messages]
            if gap and not event.data["more"] and not event.messages:
                break
        assert gap
        comet.publish(channel, "on")
        event = await source.event()
        while not event.messages:
            event = await source.event()
        assert event.messages[-1] == "on"


@pytest.mark.gen_test
async def test_client_that_takes_nothing_for_too_long_is_closed_and_may_come_back(
    channel: str,
) -> None:
    small = f"{channel}-small"
    async with _served(SEND_TIMEOUT=0.2) as server, await _connect_narrow(server) as client:
        source = EventSource(client)
        await source.open(channel, small)
        cursor = (await source.event()).id
        comet.publish(small, "kept")
        for _ in range(100):
            comet.publish(channel, "x" * 60_000)
            await asyncio.sleep(0)
        await until(lambda: not (_streams() or server.application.in_flight))
        async with _source(server) as back:
            await back.open(small, channel, cursor=cursor)
            event = await back.event()
            assert (event.messages, event.data["gaps"]) == (["kept"], [channel])


# The server's end


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.gen_test
async def test_stopping_server_ends_streams_with_a_time_to_come_back(
    streams: bool, channel: str
) -> None:
    async with _served() as server, contextlib.AsyncExitStack() as stack:
        sources = [await stack.enter_async_context(_following(server, channel)) for _ in range(60)]
        comet.publish(channel, "last")
        server.server.stop(streams=streams)
        for source in sources:
            seen: list[Any] = []
            while (event := await source.next()) is not None:
                seen += event.messages
                last = event
            assert seen == ["last"]
            assert last.data["retry"] == source.retry >= 200
            assert last.id == last.data["cursor"]
            assert await source.client.rest() == b""
        await server._task
        server._task = asyncio.create_task(asyncio.sleep(0))
