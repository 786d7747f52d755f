"""Clients that publish, over HTTP; what is told over WebSocket is in test_comet_socket."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import User
from django.core.exceptions import PermissionDenied
from django.http import Http404
from django.test import Client, RequestFactory, override_settings
from django.urls import reverse

from tests.serving import serving
from tornjango import comet
from tornjango.comet import clients
from tornjango.comet.clients import Rates, Refusal, refusal
from tornjango.exceptions import BrokerUnavailable, Overloaded

URL = "/comet/publish/"


@pytest.fixture(autouse=True)
def _urls() -> Iterator[None]:
    with override_settings(ROOT_URLCONF="tests.comet_urls"):
        yield


@pytest.fixture(autouse=True)
def _no_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are one client, at one address."""
    monkeypatch.setattr(clients, "_rates", Rates(5))


@pytest.fixture
def channel() -> str:
    return f"chat:{uuid.uuid4()}"


def _post(message: Any, client: Client | None = None, **options: Any) -> Any:
    client = client or Client()
    return client.post(URL, message, content_type="application/json", **options)


@async_to_sync
async def _since(cursor: str, *channels: str) -> list[comet.Message]:
    return (await comet.wait(None, cursor, *channels, timeout=0)).messages


def test_view_has_a_name() -> None:
    assert reverse("comet:publish") == URL


@pytest.mark.parametrize("data", [None, 0, "é\u2028\0", [1, {"a": [2.5]}], {}])
def test_message_is_published_as_it_is(channel: str, data: Any) -> None:
    cursor = comet.cursor(channel)
    response = _post({"channel": channel, "event": "said", "data": data})
    assert (response.status_code, response.json()) == (200, {"published": True})
    assert response.headers["Cache-Control"] == "no-store"
    [message] = _since(cursor, channel)
    assert (message.data, message.event) == (data, "said")


def test_form_has_its_data_in_json(channel: str) -> None:
    cursor = comet.cursor(channel)
    form = {"channel": channel, "data": '{"text": "hello"}', "csrfmiddlewaretoken": "x"}
    assert Client().post(URL, form).status_code == 200
    [message] = _since(cursor, channel)
    assert (message.data, message.event) == ({"text": "hello"}, None)


@pytest.mark.parametrize(
    ("message", "status", "reason"),
    [
        ({"channel": "nope", "data": 1}, 404, "no channel 'nope'"),
        ({"channel": "~revoked", "data": "chat:a"}, 404, "no channel '~revoked'"),
        ({"channel": "open:a", "data": 1}, 403, "Clients may not publish to the channel 'open:a'"),
        (
            {"channel": "chat:silent", "data": 1},
            403,
            "may not publish to the channel 'chat:silent'",
        ),
        ({"channel": "own:ann", "data": 1}, 403, "may not publish to the channel 'own:ann'"),
        ({"channel": "wrapped-chat:no", "data": 1}, 403, "may not publish"),
        ({"channel": "chat:a"}, 400, '"channel", "data"'),
        ({"data": 1}, 400, '"channel", "data"'),
        ({"channel": "chat:a", "data": 1, "users": [1]}, 400, '"channel", "data"'),
        ({"channel": 7, "data": 1}, 400, "must be a string"),
        ({"channel": ["chat:a"], "data": 1}, 400, "must be a string"),
        ({"channel": "chat:a", "data": 1, "event": 5}, 400, "must be a string"),
        ({"channel": "chat:a", "data": 1, "event": "x" * 101}, 400, "longer than 100"),
        ({"channel": "chat:a", "data": "x" * 70_000}, 400, "cannot be published to 'chat:a'"),
        ({"channel": "chat:a", "data": "x" * 90_000}, 413, "the most is 81920"),
        ({"channel": "chat:a", "data": "\ud800"}, 400, "cannot be published to 'chat:a'"),
        ([], 400, "A message is an object"),
        ("[" * 50_000, 400, "not JSON"),
        ('{"channel": "chat:a", "data": NaN}', 400, "not JSON"),
        ('{"channel": "chat:a", "data": 1e999}', 400, "cannot be published"),
        (f'{{"channel": "chat:a", "data": {"9" * 5000}}}', 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"", 400, "A message is an object"),
    ],
)
def test_refusal_says_why(message: Any, status: int, reason: str) -> None:
    response = _post(message)
    assert response.status_code == status
    assert reason in response.json()["error"]


def test_publisher_that_is_wrapped_says_yes() -> None:
    assert _post({"channel": "wrapped-chat:yes", "data": 1}).status_code == 200


@pytest.mark.parametrize(("name", "status"), [("missing", 404), ("denied", 403)])
def test_publisher_may_raise_what_views_raise(name: str, status: int) -> None:
    assert _post({"channel": f"raising-chat:{name}", "data": 1}).status_code == status


def test_publisher_that_fails_is_a_failed_view(error_log: list[logging.LogRecord]) -> None:
    with pytest.raises(ZeroDivisionError):
        _post({"channel": "raising-chat:broken", "data": 1})
    assert error_log.pop().name == "django.request"


def test_other_methods_are_refused() -> None:
    response = Client().get(URL)
    assert (response.status_code, response.headers["Allow"]) == (405, "POST")


@pytest.mark.parametrize("middleware", [True, False])
def test_forged_request_is_refused_with_or_without_csrf_middleware(
    channel: str, settings_middleware: list[str], middleware: bool
) -> None:
    cursor = comet.cursor(channel)
    chain = settings_middleware if middleware else []
    with override_settings(MIDDLEWARE=chain):
        client = Client(enforce_csrf_checks=True)
        message = {"channel": channel, "data": 1}
        assert _post(message, client).status_code == 403
        client.cookies["csrftoken"] = token = "a" * 32
        forged = _post(message, client, headers={"X-CSRFToken": token, "Origin": "http://evil"})
        assert forged.status_code == 403
        if not middleware:
            assert "Origin checking failed" in forged.json()["error"]
        assert _since(cursor, channel) == []
        assert _post(message, client, headers={"X-CSRFToken": token}).status_code == 200
        form = {"channel": channel, "data": "2", "csrfmiddlewaretoken": token}
        assert client.post(URL, form).status_code == 200
    assert len(_since(cursor, channel)) == 2


@pytest.fixture
def settings_middleware() -> list[str]:
    from django.conf import settings

    return list(settings.MIDDLEWARE)


@pytest.mark.usefixtures("database")
def test_publisher_knows_the_user() -> None:
    client = Client()
    client.force_login(User.objects.create_user("ann"))
    assert _post({"channel": "own:ann", "data": 1}, client).status_code == 200
    assert _post({"channel": "own:bob", "data": 1}, client).status_code == 403


# Rates


def test_client_that_publishes_too_much_is_told_to_wait(channel: str) -> None:
    message = {"channel": channel, "data": 1}
    with override_settings(TORNJANGO={"COMET": {"PUBLISHES_PER_SECOND": 0.01}}):
        assert _post(message).status_code == 200
        refused = _post(message)
        assert refused.status_code == 429
        assert 90 <= int(refused.headers["Retry-After"]) <= 100
        assert "0.01 messages a second" in refused.json()["error"]
        # Whatever it says of itself.
        assert _post(message, headers={"Cookie": "sessionid=other"}).status_code == 429
        assert _post(message, REMOTE_ADDR="192.0.2.1").status_code == 200


def test_refused_messages_count_too() -> None:
    with override_settings(TORNJANGO={"COMET": {"PUBLISHES_PER_SECOND": 0.01}}):
        assert _post({"channel": "chat:silent", "data": 1}).status_code == 403
        assert _post({"channel": "chat:silent", "data": 1}).status_code == 429


@pytest.mark.usefixtures("database")
def test_user_is_one_client_wherever_it_is(channel: str) -> None:
    client = Client()
    client.force_login(User.objects.create_user("ann"))
    message = {"channel": channel, "data": 1}
    with override_settings(TORNJANGO={"COMET": {"PUBLISHES_PER_SECOND": 0.01}}):
        assert _post(message, client).status_code == 200
        assert _post(message, client, REMOTE_ADDR="192.0.2.1").status_code == 429
        assert _post(message).status_code == 200


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::ffff:1", "2001:db8::/64"),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.1"),
        ("", ""),
    ],
)
def test_ipv6_subscriber_is_one_client(address: str, client: str) -> None:
    request = RequestFactory().post(URL, REMOTE_ADDR=address)
    assert async_to_sync(clients._client)(request) == client


def test_table_of_clients_is_bounded() -> None:
    rates = Rates(1, clients=3)
    assert rates.take("a") == 0
    for number in range(1000):
        rates.take(str(number))
        assert rates.take("a") > 0  # whoever goes on is not forgotten
        assert len(rates) <= 3


# Errors


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionDenied(), Refusal(403, "This is forbidden.")),
        (PermissionDenied("No."), Refusal(403, "No.")),
        (Http404("secret"), Refusal(404, "There is no such thing.")),
        (ZeroDivisionError(), None),
    ],
)
def test_what_clients_are_told_of_errors(error: Exception, told: Refusal | None) -> None:
    assert refusal(error) == told


@pytest.mark.parametrize("error", [BrokerUnavailable("db.internal"), Overloaded("PUBLISH_QUEUE")])
def test_what_is_wrong_with_the_server_is_for_the_log(
    error: Exception, channel: str, monkeypatch: pytest.MonkeyPatch, caplog: Any, error_log: Any
) -> None:
    async def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(clients.publishing, "apublish", fail)
    response = _post({"channel": channel, "data": 1})
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) >= 1
    assert str(error) not in response.json()["error"]
    assert str(error) in caplog.text
    error_log.clear()  # Django's own word on a 503


# Through the server


@pytest.mark.gen_test
async def test_parked_readers_hear_what_a_client_publishes(channel: str) -> None:
    async with serving(ROOT_URLCONF="tests.comet_urls") as site:
        reader = asyncio.ensure_future(comet.wait(None, comet.cursor(channel), channel))
        body = json.dumps({"channel": channel, "data": {"text": "hé"}}).encode()
        token = "a" * 32
        headers = [
            ("Content-Type", "application/json"),
            ("Cookie", f"csrftoken={token}"),
            ("X-CSRFToken", token),
        ]
        answer = await site.request(
            URL, method="POST", body=body, headers=[*headers, ("Origin", "http://localhost")]
        )
        assert (answer.status, json.loads(answer.body)) == (200, {"published": True})
        assert [message.data for message in (await reader).messages] == [{"text": "hé"}]
