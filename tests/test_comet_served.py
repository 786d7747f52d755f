"""COMET through the server: real sockets, Django's default middleware, clients that leave and servers that stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlencode

import pytest
from django.test import override_settings

from tests.comet_channels import until_parked
from tornjango import comet
from tornjango.testing import LiveServer, RawClient


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
