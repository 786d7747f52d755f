"""tornjango.comet.client against a served project, and against a server that misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from django.test import override_settings
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler

from tests.comet_channels import until_parked
from tornjango import comet
from tornjango.comet.client import Client, Following, Gap, Message, Refused
from tornjango.testing import LiveServer


@pytest.fixture(autouse=True)
def _urls() -> Iterator[None]:
    with override_settings(ROOT_URLCONF="tests.comet_urls"):
        yield


@pytest.fixture
def channel() -> str:
    return f"open:{uuid.uuid4()}"


def _client(server: LiveServer, **options: Any) -> Client:
    return Client(f"{server.url}/comet/", **options)


async def _next(events: AsyncIterator[Message | Gap], many: int) -> list[Any]:
    found: list[Any] = []
    while len(found) < many:
        event = await anext(events)
        found.append(event.data if isinstance(event, Message) else event)
    return found


@pytest.mark.gen_test
async def test_follows_in_order_from_its_cursor_on(channel: str) -> None:
    async with LiveServer() as server:
        cursor = comet.cursor(channel)
        for number in range(150):
            comet.publish(channel, number)
        following = _client(server).follow(channel, cursor=cursor)
        events = aiter(following)
        assert await _next(events, 150) == list(range(150))
        coming = asyncio.ensure_future(_next(events, 2))
        await until_parked(1)
        comet.publish(channel, "a", event="letter")
        comet.publish(channel, "b")
        assert await coming == ["a", "b"]
        await events.aclose()
        comet.publish(channel, "c")
        again = aiter(_client(server).follow(channel, cursor=following.cursor))
        assert await anext(again) == Message(channel, "c")
        await again.aclose()


@pytest.mark.gen_test
async def test_message_has_its_channel_and_event(channel: str) -> None:
    async with LiveServer() as server:
        cursor = comet.cursor(channel)
        comet.publish(channel, {"text": "Hello"}, event="comment")
        events = aiter(_client(server).follow(channel, cursor=cursor))
        assert await anext(events) == Message(channel, {"text": "Hello"}, "comment")
        await events.aclose()


@pytest.mark.gen_test
async def test_gap_comes_in_the_place_of_what_is_forgotten() -> None:
    channel = f"short:{uuid.uuid4()}"
    async with LiveServer() as server:
        cursor = comet.cursor(channel)
        for number in range(5):
            comet.publish(channel, number)
        events = aiter(_client(server).follow(channel, cursor=cursor))
        assert await anext(events) == Gap(channel)
        await events.aclose()


@pytest.mark.gen_test
async def test_cursor_of_another_site_is_a_gap(channel: str) -> None:
    async with LiveServer() as server:
        following = _client(server).follow(channel, cursor="forged")
        events = aiter(following)
        assert await anext(events) == Gap(channel)
        assert following.cursor != "forged"
        await events.aclose()


@pytest.mark.parametrize(("channel", "status"), [("number:7", 403), ("nowhere", 404)])
@pytest.mark.gen_test
async def test_refusal_is_raised_with_what_the_site_says(channel: str, status: int) -> None:
    async with LiveServer() as server:
        with pytest.raises(Refused, match=f"answers {status}: .*{channel}") as raised:
            await anext(aiter(_client(server).follow(channel)))
    assert raised.value.status == status


@pytest.mark.gen_test
async def test_too_many_channels_are_refused_and_the_cursor_stays(channel: str) -> None:
    async with LiveServer() as server:
        cursor = comet.cursor(channel)
        following = _client(server).follow(*(f"open:{n}" for n in range(40)), cursor=cursor)
        with pytest.raises(Refused, match="40 channels are too many"):
            await anext(aiter(following))
        assert following.cursor == cursor


@pytest.mark.gen_test
async def test_headers_go_along() -> None:
    async with LiveServer() as server:
        channel = f"header:{uuid.uuid4()}"
        secret = channel.partition(":")[2]
        cursor = comet.cursor(channel)
        comet.publish(channel, 1)
        client = _client(server, headers={"Secret": secret})
        events = aiter(client.follow(channel, cursor=cursor))
        assert await _next(events, 1) == [1]
        await events.aclose()
        with pytest.raises(Refused):
            await anext(aiter(_client(server).follow(channel)))


@pytest.mark.gen_test
async def test_long_list_of_channels_is_posted() -> None:
    channels = [f"open:{'x' * 60}{number}" for number in range(30)]
    async with LiveServer() as server:
        cursor = comet.cursor(*channels)
        comet.publish(channels[-1], 1)
        events = aiter(_client(server).follow(*channels, cursor=cursor))
        assert await anext(events) == Message(channels[-1], 1)
        await events.aclose()


@pytest.mark.gen_test
async def test_publishes_where_the_channel_lets_clients() -> None:
    channel = f"chat:{uuid.uuid4()}"
    async with LiveServer() as server:
        cursor = comet.cursor(channel)
        client = _client(server)
        await client.publish(channel, {"text": "Hello"}, "line")
        events = aiter(client.follow(channel, cursor=cursor))
        assert await anext(events) == Message(channel, {"text": "Hello"}, "line")
        await events.aclose()
        with pytest.raises(Refused, match="Clients may not publish"):
            await client.publish("open:1", 1)


def test_plain_iteration_has_a_loop_of_its_own(channel: str) -> None:
    with LiveServer() as server:
        cursor = comet.cursor(channel)
        for number in range(3):
            comet.publish(channel, number)
        following = _client(server).follow(channel, cursor=cursor)
        events = iter(following)
        assert [next(events) for _ in range(3)] == [Message(channel, n) for n in range(3)]
        events.close()
        assert following.cursor != cursor


@pytest.mark.gen_test
async def test_plain_iteration_where_a_loop_runs_is_an_error(channel: str) -> None:
    with pytest.raises(RuntimeError, match="running event loop"):
        next(iter(Client("http://127.0.0.1:1/").follow(channel)))


def test_address_without_a_scheme_is_an_error() -> None:
    with pytest.raises(ValueError, match="begins with http"):
        Client("example.com/comet/")


# A server that does what it is told


class Scripted:
    """Answers each request with the next of ``answers``; what was asked is in ``asked``."""

    def __init__(self) -> None:
        self.answers: list[Callable[[RequestHandler], None]] = []
        self.asked: list[dict[str, list[str]]] = []


class _Handler(RequestHandler):
    def initialize(self, script: Scripted) -> None:
        self.script = script

    def get(self) -> None:
        asked = self.request.query_arguments
        self.script.asked.append({name: [v.decode() for v in asked[name]] for name in asked})
        self.script.answers.pop(0)(self)


@contextlib.asynccontextmanager
async def _scripted() -> AsyncIterator[tuple[Scripted, Following]]:
    script = Scripted()
    listening, port = bind_unused_port()
    routes = [("/comet/poll/", _Handler, {"script": script})]
    server = HTTPServer(Application(routes, log_function=lambda handler: None))
    server.add_socket(listening)
    try:
        yield script, Client(f"http://127.0.0.1:{port}/comet").follow("a", "b", cursor="start")
    finally:
        server.stop()
        await server.close_all_connections()


def _answer(*numbers: int, cursor: str = "next", **more: Any) -> Callable[[RequestHandler], None]:
    messages = [{"channel": "a", "event": None, "data": number} for number in numbers]
    answer = {"messages": messages, "cursor": cursor, "gaps": [], "more": False, "retry": 0}
    return lambda handler: handler.finish(answer | more)


def _fail(status: int, **headers: str) -> Callable[[RequestHandler], None]:
    def fail(handler: RequestHandler) -> None:
        handler.set_status(status)
        for name, value in headers.items():
            handler.set_header(name, value)
        handler.finish({"error": "Trouble."})

    return fail


def _cut(handler: RequestHandler) -> None:
    handler.request.connection.stream.close()  # type: ignore[attr-defined,union-attr]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """The bounds between which the client would pause at random; it pauses for the lower one."""
    seen: list[tuple[float, float]] = []
    monkeypatch.setattr(random, "uniform", lambda *bounds: seen.append(bounds) or bounds[0])
    return seen


@pytest.mark.gen_test
async def test_lost_answers_are_asked_for_again_after_growing_pauses(
    pauses: list[tuple[float, float]],
) -> None:
    async with _scripted() as (script, following):
        script.answers += [_cut, _fail(500), *8 * [_fail(502)], _answer(1), _cut, _answer(2)]
        events = aiter(following)
        assert await _next(events, 2) == [1, 2]
        await events.aclose()
    assert [top for _, top in pauses] == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30, 0.5]
    assert [asked["cursor"] for asked in script.asked] == 11 * [["start"]] + 2 * [["next"]]
    assert {tuple(asked["channel"]) for asked in script.asked} == {("a", "b")}
    assert len({asked["client"][0] for asked in script.asked}) == 1


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.gen_test
async def test_retry_after_is_honoured(
    status: int, pauses: list[tuple[float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    async with _scripted() as (script, following):
        monkeypatch.setattr(asyncio, "sleep", note)
        script.answers += [
            _fail(status, **{"Retry-After": "7"}),
            _answer(1, retry=1500),
            _answer(2),
        ]
        events = aiter(following)
        assert await _next(events, 2) == [1, 2]
        await events.aclose()
    assert [seconds for seconds in slept if seconds] == [7, 1.5]


@pytest.mark.gen_test
async def test_cursor_counts_all_that_was_given() -> None:
    async with _scripted() as (script, following):
        script.answers += [_answer(1, 2, cursor="second")]
        events = aiter(following)
        await _next(events, 1)
        assert following.cursor == "start"
        await _next(events, 1)
        assert following.cursor == "second"
        await events.aclose()


@pytest.mark.gen_test
async def test_grant_is_shown_from_then_on() -> None:
    async with _scripted() as (script, following):
        script.answers += [_answer(1, grant="yes"), _answer(2), _answer(3)]
        events = aiter(following)
        await _next(events, 3)
        await events.aclose()
    assert [asked.get("grant") for asked in script.asked] == [None, ["yes"], ["yes"]]


@pytest.mark.gen_test
async def test_page_of_a_proxy_is_no_answer(
    pauses: list[tuple[float, float]], caplog: pytest.LogCaptureFixture
) -> None:
    async with _scripted() as (script, following):
        script.answers += [lambda handler: handler.finish("<h1>Log in</h1>"), _answer(1)]
        events = aiter(following)
        await _next(events, 1)
        await events.aclose()
    assert "no JSON: is this where the channels are?" in caplog.text


@pytest.mark.gen_test
async def test_publishing_to_a_site_that_is_away_says_so() -> None:
    listening, port = bind_unused_port()
    listening.close()
    with pytest.raises(ConnectionError, match=r"Publishing to 'a' has failed: .*cannot be reached"):
        await Client(f"http://127.0.0.1:{port}/").publish("a", 1)


PROGRAM = """
import json, sys
from tornjango.comet.client import Client
from django.conf import settings
following = Client(sys.argv[1]).follow(sys.argv[2], cursor=sys.argv[3])
for _, event in zip(range(2), following):
    print(json.dumps(event.data), flush=True)
assert not settings.configured
"""


def test_program_needs_no_settings(channel: str) -> None:
    with LiveServer() as server:
        cursor = comet.cursor(channel)
        comet.publish(channel, "one")
        comet.publish(channel, "two")
        env = {name: value for name, value in os.environ.items() if "DJANGO" not in name}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, f"{server.url}/comet/", channel, cursor],
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == ["one", "two"]
