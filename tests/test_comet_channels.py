from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.http import Http404, HttpRequest
from django.test import RequestFactory, override_settings

from tests import comet_channels
from tornjango import comet
from tornjango.comet import channels
from tornjango.comet.log import Limits
from tornjango.exceptions import ChannelForbidden, CometError, ConfigurationError, UnknownChannel


@pytest.fixture
def declarations() -> Iterator[None]:
    """Puts the declared channels back as they were."""
    before = dict(channels._declared)
    yield
    channels._declared.clear()
    channels._declared.update(before)


def _anyone(request: HttpRequest, **kwargs: object) -> bool:
    return True


def _request(**headers: Any) -> HttpRequest:
    return RequestFactory().get("/", headers=MappingProxyType(headers))


def test_name_is_resolved_as_a_path_would_be() -> None:
    match = channels.resolve("number:0042")
    assert match.kwargs == {"number": 42}
    assert match.declaration.authoriser is comet_channels.even_only


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nothing",
        "number:",
        "number:x",
        "number:1\n",
        "xnumber:1",
        "open:a/b",
        "open:" + "x" * 196,
        "open:a\0b",
        "open:a\ud800",
    ],
)
def test_name_that_no_pattern_matches_is_unknown(name: str) -> None:
    with pytest.raises(UnknownChannel, match="no channel"):
        channels.resolve(name)


def test_error_for_a_huge_name_is_not_huge() -> None:
    with pytest.raises(UnknownChannel) as caught:
        channels.resolve("x" * 1_000_000)
    assert len(str(caught.value)) < 300


def test_limits_come_from_the_declaration_and_else_from_the_settings() -> None:
    with override_settings(TORNJANGO={"COMET": {"HISTORY": 7, "TTL": 8, "MAX_BYTES": 9}}):
        assert channels.resolve("open:a").channel.limits == Limits(7, 8, 9)
        assert channels.resolve("short:a").channel.limits == Limits(3, 8, 9)
        assert channels.resolve("small:a").channel.limits == Limits(7, 8, 300)


@pytest.mark.usefixtures("declarations")
def test_first_declaration_that_matches_counts() -> None:
    comet.channel("overlap:<int:n>", history=1)(_anyone)
    comet.channel("overlap:<str:n>", history=2)(_anyone)
    assert channels.resolve("overlap:1").channel.limits.history == 1
    assert channels.resolve("overlap:x").channel.limits.history == 2


@pytest.mark.usefixtures("declarations")
def test_pattern_without_parameters_is_a_single_channel() -> None:
    comet.channel("news.+")(_anyone)
    assert channels.resolve("news.+").kwargs == {}
    with pytest.raises(UnknownChannel):
        channels.resolve("newsss")


@pytest.mark.usefixtures("declarations")
def test_pattern_declared_twice_is_an_error_that_names_both() -> None:
    comet.channel("twice:<int:pk>")(_anyone)
    with pytest.raises(ConfigurationError, match=r"twice.*_anyone.*even_only"):
        comet.channel("twice:<int:pk>")(comet_channels.even_only)


@pytest.mark.parametrize(
    "pattern", ["a:<int:pk", "a:int:pk>", "<<int:pk>", "a:<nope:pk>", "a:<int:p k>"]
)
def test_pattern_that_cannot_be_read_is_an_error(pattern: str) -> None:
    with pytest.raises(ImproperlyConfigured):
        comet.channel(pattern)(_anyone)
    assert pattern not in channels.patterns()


@pytest.mark.parametrize("option", ["history", "ttl", "max_bytes"])
def test_limit_that_is_not_positive_is_an_error_that_names_it(option: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{option}.*must be positive"):
        comet.channel("never", **{option: 0})


def test_reader_must_name_some_channels_but_not_too_many() -> None:
    with pytest.raises(CometError, match="at least one"):
        channels.resolve_all([])
    with pytest.raises(CometError, match="33 channels are too many"):
        channels.resolve_all(f"open:{n}" for n in range(33))


def test_channel_named_twice_counts_once() -> None:
    assert len(channels.resolve_all(["open:a"] * 40)) == 1


async def _authorise(*names: str, **headers: str) -> None:
    await channels.authorise(_request(**headers), channels.resolve_all(names))


@pytest.mark.gen_test
async def test_sync_and_async_authorisers_let_in_whom_they_let_in() -> None:
    await _authorise("number:2", "number:4", "open:a", "header:x", "instance:yes", Secret="x")


@pytest.mark.parametrize("refused", ["number:3", "header:other", "wrapped:no", "instance:no"])
@pytest.mark.gen_test
async def test_one_refusal_refuses_the_poll_and_names_the_channel(refused: str) -> None:
    with pytest.raises(ChannelForbidden, match=refused):
        await _authorise("open:a", "number:2", refused)


@pytest.mark.gen_test
async def test_coroutine_from_a_sync_wrapper_is_not_taken_for_yes() -> None:
    await _authorise("wrapped:yes")
    with pytest.raises(ChannelForbidden):
        await _authorise("wrapped:no")


@pytest.mark.parametrize(
    ("name", "error"),
    [("missing", Http404), ("denied", PermissionDenied), ("broken", ZeroDivisionError)],
)
@pytest.mark.gen_test
async def test_error_of_an_authoriser_is_passed_on(name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        await _authorise(f"raises:{name}")
