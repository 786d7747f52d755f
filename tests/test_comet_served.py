"""COMET through the server: real sockets, Django's default middleware, clients that leave and servers that stop."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlencode

import pytest
from django.conf import settings
from django.http import HttpRequest
from django.test import override_settings

from tests.comet_channels import until_parked
from tornjango import comet
from tornjango.testing import LiveServer, RawClient

#: Whether "right:" channels may be read.
rights = {"secret": True}


@comet.channel("right:<str:name>")
async def by_right(request: HttpRequest, name: str) -> bool:
    return rights["secret"]


@pytest.fixture(autouse=True)
def _urls() -> Iterator[None]:
    with override_settings(ROOT_URLCONF="tests.comet_urls"):
        yield


@pytest.fixture
def channel() -> str:
    return f"open:{uuid.uuid4()}"


def _target(*channels: str, cursor: str | None = None) -> str:
    query = [("channel", channel) for channel in channels]
    if cursor:
        query.append(("cursor", cursor))
    return f"/comet/poll/?{urlencode(query)}"


async def _poll(client: RawClient, *channels: str, cursor: str | None = None) -> Any:
    response = await client.request(_target(*channels, cursor=cursor))
    assert response.status == 200, response
    return json.loads(response.body)


@contextlib.asynccontextmanager
async def _served() -> AsyncIterator[tuple[LiveServer, RawClient]]:
    async with LiveServer() as server, await RawClient.connect(server.port) as client:
        yield server, client


async def _until_none_parked() -> None:
    while comet.status()["parked"]:  # noqa: ASYNC110
        await asyncio.sleep(0)


@pytest.mark.gen_test
async def test_poll_is_answered_by_a_publish_and_continued_on_the_same_connection(
    channel: str,
) -> None:
    async with _served() as (_, client):
        answer = await _poll(client, channel)
        for n in range(3):
            poll = asyncio.ensure_future(_poll(client, channel, cursor=answer["cursor"]))
            await until_parked(1)
            comet.publish(channel, n)
            answer = await poll
            assert [message["data"] for message in answer["messages"]] == [n]


@pytest.mark.gen_test
async def test_answer_lost_on_its_way_is_given_again(channel: str) -> None:
    async with _served() as (server, client):
        cursor = (await _poll(client, channel))["cursor"]
        async with await RawClient.connect(server.port) as unlucky:
            await unlucky.send(f"GET {_target(channel, cursor=cursor)} HTTP/1.1\r\n".encode())
            await unlucky.send(b"Host: localhost\r\n\r\n")
            await until_parked(1)
            comet.publish(channel, "once")
        answer = await _poll(client, channel, cursor=cursor)
        assert [message["data"] for message in answer["messages"]] == ["once"]


@pytest.mark.gen_test
async def test_poll_whose_client_leaves_is_forgotten_at_once(channel: str) -> None:
    async with _served() as (server, _):
        clients = [await RawClient.connect(server.port) for _ in range(20)]
        polls = [
            asyncio.ensure_future(client.request(_target(channel, cursor=comet.cursor(channel))))
            for client in clients
        ]
        await until_parked(20)
        for poll, client in zip(polls, clients, strict=True):
            poll.cancel()
            client.abort()
        await asyncio.wait_for(_until_none_parked(), 5)
        await asyncio.gather(*polls, return_exceptions=True)


@pytest.mark.gen_test
async def test_parked_polls_hold_no_thread(channel: str) -> None:
    async with _served() as (server, first):
        await _poll(first, channel)
        before = threading.active_count()
        clients = [await RawClient.connect(server.port) for _ in range(200)]
        cursor = comet.cursor(channel)
        polls = [asyncio.ensure_future(_poll(client, channel, cursor=cursor)) for client in clients]
        await until_parked(200)
        assert threading.active_count() <= before
        comet.publish(channel, 1)
        answers = await asyncio.gather(*polls)
        assert all(len(answer["messages"]) == 1 for answer in answers)
        for client in clients:
            client.abort()


@pytest.mark.gen_test
async def test_stopping_server_answers_parked_polls_with_cursor_and_a_time_to_return(
    channel: str,
) -> None:
    server = LiveServer()
    async with server:
        client = await RawClient.connect(server.port)
        cursor = comet.cursor(channel)
        poll = asyncio.ensure_future(_poll(client, channel, cursor=cursor))
        await until_parked(1)
    answer = await poll
    client.abort()
    assert answer["messages"] == answer["gaps"] == []
    assert answer["cursor"]
    assert answer["retry"] >= 200


@pytest.mark.gen_test
async def test_publishing_in_threads_reaches_served_readers_in_order(channel: str) -> None:
    total = 100

    def publish() -> None:
        for n in range(total):
            comet.publish(channel, n)

    async def follow(client: RawClient, cursor: str) -> list[Any]:
        seen: list[Any] = []
        while len(seen) < total:
            answer = await _poll(client, channel, cursor=cursor)
            assert not answer["gaps"]
            seen += [message["data"] for message in answer["messages"]]
            cursor = answer["cursor"]
        return seen

    async with _served() as (server, _):
        clients = [await RawClient.connect(server.port) for _ in range(10)]
        cursor = comet.cursor(channel)
        following = [asyncio.ensure_future(follow(client, cursor)) for client in clients]
        await until_parked(10)
        await asyncio.to_thread(publish)
        for seen in await asyncio.gather(*following):
            assert seen == list(range(total))
        for client in clients:
            client.abort()


@pytest.mark.gen_test
async def test_refused_polls_leave_the_connection_and_the_server_unharmed(channel: str) -> None:
    refused = {
        "/comet/poll/": 400,
        _target("nope"): 404,
        _target("number:3"): 403,
        _target(channel, cursor="forged"): 400,
        "/comet/poll/?channel=%ff%fe%00&cursor=%00": 404,
    }
    async with _served() as (_, client):
        for target, status in refused.items():
            response = await client.request(target)
            assert response.status == status
            assert list(json.loads(response.body)) == ["error"]
        head = await client.request(_target(channel), method="HEAD")
        assert head.status == 405
        assert (await _poll(client, channel))["messages"] == []


@pytest.mark.gen_test
async def test_million_channels_in_a_target_are_refused_before_there_is_a_request() -> None:
    target = f"/comet/poll/?{'channel=open:1234567&' * 1_000_000}"
    async with _served() as (server, client):
        sending = asyncio.ensure_future(client.send(f"GET {target} HTTP/1.1\r\n".encode()))
        assert (await client.head()).status == 431
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        assert not server.application.in_flight


@pytest.mark.gen_test
async def test_long_list_of_channels_is_posted(channel: str) -> None:
    names = [f"{channel}-{n}" for n in range(32)]
    form = [("Content-Type", "application/x-www-form-urlencoded")]
    async with _served() as (_, client):
        fields = {"channel": names, "cursor": comet.cursor(*names)}
        body = urlencode(fields, doseq=True).encode()
        poll = asyncio.ensure_future(
            client.request("/comet/poll/", method="POST", headers=form, body=body)
        )
        await until_parked(1)
        comet.publish(names[31], 1)
        assert json.loads((await poll).body)["messages"][0]["channel"] == names[31]
        body += b"&padding=" + b"x" * 70_000
        refused = await client.request("/comet/poll/", method="POST", headers=form, body=body)
        assert refused.status == 413


@pytest.mark.gen_test
async def test_parked_poll_is_answered_compressed(channel: str) -> None:
    middleware = ["django.middleware.gzip.GZipMiddleware", *settings.MIDDLEWARE]
    with override_settings(MIDDLEWARE=middleware):
        async with _served() as (_, client):
            target = _target(channel, cursor=comet.cursor(channel))
            headers = [("Accept-Encoding", "gzip")]
            poll = asyncio.ensure_future(client.request(target, headers=headers))
            await until_parked(1)
            comet.publish(channel, "x" * 1000)
            response = await poll
            assert response.header("Content-Encoding") == "gzip"
            assert b"x" * 1000 in gzip.decompress(response.body)


@pytest.mark.gen_test
async def test_parked_poll_is_refused_when_its_channel_is_revoked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(rights, "secret", True)
    name = f"right:{uuid.uuid4()}"
    async with _served() as (_, client):
        target = _target(name, cursor=comet.cursor(name))
        poll = asyncio.ensure_future(client.request(target))
        await until_parked(1)
        rights["secret"] = False
        comet.revoke(name)
        comet.publish(name, "secret")
        response = await poll
        assert response.status == 403
        assert b"may no longer read" in response.body
