from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from django.core.handlers.base import BaseHandler
from django.db import connections
from django.test import AsyncClient, Client, override_settings
from django.urls import reverse

from tests.comet_channels import until_parked
from tornjango import comet
from tornjango.comet.views import poll

URL = "/comet/poll/"


@pytest.fixture(autouse=True)
def _urls() -> Iterator[None]:
    with override_settings(ROOT_URLCONF="tests.comet_urls"):
        yield


@pytest.fixture
def channel() -> str:
    return f"open:{uuid.uuid4()}"


def _get(**query: Any) -> Any:
    return Client().get(URL, query)


def test_poll_has_a_name() -> None:
    assert reverse("comet:poll") == URL


def test_poll_brings_messages_and_the_cursor_to_continue_with(channel: str) -> None:
    cursor = comet.cursor(channel)
    comet.publish(channel, {"text": "Hello"}, event="comment")
    response = _get(channel=channel, cursor=cursor)
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "application/json"
    answer = json.loads(response.content)
    message = {"channel": channel, "event": "comment", "data": {"text": "Hello"}}
    assert answer.pop("cursor") != cursor
    assert answer.pop("grant")
    (offset,) = answer.pop("offsets")
    assert answer.pop("at") == {channel: offset}
    assert len(answer.pop("epoch")) == 16
    assert answer == {"messages": [message], "gaps": [], "more": False, "retry": 0}


@pytest.mark.gen_test
async def test_parked_poll_is_answered_when_something_is_published(channel: str) -> None:
    query = {"channel": channel, "cursor": comet.cursor(channel)}
    poll = asyncio.ensure_future(AsyncClient().get(URL, query))
    await until_parked(1)
    comet.publish(channel, 1)
    answer = json.loads((await poll).content)
    assert [message["data"] for message in answer["messages"]] == [1]


@pytest.mark.gen_test
async def test_cancelled_poll_is_forgotten(channel: str) -> None:
    query = {"channel": channel, "cursor": comet.cursor(channel)}
    poll = asyncio.ensure_future(AsyncClient().get(URL, query))
    await until_parked(1)
    poll.cancel()
    with pytest.raises(asyncio.CancelledError):
        await poll
    assert comet.status()["parked"] == 0


def test_first_poll_brings_a_cursor_at_once(channel: str) -> None:
    cursor = json.loads(_get(channel=channel).content)["cursor"]
    comet.publish(channel, 1)
    assert len(json.loads(_get(channel=channel, cursor=cursor).content)["messages"]) == 1


def test_long_list_of_channels_may_be_posted_without_a_csrf_token(channel: str) -> None:
    names = [f"{channel}-{n}" for n in range(32)]
    cursor = comet.cursor(*names)
    comet.publish(names[31], 1)
    client = Client(enforce_csrf_checks=True)
    response = client.post(URL, {"channel": names, "cursor": cursor})
    assert json.loads(response.content)["messages"][0]["channel"] == names[31]


def test_nothing_between_may_keep_or_collect_an_answer(channel: str) -> None:
    for response in (_get(channel=channel), _get(channel="nope")):
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Accel-Buffering"] == "no"


def test_lost_messages_are_named(channel: str) -> None:
    short = channel.replace("open", "short")
    cursor = comet.cursor(short)
    for n in range(4):
        comet.publish(short, n)
    answer = json.loads(_get(channel=short, cursor=cursor).content)
    assert (answer["gaps"], answer["messages"]) == ([short], [])


@pytest.mark.parametrize(
    ("query", "status", "reason"),
    [
        ({}, 400, "at least one channel"),
        ({"channel": ""}, 404, "no channel ''"),
        ({"channel": "nope"}, 404, "no channel 'nope'"),
        ({"channel": ["open:a", "nope\r\n"]}, 404, r"no channel 'nope\r\n'"),
        ({"channel": "x" * 5000}, 404, "no channel 'xxx"),
        ({"channel": "number:3"}, 403, "may not read the channel 'number:3'"),
        ({"channel": [f"open:{n}" for n in range(33)]}, 400, "33 channels are too many"),
        ({"channel": "open:a", "cursor": "forged"}, 400, "not one of this site"),
        ({"channel": "open:a", "cursor": "x" * 5000}, 400, "too long"),
    ],
)
def test_refusal_says_why_and_is_logged_once(
    query: dict[str, Any], status: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        response = _get(**query)
    assert response.status_code == status
    body = json.loads(response.content)
    assert list(body) == ["error"]
    assert reason in body["error"]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("method", ["put", "delete", "patch", "head", "options"])
def test_other_methods_are_not_allowed(method: str, channel: str) -> None:
    response = getattr(Client(), method)(f"{URL}?channel={channel}")
    assert response.status_code == 405
    assert response.headers["Allow"] == "GET, POST"


def test_channel_names_of_clients_list_no_patterns() -> None:
    assert "number:<int" not in _get(channel="nope").content.decode()


@pytest.mark.parametrize(("name", "status"), [("missing", 404), ("denied", 403)])
def test_authoriser_may_raise_what_a_view_may(name: str, status: int) -> None:
    assert _get(channel=f"raises:{name}").status_code == status


def test_error_in_an_authoriser_is_an_ordinary_500(
    error_log: list[logging.LogRecord],
) -> None:
    response = Client(raise_request_exception=False).get(URL, {"channel": "raises:broken"})
    assert response.status_code == 500
    assert error_log.pop().getMessage() == f"Internal Server Error: {URL}"


def test_a_poll_is_in_no_transaction(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parked one would hold its connection."""
    for options in connections.settings.values():
        monkeypatch.setitem(options, "ATOMIC_REQUESTS", True)
    chain = BaseHandler()
    assert chain.make_view_atomic(poll) is poll
