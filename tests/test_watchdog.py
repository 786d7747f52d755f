from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from django.http import HttpRequest, HttpResponse
from django.test import override_settings
from django.urls import path

from tests.projects import Project
from tests.serving import serving, until
from tornjango import watchdog
from tornjango.conf import Config
from tornjango.views import green
from tornjango.watchdog import Watchdog, watching

#: Short, so that the tests are: nothing here asks that anything takes less time than something else.
LIMIT = 0.02


class _Record(logging.Handler):
    """Sets an event for each text that is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.hung = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if "still is" in self.lines[-1]:
            self.hung.set()


@contextmanager
def recorded() -> Iterator[_Record]:
    record = _Record()
    watchdog.logger.addHandler(record)
    try:
        yield record
    finally:
        watchdog.logger.removeHandler(record)


#: What blocks until the watchdog has said that something hangs.
hold: Callable[[], object] = lambda: None  # noqa: E731


async def blocks(request: HttpRequest) -> HttpResponse:
    hold()  # this line
    return HttpResponse("went")


async def blocks_in_task(request: HttpRequest) -> HttpResponse:
    async def inner() -> None:
        hold()  # in a task of the view's

    await asyncio.create_task(inner())
    return HttpResponse("went")


@green
def blocks_green(request: HttpRequest) -> HttpResponse:
    hold()  # in green code
    return HttpResponse("went")


def blocks_deferred(request: HttpRequest, response: Any) -> None:
    hold()  # in a deferred view
    response.finish("went")


urlpatterns = [
    path("blocks/", blocks),
    path("blocks-in-task/", blocks_in_task),
    path("blocks-green/", blocks_green),
    path("blocks-deferred/", blocks_deferred),
]


@contextmanager
def holding(wait: Callable[[], object]) -> Iterator[None]:
    global hold
    before, hold = hold, wait
    try:
        yield
    finally:
        hold = before


@pytest.mark.parametrize(
    ("path", "view", "source", "advice"),
    [
        (
            "/blocks/",
            "by tests.test_watchdog.blocks, at ",
            "hold()  # this line",
            "sync_to_async()",
        ),
        ("/blocks-in-task/", "at ", "hold()  # in a task of the view's", "sync_to_async()"),
        (
            "/blocks-green/",
            "by tests.test_watchdog.blocks_green, at ",
            "hold()  # in green",
            "@threaded",
        ),
        (
            "/blocks-deferred/",
            "by tests.test_watchdog.blocks_deferred, at ",
            "hold()  # in a deferred",
            "sync_to_async()",
        ),
    ],
)
@pytest.mark.gen_test
async def test_what_holds_up_the_loop_is_named_at_once_and_at_its_end(
    path: str, view: str, source: str, advice: str
) -> None:
    with recorded() as record, holding(partial(record.hung.wait, 10)):
        settings = {"ROOT_URLCONF": "tests.test_watchdog", "TORNJANGO": {"WATCHDOG": LIMIT}}
        async with serving(**settings) as site:
            assert (await site.request(path)).body == b"went"
            await until(lambda: len(record.lines) >= 2)
    still, after = record.lines
    assert still.startswith("The event loop has been held up for ")
    assert after.startswith("The event loop was held up for ")
    for line in record.lines:
        assert view in line
        assert f"{__file__}:" in line
        assert source in line
    assert "Its stack:\n" in still
    assert "run_forever" not in still
    assert advice in after


def test_a_loop_that_waits_for_something_to_do_is_not_asked() -> None:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        dog = Watchdog(loop, 1.0)
        dog._loop_thread = thread.ident or 0
        while not watchdog._is_idle(sys._current_frames()[dog._loop_thread]):
            time.sleep(0)
        dog._look(1000.0, 0, 0)
        assert dog._stretch is None
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class _Looked(Watchdog):
    """Looks when a test says so, at a clock of the test's."""

    def __init__(self, limit: float = 1.0) -> None:
        super().__init__(asyncio.get_running_loop(), limit)
        self._loop_thread = threading.get_ident()
        self.now = 1000.0

    def look(self, seconds: float, *, late: float = 0.0, used: float = 0.0) -> None:
        self.now += seconds
        self._look(self.now, late, used)

    def goes_on(self) -> None:
        """The loop answers, now."""
        self._answered = self.now


def _times(lines: list[str]) -> list[str]:
    return [line.partition(" for ")[2].partition(" s")[0] for line in lines]


@pytest.mark.gen_test
async def test_what_takes_no_longer_than_the_limit_is_not_reported() -> None:
    with recorded() as record:
        dog = _Looked()
        for seconds in (0.9, 1.1):
            dog.look(0.25)
            dog.look(seconds)
            dog.goes_on()
            dog.look(0.25)
    assert _times(record.lines) == ["1.10"]


@pytest.mark.gen_test
async def test_a_process_that_was_stopped_held_up_nothing() -> None:
    with recorded() as record:
        dog = _Looked()
        dog.look(0.25)
        dog.look(3600.25, late=3600, used=0.01)
        dog.goes_on()
        dog.look(0.25)
        dog.look(3600.25, late=3600, used=0.01)  # the loop was idle meanwhile
        dog.look(0.25)
        dog.goes_on()
        dog.look(0.25)
    assert record.lines == []


@pytest.mark.gen_test
async def test_what_lets_no_other_thread_run_counts_from_when_it_began() -> None:
    with recorded() as record:
        dog = _Looked()
        dog.look(3.25, late=3, used=1.5)  # and had half a processor
        dog.goes_on()
        dog.look(0.25)
    assert _times(record.lines) == ["3.00"]


@pytest.mark.gen_test
async def test_a_debugger_that_waits_for_its_user_is_left_alone() -> None:
    namespace: dict[str, Any] = {"__name__": "pdb"}
    exec("def prompt(look): look()", namespace)
    with recorded() as record:
        dog = _Looked()
        dog.look(0.25)
        namespace["prompt"](partial(dog.look, 60))
        dog.look(1)
        dog.goes_on()
        dog.look(0.25)
    assert record.lines == []


@pytest.mark.gen_test
async def test_the_garbage_collector_is_blamed_for_what_it_does() -> None:
    with recorded() as record:
        dog = _Looked()
        dog.look(0.25)
        dog._on_collection("start", {})
        dog._collecting_since = time.monotonic() - 1.5
        dog._on_collection("stop", {})
        dog.look(2)
        dog.goes_on()
        dog.look(0.25)
    (line,) = record.lines
    assert "by Python's garbage collector" in line
    assert __file__ not in line


@pytest.mark.gen_test
async def test_a_line_is_named_once_in_a_while_with_how_often_it_was_met(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with recorded() as record:
        dog = _Looked()

        def stretch(seconds: float) -> None:
            dog.look(0.25)
            dog.look(seconds)
            dog.goes_on()
            dog.look(0.25)

        for seconds in (2, 5, 3):
            stretch(seconds)
        assert len(record.lines) == 1
        monkeypatch.setattr(watchdog, "QUIET", 0)
        stretch(4)
    assert _times(record.lines) == ["2.00", "4.00"]
    assert record.lines[1].endswith("Met 2 times more since it was last named, for up to 5.00 s.")


@pytest.mark.gen_test
async def test_several_lines_in_one_stretch_are_said_to_be() -> None:
    with recorded() as record:
        dog = _Looked()
        dog._look(1000, 0, 0)
        for now in (1001, 1002):
            dog._look(now, 0, 0)  # twice
        dog.now = 1003
        dog.goes_on()
        dog.look(0.25)
    assert "dog._look(now, 0, 0)  # twice (seen there at 2 of 3 looks)." in record.lines[0]


@pytest.mark.gen_test
async def test_a_loop_that_answers_each_time_is_busy_but_not_held_up() -> None:
    with recorded() as record:
        dog = _Looked()
        for _ in range(100):
            dog.look(0.25)
            dog.goes_on()
    assert record.lines == []


def test_libraries_are_not_the_projects_code() -> None:
    import json

    import django
    import tornado

    for module in (json, django, tornado, watchdog):
        assert not watchdog._is_projects(str(module.__file__))
    assert not watchdog._is_projects("<frozen importlib._bootstrap>")
    assert not watchdog._is_projects("/elsewhere/lib/python3/dist-packages/x.py")
    assert watchdog._is_projects(__file__)
    assert watchdog._is_projects("/srv/project/blog/views.py")


@pytest.mark.parametrize(
    ("option", "debug", "limit"),
    [(None, True, 0.1), (None, False, 0), (0, True, 0), (2.5, False, 2.5)],
)
def test_it_watches_in_development_unless_told_otherwise(
    option: float | None, debug: bool, limit: float
) -> None:
    with override_settings(DEBUG=debug):
        assert watchdog.limit_of(Config(WATCHDOG=option)) == limit


@pytest.mark.gen_test
async def test_nothing_of_it_is_there_where_it_is_off_and_nothing_stays_where_it_was_on() -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if "watchdog" in thread.name]

    callbacks = list(gc.callbacks)
    with watching(Config(WATCHDOG=0)):
        assert (threads(), gc.callbacks) == ([], callbacks)
    with watching(Config(WATCHDOG=1)):
        assert threads() == ["tornjango-watchdog"]
    assert (threads(), gc.callbacks) == ([], callbacks)


STOPS = """
import os, signal, threading, logging
from django.http import HttpResponse
from django.urls import path

hung = threading.Event()

class Handler(logging.Handler):
    def emit(self, record):
        print(record.getMessage().splitlines()[0], flush=True)
        if "still is" in record.getMessage():
            hung.set()

logging.getLogger("tornjango.watchdog").addHandler(Handler())

async def stops(request):
    os.kill(os.getpid(), signal.SIGSTOP)
    return HttpResponse("stopped")

async def hangs(request):
    hung.wait(20)
    return HttpResponse("hung")

urlpatterns = [path("stops/", stops), path("hangs/", hangs)]
"""


@pytest.mark.slow
def test_a_server_that_was_suspended_blames_nobody(tmp_path: Path) -> None:
    project = Project(tmp_path, options='{"WATCHDOG": 0.05}')
    project.write("urls.py", STOPS)
    with project.running("-m", "tornjango", "serve", "127.0.0.1:0", "--noreload") as server:
        server.wait_until_it_serves()
        got: list[str] = []
        asking = threading.Thread(target=lambda: got.append(server.get("/stops/")))
        asking.start()
        os.waitpid(server.process.pid, os.WUNTRACED)
        time.sleep(0.6)  # longer than what is reported at once
        os.kill(server.process.pid, signal.SIGCONT)
        asking.join()
        assert (got, server.get("/hangs/")) == (["stopped"], "hung")
        line = server.wait_for("The event loop has been held up")
        assert "by urls.hangs" in line
        assert not any("held up" in line for line in server.lines[:-1])
