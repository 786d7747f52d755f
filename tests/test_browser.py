"""The example's live pages in a real browser: Chromium without a window, driven by its DevTools protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import psutil
import pytest
from websockets.sync.client import ClientConnection, connect

from tests.example import Example

CHROMIUM = next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
]

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium on the PATH (on Debian: apt-get install chromium)"
)


class Page:
    """One tab, which believes to be the one that is looked at."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._sent = 0
        self.errors: list[Any] = []
        self._call("Page.enable")
        self._call("Runtime.enable")
        self._call("Emulation.setFocusEmulationEnabled", enabled=True)

    def _call(self, method: str, **params: Any) -> Any:
        self._sent += 1
        self._socket.send(json.dumps({"id": self._sent, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=20))
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(message["params"])
            if message.get("id") == self._sent:
                assert "error" not in message, message
                return message["result"]

    def run(self, script: str) -> Any:
        """What the script's last expression comes to, awaited if it is a promise."""
        done = self._call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def until(self, script: str) -> None:
        """Waits for the script's condition to hold."""
        wait = f"""new Promise((resolve, reject) => {{
            const deadline = Date.now() + 10000
            const look = () => ({script}) ? resolve(true)
                : Date.now() > deadline ? reject(new Error("never")) : requestAnimationFrame(look)
            look()
        }})"""
        assert self.run(wait), script

    def visit(self, url: str) -> None:
        """Returns when the page has loaded, its modules included."""
        self._call("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def narrow(self, width: int) -> None:
        """The screen of a phone."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=2,
            mobile=True,
        )

    def close(self) -> None:
        self._call("Page.close")


@pytest.fixture(scope="module")
def devtools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Starts the browser; the address of its DevTools."""
    assert CHROMIUM
    profile = tmp_path_factory.mktemp("chromium")
    browser = subprocess.Popen(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HOME": str(profile)},
    )
    assert browser.stderr
    lines = iter(browser.stderr.readline, "")
    start = next((line for line in lines if "DevTools listening on" in line), "")
    assert start, "Chromium has ended"
    yield "http://" + start.split("ws://")[1].split("/")[0]
    children = psutil.Process(browser.pid).children(recursive=True)
    browser.terminate()
    browser.communicate(timeout=20)
    psutil.wait_procs(children, timeout=20)


@pytest.fixture
def new_page(devtools: str) -> Iterator[Callable[[], Page]]:
    """Opens tabs; fails the test if a script of theirs has failed."""
    pages: list[Page] = []
    with ExitStack() as sockets:

        def make() -> Page:
            request = urllib.request.Request(f"{devtools}/json/new?about:blank", method="PUT")
            with urllib.request.urlopen(request, timeout=20) as answer:
                address = json.load(answer)["webSocketDebuggerUrl"]
            pages.append(Page(sockets.enter_context(connect(address, max_size=None))))
            return pages[-1]

        yield make
        for page in pages:
            page.close()
    assert not [page.errors for page in pages if page.errors]


def write_comment(page: Page, name: str, text: str) -> None:
    page.run(
        f"""id_name.value = {json.dumps(name)}
        id_text.value = {json.dumps(text)}
        write.querySelector("form").noValidate = true
        write.querySelector("button").click()"""
    )


def test_comment_appears_in_every_open_page_without_reload(
    example: Example, new_page: Callable[[], Page]
) -> None:
    writer, reader, entry = new_page(), new_page(), example.url + example.entry()
    for page in (writer, reader):
        page.visit(entry)
        page.run("window.neverReloaded = true")
    write_comment(writer, "Eve", "Hello <b>there</b>")
    for page in (reader, writer):
        page.until("comments.children.length === 1")
        assert page.run("comments.innerText").endswith("Hello <b>there</b>")
        assert page.run("comments.firstElementChild.classList.contains('new')")
    writer.until("write.querySelector('[role=status]')")
    assert writer.run("document.activeElement.innerText").startswith("Thank you")
    assert writer.run("[id_name.value, id_text.value]") == ["Eve", ""]
    write_comment(reader, "Adam", "Hello yourself")
    for page in (reader, writer):
        page.until("comments.children.length === 2")
        assert page.run("neverReloaded")


def test_comments_come_in_order_and_once(example: Example, new_page: Callable[[], Page]) -> None:
    reader, entry = new_page(), example.entry()
    reader.visit(example.url + entry)
    writer = example.browser()
    writer.get(entry)
    texts = [f"Number {number}" for number in range(10)]
    for text in texts:
        assert writer.post(f"{entry}comment/", {"name": "Eve", "text": text}).status == 302
    reader.until(f"comments.children.length >= {len(texts)}")
    shown = "[...comments.querySelectorAll('li > p:last-child')].map(p => p.innerText)"
    assert reader.run(shown) == texts
    reader.visit("about:blank")
    reader.visit(example.url + entry)
    assert reader.run(shown) == texts


# The next poll waits to be let go, and then has a cursor that the server does not know.
SPOIL_THE_NEXT_POLL = """
    const real = fetch
    window.fetch = async (url, options) => {
        window.fetch = real
        await new Promise(resolve => window.letGo = resolve)
        return real(`${url}`.replace(/cursor=..../, "cursor=none"), options)
    }
    dispatchEvent(new Event("online"))
"""


def test_page_that_has_lost_its_place_catches_up_and_keeps_what_was_being_written(
    example: Example, new_page: Callable[[], Page]
) -> None:
    page, entry, writer = new_page(), example.entry(), example.browser()
    page.visit(example.url + entry)
    page.until("readers.innerText === '1 reading now'")
    page.run("id_text.value = 'What I was about to say'")
    page.run(SPOIL_THE_NEXT_POLL)
    page.until("window.letGo")
    writer.get(entry)
    writer.post(f"{entry}comment/", {"name": "Eve", "text": "Hello"})
    page.run("letGo()")
    page.until("comments.children.length === 1")
    # Not announced as new: it came with the others, from the page itself.
    assert not page.run("comments.firstElementChild.classList.contains('new')")
    assert page.run("id_text.value") == "What I was about to say"


def test_comment_that_is_not_valid_is_kept_beside_what_is_wrong(
    example: Example, new_page: Callable[[], Page]
) -> None:
    page = new_page()
    page.visit(example.url + example.entry())
    write_comment(page, "", "What I had to say")
    page.until("write.querySelector('.errorlist')")
    assert page.run("id_text.value") == "What I had to say"
    assert page.run("document.activeElement.id") == "id_name"
    assert page.run("comments.children.length") == 0


def test_pages_tell_each_other_who_reads(example: Example, new_page: Callable[[], Page]) -> None:
    first, second, entry = new_page(), new_page(), example.url + example.entry()
    first.visit(entry)
    first.until("readers.innerText === '1 reading now'")
    second.visit(entry)
    for page in (first, second):
        page.until("readers.innerText === '2 reading now'")
    second.visit("about:blank")
    first.until("readers.innerText === '1 reading now'")
    second.run("history.back()")
    for page in (first, second):
        page.until("readers.innerText === '2 reading now'")


@pytest.mark.parametrize(
    "path", ["/", "/2009/", "/about/", "/search/?q=b&year=1", "/login/", "entry"]
)
def test_page_fits_a_phone(example: Example, new_page: Callable[[], Page], path: str) -> None:
    page = new_page()
    page.narrow(360)
    page.visit(example.url + (example.entry() if path == "entry" else path))
    assert page.run("document.documentElement.scrollWidth") == 360
