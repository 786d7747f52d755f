from __future__ import annotations

import asyncio
import gzip
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlencode

import pytest
from django.conf import settings
from django.core.handlers.base import BaseHandler
from django.db import connections
from django.http import HttpRequest
from django.test import AsyncClient, Client, override_settings
from django.urls import reverse

from tests.comet_channels import until_parked
from tornjango import comet
from tornjango.comet import cursors
from tornjango.comet.log import EPOCH_BYTES, Position
from tornjango.comet.views import poll

URL = "/comet/poll/"
FORM = "application/x-www-form-urlencoded"

#: The names of "asked:" channels, each time one is asked for.
asked: list[str] = []


@comet.channel("asked:<str:name>")
async def asking(request: HttpRequest, name: str) -> bool:
    asked.append(name)
    return request.COOKIES.get("secret") != "no"


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


# Grants


@pytest.fixture
def secret() -> str:
    """A channel of this test's own whose authoriser tells that it was asked."""
    asked.clear()
    return f"asked:{uuid.uuid4()}"


def _client(session: str = "my session") -> Client:
    client = Client()
    client.cookies[settings.SESSION_COOKIE_NAME] = session
    return client


def _answer(client: Client, **query: Any) -> Any:
    response = client.get(URL, query)
    assert response.status_code == 200, response.content
    return json.loads(response.content)


def test_grant_spares_the_authoriser(secret: str) -> None:
    client = _client()
    first = _answer(client, channel=secret)
    again = _answer(client, channel=secret, grant=first["grant"])
    assert len(asked) == 1
    assert "grant" not in again


def test_grant_covers_its_channels_and_no_others(secret: str) -> None:
    client = _client()
    other = f"{secret}-other"
    first = _answer(client, channel=secret)
    both = _answer(client, channel=[secret, other], grant=first["grant"])
    assert asked == [name.removeprefix("asked:") for name in (secret, other)]
    _answer(client, channel=[secret, other], grant=both["grant"])
    assert len(asked) == 2


def test_grant_ends(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = _client()
    first = _answer(client, channel=secret)
    moment = time.time() + 301
    monkeypatch.setattr(time, "time", lambda: moment)
    _answer(client, channel=secret, grant=first["grant"])
    assert len(asked) == 2


def test_channel_that_is_added_makes_no_other_count_for_longer(
    secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, other = _client(), f"{secret}-other"
    first = _answer(client, channel=secret)
    moment = time.time()
    monkeypatch.setattr(time, "time", lambda: moment + 200)
    both = _answer(client, channel=[secret, other], grant=first["grant"])
    assert len(asked) == 2
    monkeypatch.setattr(time, "time", lambda: moment + 301)
    _answer(client, channel=secret, grant=both["grant"])
    assert len(asked) == 3


def test_grant_ends_when_its_channel_is_revoked(secret: str) -> None:
    client = _client()
    first = _answer(client, channel=secret)
    comet.revoke(f"{secret}-other")
    _answer(client, channel=secret, grant=first["grant"])
    assert len(asked) == 1
    comet.revoke(secret)
    client.cookies["secret"] = "no"
    response = client.get(URL, {"channel": secret, "grant": first["grant"]})
    assert response.status_code == 403


def _forge(grant: str) -> str:
    letter = "A" if grant[0] != "A" else "B"
    return letter + grant[1:]


@pytest.mark.parametrize(
    "spoil",
    [
        _forge,
        lambda grant: grant[:-1],
        lambda grant: grant[:20],
        lambda grant: grant.partition(".")[0],
        lambda grant: f"{grant}x",
        lambda grant: "x" * 60_000,
        lambda grant: "\0\ud800é",
        lambda grant: "",
    ],
)
def test_grant_that_is_not_one_only_has_the_authoriser_asked(
    spoil: Callable[[str], str], secret: str
) -> None:
    client = _client()
    grant = spoil(_answer(client, channel=secret)["grant"])
    body = urlencode({"channel": secret, "grant": grant}, errors="surrogatepass")
    response = client.post(URL, body, FORM)
    assert (response.status_code, len(asked)) == (200, 2)


def test_grant_of_another_session_is_of_no_use(secret: str) -> None:
    grant = _answer(_client("my session"), channel=secret)["grant"]
    thief = _client("another's")
    thief.cookies["secret"] = "no"
    assert thief.get(URL, {"channel": secret, "grant": grant}).status_code == 403


def test_grant_of_another_project_is_of_no_use(secret: str) -> None:
    with override_settings(SECRET_KEY="another project"):
        grant = _answer(_client(), channel=secret)["grant"]
    _answer(_client(), channel=secret, grant=grant)
    assert len(asked) == 2


# Cursors


@pytest.mark.parametrize(
    "spoil",
    [
        _forge,
        lambda cursor: cursor[:-1],
        lambda cursor: cursor[:30],
        lambda cursor: cursor.partition(".")[0],
        lambda cursor: f"{cursor}\0",
    ],
)
def test_cursor_that_is_not_one_is_refused(spoil: Callable[[str], str], channel: str) -> None:
    response = _get(channel=channel, cursor=spoil(comet.cursor(channel)))
    assert response.status_code == 400
    assert "Poll without a cursor" in json.loads(response.content)["error"]


def test_cursor_of_another_project_is_refused(channel: str) -> None:
    with override_settings(SECRET_KEY="another project"):
        cursor = comet.cursor(channel)
    comet.publish(channel, 1)
    assert _get(channel=channel, cursor=cursor).status_code == 400
    with override_settings(SECRET_KEY_FALLBACKS=["another project"]):
        assert _get(channel=channel, cursor=cursor).status_code == 200


def test_cursor_of_a_log_that_is_no_more_is_a_gap(channel: str) -> None:
    cursor = cursors.encode({channel: Position(bytes(EPOCH_BYTES), 1_000_000)})
    assert json.loads(_get(channel=channel, cursor=cursor).content)["gaps"] == [channel]


# What clients send


def test_of_a_field_given_twice_the_last_counts_and_others_are_passed_over(channel: str) -> None:
    cursor = comet.cursor(channel)
    comet.publish(channel, 1)
    response = _get(channel=[channel, channel], cursor=["forged", cursor], _="1", limit="all")
    assert len(json.loads(response.content)["messages"]) == 1


def test_client_says_in_64_characters_what_it_calls_itself(channel: str) -> None:
    assert _get(channel=channel, client="x" * 64).status_code == 200
    response = _get(channel=channel, client="x" * 65)
    assert response.status_code == 400
    assert "65 characters; the most is 64" in json.loads(response.content)["error"]


@pytest.mark.parametrize(
    ("count", "status"), [(33, 400), (1000, 400), (1001, 400), (20_000, 413), (1_000_000, 413)]
)
def test_million_channels_are_refused_before_anyone_looks_at_them(
    count: int, status: int, error_log: list[logging.LogRecord]
) -> None:
    body = "&".join(f"channel={n}" for n in range(count))
    response = Client().post(URL, body, FORM)
    assert response.status_code == status
    if count == 1001:  # Django's own bound
        assert "DATA_UPLOAD_MAX_NUMBER_FIELDS" in error_log.pop().getMessage()


@pytest.mark.gen_test
async def test_newer_poll_of_a_client_has_the_older_answered_with_its_own_cursor(
    channel: str,
) -> None:
    query = {"channel": channel, "cursor": comet.cursor(channel), "client": "tab"}
    older = asyncio.ensure_future(AsyncClient().get(URL, query))
    await until_parked(1)
    comet.publish(f"{channel}-other", 1)
    newer = asyncio.ensure_future(AsyncClient().get(URL, query))
    answer = json.loads((await older).content)
    assert (answer["messages"], answer["cursor"]) == ([], query["cursor"])
    comet.publish(channel, 1)
    assert len(json.loads((await newer).content)["messages"]) == 1


# Pages of other sites


@pytest.mark.parametrize("transport", ["poll", "sse"])
@pytest.mark.gen_test
async def test_page_of_another_site_reads_nothing_and_changes_nothing(
    transport: str, channel: str
) -> None:
    """Browsers keep an answer without Access-Control-Allow-Origin from it, and JSON is no script."""
    before = comet.status()
    client = AsyncClient(enforce_csrf_checks=True)
    there = {"Origin": "https://elsewhere.example", "Sec-Fetch-Site": "cross-site"}
    url = f"/comet/{transport}/"
    answers = [await client.get(url, {"channel": channel}, headers=there)]
    if transport == "poll":
        answers.append(await client.post(url, {"channel": channel}, headers=there))
    for answer in answers:
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]
        assert not answer.cookies
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        answer.close()
    assert comet.status() | {"lost": 0} == before | {"lost": 0}


def test_compressed_poll_is_the_same_answer(channel: str) -> None:
    cursor = comet.cursor(channel)
    comet.publish(channel, "x" * 1000)
    middleware = ["django.middleware.gzip.GZipMiddleware", *settings.MIDDLEWARE]
    with override_settings(MIDDLEWARE=middleware):
        query = {"channel": channel, "cursor": cursor}
        response = Client().get(URL, query, headers={"Accept-Encoding": "gzip"})
    assert response.headers["Content-Encoding"] == "gzip"
    assert json.loads(gzip.decompress(response.content))["messages"][0]["data"] == "x" * 1000
