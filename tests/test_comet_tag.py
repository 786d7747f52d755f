"""What ``{% comet %}`` puts into a page, in every kind of view: a cursor from before the page's queries."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jinja2
import pytest
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.template import engines
from django.test import Client, RequestFactory, override_settings
from django.urls import include, path

from tests import comet_urls
from tornjango import DeferredResponse, comet, deferred
from tornjango.comet import hub
from tornjango.exceptions import BrokerUnavailable, CometError
from tornjango.shortcuts import arender
from tornjango.templatetags.comet import script
from tornjango.testing import LiveServer, RawClient
from tornjango.views import green

PAGE = "tests/comet_page.html"
_ELEMENT = re.compile(r'<script data-comet type="application/json">(.*?)</script>', re.DOTALL)


@comet.channel("anything:<path:name>")
async def anything(request: HttpRequest, name: str) -> bool:
    return True


def _start(page: str) -> Any:
    (content,) = _ELEMENT.findall(page)
    return json.loads(content)


# Each publishes something while its queries might run.


async def async_view(request: HttpRequest) -> HttpResponse:
    comet.publish(request.GET["channel"], "meanwhile")
    return await arender(request, PAGE, {"channel": request.GET["channel"]})


def sync_view(request: HttpRequest) -> HttpResponse:
    comet.publish(request.GET["channel"], "meanwhile")
    return render(request, PAGE, {"channel": request.GET["channel"]})


@green
def green_view(request: HttpRequest) -> HttpResponse:
    return sync_view(request)


@deferred
def deferred_view(request: HttpRequest, response: DeferredResponse) -> None:
    comet.publish(request.GET["channel"], "meanwhile")
    response.render(PAGE, {"channel": request.GET["channel"]})


def endpoint(request: HttpRequest) -> HttpResponse:
    """A JSON API's."""
    comet.publish(request.GET["channel"], "meanwhile")
    return HttpResponse(comet.cursor(request.GET["channel"], request=request))


views = {
    "async": async_view,
    "sync": sync_view,
    "green": green_view,
    "deferred": deferred_view,
}
urlpatterns = [
    *[path(f"{name}/", view) for name, view in views.items()],
    path("endpoint/", endpoint),
    *comet_urls.urlpatterns,
]


@pytest.fixture(autouse=True)
def _urls() -> Iterator[None]:
    with override_settings(ROOT_URLCONF=__name__):
        yield


@pytest.fixture
def channel() -> str:
    return f"open:{uuid.uuid4()}"


def _render(source: str, **context: Any) -> str:
    template = engines["django"].from_string(f"{{% load comet %}}{source}")
    return str(template.render(context, RequestFactory().get("/")))


def _messages(cursor: str, channel: str) -> list[Any]:
    query = {"channel": channel, "cursor": cursor}
    answer = json.loads(Client().get("/comet/poll/", query).content)
    return [message["data"] for message in answer["messages"]]


@pytest.mark.parametrize("view", views)
@pytest.mark.gen_test
async def test_page_follows_from_before_its_queries(view: str, channel: str) -> None:
    async with LiveServer() as server, await RawClient.connect(server.port) as client:
        page = await client.request(f"/{view}/?channel={channel}")
        assert page.status == 200
        cursor = _start(page.body.decode())["cursor"]
        answer = await comet.wait(None, cursor, channel)
        assert [message.data for message in answer.messages] == ["meanwhile"]


@pytest.mark.gen_test
async def test_json_endpoint_hands_out_a_cursor_from_before_its_queries(channel: str) -> None:
    async with LiveServer() as server, await RawClient.connect(server.port) as client:
        cursor = (await client.request(f"/endpoint/?channel={channel}")).body.decode()
        answer = await comet.wait(None, cursor, channel)
        assert [message.data for message in answer.messages] == ["meanwhile"]


def test_under_another_server_the_page_follows_from_when_it_is_rendered(channel: str) -> None:
    page = Client().get("/sync/", {"channel": channel}).content.decode()
    comet.publish(channel, "later")
    assert _messages(_start(page)["cursor"], channel) == ["later"]


def test_page_names_its_channels_and_where_they_are_to_be_had(channel: str) -> None:
    start = _start(_render('{% comet "open:7" channel %}', channel=channel))
    assert start["channels"] == ["open:7", channel]
    assert start["urls"]["poll"] == "/comet/poll/"
    assert start["urls"]["sse"] == "/comet/sse/"


def test_channel_cannot_end_the_script(channel: str) -> None:
    name = f"anything:{channel}</script><script>alert(1)</script><!--&\u2028\"'"
    page = _render("{% comet channel %}", channel=name)
    assert page.lower().count("</script>") == 1
    assert "<!--" not in page
    assert _start(page)["channels"] == [name]


@pytest.mark.parametrize(
    ("source", "reason"), [("{% comet %}", "at least one"), ('{% comet "nope" %}', "no channel")]
)
def test_page_that_names_no_channel_is_an_error(source: str, reason: str) -> None:
    with pytest.raises(CometError, match=reason):
        _render(source)


def _urlconf(*patterns: Any) -> Any:
    module = ModuleType("urls")
    module.urlpatterns = list(patterns)  # type: ignore[attr-defined]
    return module


_URLS = "tornjango.comet.urls"


@pytest.mark.parametrize(
    ("pattern", "address"),
    [
        (path("live/", include(_URLS)), "/live/poll/"),
        (path("live/", include(_URLS, namespace="events")), "/live/poll/"),
        (path("a/", include(([path("b/", include(_URLS))], "site"))), "/a/b/poll/"),
        (path("a/", include([path("b/", include(_URLS))])), "/a/b/poll/"),
    ],
)
def test_addresses_are_found_under_any_namespace(pattern: Any, address: str, channel: str) -> None:
    request = RequestFactory().get("/")
    request.urlconf = _urlconf(path("admin/", include([])), pattern)  # type: ignore[attr-defined]
    assert _start(script(request, channel))["urls"]["poll"] == address


def test_project_without_the_addresses_has_none_in_its_pages(channel: str) -> None:
    request = RequestFactory().get("/")
    request.urlconf = _urlconf(path("x/", sync_view))  # type: ignore[attr-defined]
    assert _start(script(request, channel))["urls"] == {}


def test_page_without_a_request_in_its_context_has_a_cursor_too(channel: str) -> None:
    template = engines["django"].from_string("{% load comet %}{% comet channel %}")
    cursor = _start(str(template.render({"channel": channel})))["cursor"]
    comet.publish(channel, 1)
    assert _messages(cursor, channel) == [1]


def test_jinja2_has_it_as_a_function(channel: str) -> None:
    environment = jinja2.Environment(autoescape=True)
    environment.globals["comet"] = script
    template = environment.from_string("{{ comet(request, channel) }}")
    page = template.render(request=RequestFactory().get("/"), channel=channel)
    assert _start(page)["channels"] == [channel]


def test_page_is_rendered_while_the_broker_is_away_and_begins_with_a_gap(
    channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def present() -> None:
        raise BrokerUnavailable("no broker")

    with monkeypatch.context() as patch:
        patch.setattr(hub.get_hub(), "present", present)
        cursor = _start(_render("{% comet channel %}", channel=channel))["cursor"]
    answer = Client().get("/comet/poll/", {"channel": channel, "cursor": cursor})
    assert json.loads(answer.content)["gaps"] == [channel]
