"""The client of comet.js in a real browser: every message in order and once, whatever is between it and the server."""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
from django.test import override_settings

from tests.browser import Page, needs_chromium
from tests.comet_page import MODULE, PAGE
from tests.nginx import UPGRADE, needs_nginx, proxies
from tests.projects import Project
from tornjango import comet
from tornjango.application import Application
from tornjango.testing import LiveServer

pytestmark = needs_chromium

NewPage = Callable[[], Page]


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    with (
        override_settings(ROOT_URLCONF="tests.comet_page"),
        LiveServer(lambda: Application(staticfiles=True)) as server,
    ):
        yield server


@pytest.fixture
def channel() -> str:
    return f"open:{uuid.uuid4()}"


class Numbers:
    """Publishes 0, 1, 2 and so on to a channel; a page has to have seen them so."""

    def __init__(self, channel: str) -> None:
        self.channel = channel
        self._numbers = count()
        self.published: list[int] = []

    def publish(self, many: int = 5) -> None:
        for number in islice(self._numbers, many):
            comet.publish(self.channel, number)
            self.published.append(number)

    def reach(self, *pages: Page, since: int = 0) -> None:
        """Waits until each page has seen all since one of them, in order and once."""
        wanted = [number for number in self.published if number >= since]
        shown = f"seen[{json.dumps(self.channel)}]"
        for page in pages:
            page.until(f"{shown}.length >= {len(wanted)}")
            assert page.run(shown) == wanted


@pytest.fixture
def numbers(channel: str) -> Numbers:
    return Numbers(channel)


def begin(page: Page, channels: list[str], url: str = "/comet/", **options: Any) -> None:
    """Returns when what is published from now on will come."""
    page.run(f"begin({json.dumps(channels)}, {json.dumps(options)}, {json.dumps(url)})")
    page.until("comet.status === 'open' && comet.cursor")


def open_page(new_page: NewPage, url: str, channels: list[str], **options: Any) -> Page:
    page = new_page()
    page.visit(f"{url}/page/")
    begin(page, channels, **options)
    return page


def readers() -> dict[str, int]:
    return {name: number for name, number in comet.status()["readers"].items() if number}


def transport(page: Page) -> str:
    return str(page.run("comet.diagnostics().transport"))


@pytest.mark.parametrize("kind", ["socket", "sse", "poll"])
def test_messages_come_in_order_and_once(
    site: LiveServer, new_page: NewPage, numbers: Numbers, kind: str
) -> None:
    page = open_page(new_page, site.url, [numbers.channel], transports=[kind])
    for _ in range(5):
        numbers.publish(10)
        numbers.reach(page)
    assert transport(page) == kind
    assert page.run("[gaps, refused]") == [[], []]


def test_websocket_is_chosen(site: LiveServer, new_page: NewPage, numbers: Numbers) -> None:
    page = open_page(new_page, site.url, [numbers.channel])
    numbers.publish()
    numbers.reach(page)
    diagnostics = page.run("comet.diagnostics()")
    assert diagnostics.pop("roundTrip") >= 0
    assert diagnostics == {
        "status": "open",
        "transport": "socket",
        "tries": 1,
        "error": None,
        "buffering": False,
        "tabs": 1,
        "leads": True,
    }


def test_classic_script(site: LiveServer, new_page: NewPage, numbers: Numbers) -> None:
    page = new_page()
    page.visit(f"{site.url}/page/?classic")
    begin(page, [numbers.channel])
    numbers.publish()
    numbers.reach(page)


def test_page_begins_where_its_queries_were(
    site: LiveServer, new_page: NewPage, numbers: Numbers
) -> None:
    numbers.publish()
    pages = []
    for _ in range(3):
        page = new_page()
        page.visit(f"{site.url}/page/?channel={numbers.channel}")
        pages.append((page, len(numbers.published)))
        numbers.publish()
    for page, since in pages:
        page.run(f"begin([{json.dumps(numbers.channel)}], {{}}, null)")
        numbers.publish()
        numbers.reach(page, since=since)
    numbers.publish()
    for page, since in pages:
        numbers.reach(page, since=since)
        assert page.run("gaps") == []
    assert sum(readers().values()) == 1


# What is on the way


@pytest.fixture(scope="module")
def proxy(site: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    refuse = "location /comet/%s/ { return 403; }"
    servers = {
        "open": (UPGRADE, ""),
        "no socket": ("proxy_http_version 1.1;", refuse % "socket"),
        "no stream": ("proxy_http_version 1.1;", refuse % "socket" + refuse % "sse"),
        "buffering": ("proxy_buffering on; proxy_ignore_headers X-Accel-Buffering;", ""),
    }
    with proxies(tmp_path_factory.mktemp("nginx"), site.port, servers) as addresses:
        yield addresses


@needs_nginx
@pytest.mark.parametrize(
    ("through", "kind"), [("open", "socket"), ("no socket", "sse"), ("no stream", "poll")]
)
def test_what_is_refused_is_left_for_the_next(
    proxy: dict[str, str], new_page: NewPage, numbers: Numbers, through: str, kind: str
) -> None:
    page = open_page(new_page, proxy[through], [numbers.channel])
    numbers.publish()
    numbers.reach(page)
    assert transport(page) == kind
    assert not page.run("comet.diagnostics().buffering")
    # The next page of the tab does not try again so soon.
    page.visit(f"{proxy[through]}/page/?again")
    begin(page, [numbers.channel])
    assert page.run("comet.diagnostics().tries") <= 2
    assert transport(page) == kind


@needs_nginx
def test_proxy_that_holds_streams_back_is_noticed(
    proxy: dict[str, str], new_page: NewPage, numbers: Numbers
) -> None:
    page = open_page(new_page, proxy["buffering"], [numbers.channel], transports=["sse", "poll"])
    numbers.publish()
    numbers.reach(page)
    diagnostics = page.run("comet.diagnostics()")
    assert (diagnostics["transport"], diagnostics["buffering"]) == ("poll", True)


@pytest.mark.parametrize("kind", ["socket", "sse", "poll"])
def test_network_that_goes_and_comes_back(
    site: LiveServer, new_page: NewPage, numbers: Numbers, kind: str
) -> None:
    page = open_page(new_page, site.url, [numbers.channel], transports=[kind])
    page.call("Network.enable")
    network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    numbers.publish()
    numbers.reach(page)
    for _ in range(2):
        page.call("Network.emulateNetworkConditions", offline=True, **network)
        page.until("comet.status === 'waiting'")
        numbers.publish()
        assert page.run(f"seen[{json.dumps(numbers.channel)}].length") == len(numbers.published) - 5
        page.call("Network.emulateNetworkConditions", offline=False, **network)
        numbers.publish()
        numbers.reach(page)
    assert page.run("gaps") == []


def test_change_of_transport_loses_nothing(
    site: LiveServer, new_page: NewPage, numbers: Numbers
) -> None:
    page = open_page(new_page, site.url, [numbers.channel], shared=False)
    for kind in ("poll", "sse", "socket", "poll"):
        numbers.publish()
        name = json.dumps(numbers.channel)
        page.run(f"""{{
            const cursor = comet.cursor, before = seen[{name}]
            comet.close()
            begin([{name}], {{cursor, transports: ["{kind}"], shared: false}})
            seen[{name}].push(...before)
        }}""")
        numbers.publish()
        numbers.reach(page)
        assert transport(page) == kind


# Tabs


def test_seven_tabs_have_one_connection(
    site: LiveServer, new_page: NewPage, numbers: Numbers
) -> None:
    pages = [open_page(new_page, site.url, [numbers.channel]) for _ in range(7)]
    numbers.publish()
    numbers.reach(*pages)
    assert readers() == {"websocket": 1}
    assert [page.run("comet.diagnostics().leads") for page in pages] == [True] + 6 * [False]
    assert pages[3].run("comet.diagnostics().tabs") == 7
    # Six connections to one host are all that HTTP/1.1 has in a browser.
    assert pages[6].run("fetch('/page/').then(response => response.status)") == 200


@pytest.mark.parametrize("kind", ["socket", "sse", "poll"])
def test_leader_that_closes_is_followed_by_another(
    site: LiveServer, new_page: NewPage, numbers: Numbers, kind: str
) -> None:
    pages = [open_page(new_page, site.url, [numbers.channel], transports=[kind]) for _ in range(4)]
    while len(pages) > 1:
        numbers.publish()
        pages.pop(0).close()
        numbers.publish()
        numbers.reach(*pages)
    assert pages[0].run("comet.diagnostics().leads")
    assert pages[0].run("gaps") == []


@pytest.mark.parametrize("kind", ["socket", "sse", "poll"])
def test_tabs_with_channels_of_their_own(site: LiveServer, new_page: NewPage, kind: str) -> None:
    common, first, second, third = (Numbers(f"open:{uuid.uuid4()}") for _ in range(4))
    pages = []
    for own in (first, second, third):
        pages.append(
            open_page(new_page, site.url, [common.channel, own.channel], transports=[kind])
        )
    _until_followed(pages, (first, second, third))
    for _ in range(3):
        for each in (common, first, second, third):
            each.publish()
        common.reach(*pages)
        for page, own in zip(pages, (first, second, third), strict=True):
            own.reach(page)
    assert sum(readers().values()) == 1
    pages[0].close()
    for each in (common, second, third):
        each.publish()
    common.reach(*pages[1:])
    second.reach(pages[1])
    third.reach(pages[2])


def _until_followed(pages: Sequence[Page], own: Sequence[Numbers]) -> None:
    """Without a cursor a page begins when it hears of its place; it says so in nothing but messages."""
    for page, numbers in zip(pages, own, strict=True):
        name = json.dumps(numbers.channel)
        while not page.run(f"seen[{name}].length"):
            comet.publish(numbers.channel, "there?")
            page.run("new Promise(resolve => setTimeout(resolve, 20))")
        comet.publish(numbers.channel, "end")
        page.until(f"seen[{name}].at(-1) === 'end'")
        page.run(f"seen[{name}].length = 0")


def test_tabs_that_want_more_than_one_connection_may_have_their_own(
    site: LiveServer, new_page: NewPage, numbers: Numbers
) -> None:
    most = 32
    names = [f"open:{uuid.uuid4()}" for _ in range(most)]
    first = open_page(new_page, site.url, [numbers.channel, *names[: most // 2]])
    numbers.publish()
    second = open_page(new_page, site.url, [numbers.channel, *names[most // 2 :]])
    second.until("comet.diagnostics().leads")
    second.until("Object.keys(seen).length > 16 && comet.cursor")
    comet.publish(names[0], "first")
    first.until(f"seen['{names[0]}'].length")
    _until_followed([second], [Numbers(names[-1])])
    assert first.run("[refused, gaps]") == second.run("[refused, gaps]") == [[], []]
    numbers.publish()
    numbers.reach(first)


# Pages


def test_page_in_the_back_forward_cache_holds_nothing_and_goes_on(
    site: LiveServer, new_page: NewPage, numbers: Numbers
) -> None:
    page = open_page(new_page, site.url, [numbers.channel])
    numbers.publish()
    numbers.reach(page)
    page.visit(f"{site.url}/page/?other")
    numbers.publish()
    page.run("history.back()")
    page.until("window.comet")
    assert page.run("persisted")
    numbers.publish()
    numbers.reach(page)
    assert page.run("gaps") == []


def test_callback_that_throws_is_reported_and_loses_nothing(
    site: LiveServer, new_page: NewPage, numbers: Numbers
) -> None:
    page = open_page(new_page, site.url, [numbers.channel])
    page.run(
        f"comet.on({json.dumps(numbers.channel)}, data => {{ throw new Error(`mine ${{data}}`) }})"
    )
    page.run(f"tail = []; comet.on({json.dumps(numbers.channel)}, data => tail.push(data))")
    numbers.publish(3)
    numbers.reach(page)
    assert page.run("tail") == [0, 1, 2]
    page.until("reported.length === 3")
    assert page.run("reported") == [f"Uncaught Error: mine {number}" for number in range(3)]
    page.errors.clear()


@pytest.mark.parametrize("kind", ["socket", "sse", "poll"])
def test_refused_channel_is_told_and_the_others_go_on(
    site: LiveServer, new_page: NewPage, numbers: Numbers, kind: str
) -> None:
    page = open_page(
        new_page, site.url, [numbers.channel, "number:7", "nowhere"], transports=[kind]
    )
    page.until("refused.length === 2")
    assert page.run("refused") == [["number:7", 403], ["nowhere", 404]]
    numbers.publish()
    numbers.reach(page)


def test_cursor_that_is_not_the_sites_is_a_gap(
    site: LiveServer, new_page: NewPage, numbers: Numbers
) -> None:
    page = open_page(new_page, site.url, [numbers.channel], cursor="forged")
    page.until("gaps.length")
    numbers.publish()
    numbers.reach(page)
    assert page.run("gaps") == [numbers.channel]


@pytest.mark.parametrize("kind", ["socket", "poll"])
def test_page_publishes(site: LiveServer, new_page: NewPage, kind: str) -> None:
    name = f"chat:{uuid.uuid4()}"
    page = open_page(new_page, site.url, [name], transports=[kind])
    page.run(f"comet.publish('{name}', {{text: 'Hello'}})")
    page.until(f"seen['{name}'].length")
    assert page.run(f"seen['{name}']") == [{"text": "Hello"}]
    refused = page.run("comet.publish('open:x', 1).catch(error => [error.status, error.message])")
    assert refused == [403, "Clients may not publish to the channel 'open:x'."]


# Servers

URLS = f"""
from pathlib import Path
from django.http import HttpResponse
from django.urls import include, path
from tornjango import comet

@comet.channel("room:<int:pk>")
async def can_read(request, pk):
    return True

async def page(request):
    return HttpResponse({PAGE % ("", MODULE)!r})

async def publish(request):
    comet.publish("room:7", int(request.GET["number"]))
    return HttpResponse()

urlpatterns = [
    path("comet/", include("tornjango.comet.urls")), path("page/", page), path("publish/", publish),
]
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path)
    project.write("urls.py", URLS)
    return project


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


def test_restarted_server_without_memory_is_a_gap(project: Project, new_page: NewPage) -> None:
    command = ("manage.py", "serve", f"127.0.0.1:{_free_port()}", "--noreload")
    with project.running(*command) as first:
        url = first.wait_until_it_serves()
        pages = [
            open_page(new_page, url, ["room:7"], transports=[kind], shared=False)
            for kind in ("socket", "sse", "poll")
        ]
        for number in range(3):
            first.get(f"/publish/?number={number}")
        for page in pages:
            page.until("seen['room:7'].length === 3")
        first.signal()
        assert first.wait() == 0
        for page in pages:
            page.until("comet.status === 'waiting'")
    with project.running(*command) as second:
        second.wait_until_it_serves()
        second.get("/publish/?number=3")
        for page in pages:
            page.run("dispatchEvent(new Event('focus'))")
            page.until("gaps.length")
        second.get("/publish/?number=4")
        for page in pages:
            page.until("seen['room:7'].length === 4")
            assert page.run("seen['room:7']") == [0, 1, 2, 4]
            assert page.run("gaps") == ["room:7"]
            page.close()
