"""What COMET raises in a view of the project's own is answered with the status that it stands for."""

from __future__ import annotations

import logging

import pytest
from django.http import HttpRequest, HttpResponse
from django.urls import path

from tests import comet_channels  # noqa: F401 (declares the channels)
from tests.serving import serving
from tornjango import comet


async def waits(request: HttpRequest) -> HttpResponse:
    await comet.wait(request, request.GET.get("cursor"), request.GET["channel"], timeout=0)
    return HttpResponse("there")


async def fails(request: HttpRequest) -> HttpResponse:
    raise comet.BrokerUnavailable("PostgreSQL at secret.example: it is away.")


urlpatterns = [path("waits/", waits), path("fails/", fails)]


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("channel=open:a", 200),
        ("channel=number:3", 403),
        ("channel=open:a&cursor=forged", 400),
    ],
)
@pytest.mark.gen_test
async def test_a_view_that_waits_answers_with_the_status(query: str, status: int) -> None:
    async with serving(ROOT_URLCONF=__name__) as site:
        assert (await site.request(f"/waits/?{query}")).status == status


@pytest.mark.gen_test
async def test_an_unknown_channel_is_a_mistake_of_the_view(
    error_log: list[logging.LogRecord],
) -> None:
    async with serving(ROOT_URLCONF=__name__) as site:
        assert (await site.request("/waits/?channel=nope")).status == 500
    assert error_log.pop().getMessage() == "Internal Server Error: /waits/"


@pytest.mark.gen_test
async def test_a_broker_that_is_away_is_503_and_says_when_to_come_back(
    error_log: list[logging.LogRecord],
) -> None:
    async with serving(ROOT_URLCONF=__name__) as site:
        answer = await site.request("/fails/")
    assert (answer.status, answer.header("Retry-After")) == (503, "2")
    assert b"secret.example" not in answer.body
    assert "secret.example: it is away" in error_log.pop().getMessage()
