"""A real browser for tests: Chromium without a window, driven by its DevTools protocol."""

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

#: For modules whose tests need it.
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium on the PATH (on Debian: apt-get install chromium)"
)


class Page:
    """One tab, which believes to be the one that is looked at."""

    def __init__(self, socket: ClientConnection, is_tab: bool = True) -> None:
        self._socket = socket
        self._sent = 0
        self.closed = False
        self.errors: list[Any] = []
        if is_tab:
            self.call("Page.enable")
            self.call("Runtime.enable")
            self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def call(self, method: str, **params: Any) -> Any:
        """A command of the DevTools protocol."""
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
        done = self.call(
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
        self.call("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def narrow(self, width: int) -> None:
        """The screen of a phone."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=2,
            mobile=True,
        )

    def close(self) -> None:
        """As the user does; twice is harmless."""
        if not self.closed:
            self.closed = True
            self.call("Page.close")


@pytest.fixture(scope="session")
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
def new_reader(devtools: str) -> Iterator[Callable[[], Page]]:
    """Opens tabs as different people have them: each has cookies, and a connection, of its own."""
    pages: list[Page] = []
    with urllib.request.urlopen(f"{devtools}/json/version", timeout=20) as answer:
        address = json.load(answer)["webSocketDebuggerUrl"]
    with ExitStack() as sockets:
        browser = Page(sockets.enter_context(connect(address, max_size=None)), is_tab=False)

        def make() -> Page:
            context = browser.call("Target.createBrowserContext")["browserContextId"]
            opened = browser.call(
                "Target.createTarget", url="about:blank", browserContextId=context
            )
            tab = f"{address.partition('/devtools/')[0]}/devtools/page/{opened['targetId']}"
            pages.append(Page(sockets.enter_context(connect(tab, max_size=None))))
            return pages[-1]

        yield make
        for page in pages:
            page.close()
    assert not [page.errors for page in pages if page.errors]


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
