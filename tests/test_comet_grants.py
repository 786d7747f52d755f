"""Grants: what they give, and what they do not, to whom, and for how long."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from django.conf import settings
from django.http import HttpRequest
from django.test import RequestFactory, override_settings

from tests import comet_channels  # noqa: F401 (declares the channels)
from tornjango import comet
from tornjango.comet import grants
from tornjango.comet.log import EPOCH_BYTES, Position
from tornjango.exceptions import ChannelForbidden

POSITION = Position(b"e" * EPOCH_BYTES, 7)
asked: list[str] = []
refused: set[str] = set()


@comet.channel("grant-counted:<str:name>")
async def counted(request: HttpRequest, name: str) -> bool:
    asked.append(name)
    return name not in refused


@pytest.fixture(autouse=True)
def _nobody_asked() -> None:
    asked.clear()
    refused.clear()


@pytest.fixture
def name() -> str:
    return uuid.uuid4().hex


def _request(session: str = "", **headers: Any) -> HttpRequest:
    request = RequestFactory().get("/", headers=headers)
    if session:
        request.COOKIES[settings.SESSION_COOKIE_NAME] = session
    return request


def _issued(request: HttpRequest, *names: str) -> str:
    return grants.issue(request, POSITION, grants.expiry(), names)


def test_grant_covers_its_channels_and_knows_where_the_logs_stood() -> None:
    request = _request("mine")
    grant = grants.read(request, _issued(request, "open:a", "open:b"))
    assert grant.position == POSITION
    assert grant.covers("open:a")
    assert grant.covers("open:b")
    assert not grant.covers("open:c")


@pytest.mark.parametrize(
    "other", [_request("theirs"), _request(), _request("mine", authorization="Bearer x")]
)
def test_grant_of_another_client_is_of_no_use(other: HttpRequest) -> None:
    assert grants.read(other, _issued(_request("mine"), "open:a")) == grants.NOTHING


@pytest.mark.parametrize(
    "change",
    [
        lambda token: token[:-1],
        lambda token: token[1:],
        lambda token: "A" * 20 + token[20:],
        lambda token: token.partition(".")[0],
        lambda token: "",
        lambda token: ".",
        lambda token: "é" * 40,
        lambda token: token * 50,
        lambda token: None,
    ],
)
def test_forged_truncated_and_endless_grants_give_nothing(
    change: Callable[[str], str | None],
) -> None:
    request = _request("mine")
    assert grants.read(request, change(_issued(request, "open:a"))) == grants.NOTHING


def test_grant_counts_until_it_expires_and_not_when_it_says_longer_than_may_be() -> None:
    request = _request()
    over, endless = int(time.time()) - 1, int(time.time()) + 10**6
    expired = grants.read(request, grants.issue(request, POSITION, over, ["open:a"]))
    assert not expired.covers("open:a")
    forever = grants.issue(request, POSITION, endless, ["open:a"])
    assert grants.read(request, forever) == grants.NOTHING


def test_grant_of_an_old_secret_key_counts_while_the_key_does() -> None:
    request = _request()
    token = _issued(request, "open:a")
    old = settings.SECRET_KEY
    with override_settings(SECRET_KEY="new", SECRET_KEY_FALLBACKS=[old]):
        assert grants.read(request, token).covers("open:a")
    with override_settings(SECRET_KEY="new", SECRET_KEY_FALLBACKS=[]):
        assert grants.read(request, token) == grants.NOTHING


def test_cursor_is_no_grant(name: str) -> None:
    assert grants.read(_request(), comet.cursor(f"open:{name}")) == grants.NOTHING


@pytest.mark.gen_test
async def test_authoriser_is_asked_once_and_again_without_the_grant_or_after_a_revocation(
    name: str,
) -> None:
    request, channel = _request("mine"), f"grant-counted:{name}"
    first = await comet.wait(request, None, channel)
    assert first.grant
    again = await comet.wait(request, first.cursor, channel, grant=first.grant, timeout=0)
    assert (asked, again.grant) == ([name], None)
    await comet.wait(request, first.cursor, channel, timeout=0)
    await comet.wait(_request("theirs"), first.cursor, channel, grant=first.grant, timeout=0)
    assert asked == [name] * 3
    comet.revoke(channel)
    await comet.wait(request, first.cursor, channel, grant=first.grant, timeout=0)
    assert asked == [name] * 4


@pytest.mark.gen_test
async def test_new_channel_beside_a_granted_one_does_not_make_that_one_count_for_longer(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, channel = _request("mine"), f"grant-counted:{name}"
    first = await comet.wait(request, None, channel)
    expires = grants.read(request, first.grant).expires
    monkeypatch.setattr(grants, "expiry", lambda: expires + 60)
    both = await comet.wait(request, first.cursor, channel, "open:other", grant=first.grant)
    grant = grants.read(request, both.grant)
    assert (grant.expires, len(grant.channels)) == (expires, 2)


@pytest.mark.gen_test
async def test_grant_does_not_outlive_its_channels_right_after_a_revocation(name: str) -> None:
    request, channel = _request("mine"), f"grant-counted:{name}"
    first = await comet.wait(request, None, channel)
    refused.add(name)
    await comet.wait(request, first.cursor, channel, grant=first.grant, timeout=0)
    comet.revoke(channel)
    with pytest.raises(ChannelForbidden):
        await comet.wait(request, first.cursor, channel, grant=first.grant, timeout=0)


@pytest.mark.gen_test
async def test_revocation_of_one_channel_leaves_the_grants_of_others(name: str) -> None:
    request, other = _request("mine"), uuid.uuid4().hex
    names = [f"grant-counted:{name}", f"grant-counted:{other}"]
    first = await comet.wait(request, None, *names)
    comet.revoke(names[0])
    await comet.wait(request, first.cursor, *names, grant=first.grant, timeout=0)
    assert asked == [name, other, name]
