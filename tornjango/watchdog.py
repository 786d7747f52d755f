"""Says what holds up the event loop: which view, and which line of the project's code.

A thread looks at the loop a few times in each ``TORNJANGO["WATCHDOG"]`` seconds. While the loop waits for something to do
that is all. When it is at work, the thread asks it to answer; as long as it does not, each look notes which line runs. A
request costs nothing.

One warning for each time that the loop was held up, when it goes on; and one at once, with the stack, when it has been
held up for ten times as long. A line is named once a minute, with how often it was met. Not reported: a process that was
stopped, or got no processor; a debugger that waits for its user. The garbage collector is named as what it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import linecache
import logging
import site
import sys
import sysconfig
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import django
from django.conf import settings
from tornado.web import RequestHandler

import tornjango
from tornjango import green
from tornjango.conf import Config
from tornjango.views import view_name

logger = logging.getLogger("tornjango.watchdog")

#: Where DEBUG is on, and WATCHDOG is None; in seconds.
IN_DEVELOPMENT = 0.1

#: Looks in each stretch of WATCHDOG's length.
LOOKS = 4

#: A loop that has been held up for so many times WATCHDOG is reported before it goes on.
HUNG = 10

#: How long a line that was named is not named again, in seconds.
QUIET = 60.0

#: The share of a processor with which a thread is at work. On a busy machine there may not be more for it.
AT_WORK = 0.2

DEBUGGERS = {"IPython", "_pydevd_bundle", "bdb", "code", "ipdb", "pdb", "pudb", "pydevd"}

_OWN = Path(tornjango.__file__).parent


def limit_of(config: Config) -> float:
    """How long the loop may be held up, in seconds; 0 where nobody wants to know."""
    if config.WATCHDOG is None:
        return IN_DEVELOPMENT if settings.DEBUG else 0
    return config.WATCHDOG


@contextlib.contextmanager
def watching(config: Config) -> Iterator[None]:
    """Watches the running loop for as long as the block lasts, where the settings say so."""
    limit = limit_of(config)
    if not limit:
        yield
        return
    watchdog = Watchdog(asyncio.get_running_loop(), limit)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.stop()


class Place(NamedTuple):
    """A line of code that ran while the loop was held up."""

    file: str
    line: int
    function: str
    view: str
    #: Whether it is the project's own, and whether it is green code.
    own: bool
    green: bool

    def __str__(self) -> str:
        linecache.checkcache(self.file)
        source = linecache.getline(self.file, self.line).strip()
        return f"{self.file}:{self.line} in {self.function}" + (f": {source}" if source else "")


class Stretch:
    """A time in which the loop has not answered, so far."""

    def __init__(self, began: float, collected: float) -> None:
        self.began = began
        #: What the garbage collector had taken in all when it began, in seconds.
        self.collected = collected
        self.places: Counter[Place] = Counter()
        self.said = False
        self.debugged = False


class Watchdog:
    """Watches one loop, from ``start`` (on the loop's thread) to ``stop``; ``limit`` is in seconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: float) -> None:
        self._loop, self._limit = loop, limit
        self._pause = limit / LOOKS
        self._stopping = threading.Event()
        self._stretch: Stretch | None = None
        #: When the loop answered; None while it has not.
        self._answered: float | None = None
        self._collecting_since: float | None = None
        self._collected = 0.0
        #: When a line was named last, and what has happened there since: how often, and the longest.
        self._named: dict[tuple[str, int], tuple[float, int, float]] = {}

    def start(self) -> None:
        self._loop_thread = threading.get_ident()
        # The processor time of the loop's thread; not every system tells it, and then that of the process.
        self._used: Callable[[], float] = time.process_time
        if hasattr(time, "pthread_getcpuclockid"):
            self._used = partial(time.clock_gettime, time.pthread_getcpuclockid(self._loop_thread))
        gc.callbacks.append(self._on_collection)
        self._thread = threading.Thread(target=self._watch, name="tornjango-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns when the thread has ended; a second time does nothing."""
        self._stopping.set()
        self._thread.join()
        if self._on_collection in gc.callbacks:
            gc.callbacks.remove(self._on_collection)

    # In the loop's thread

    def _answer(self) -> None:
        self._answered = time.monotonic()

    def _on_collection(self, phase: str, info: dict[str, int]) -> None:
        if threading.get_ident() != self._loop_thread:
            return
        if phase == "start":
            self._collecting_since = time.monotonic()
        elif self._collecting_since is not None:
            self._collected += time.monotonic() - self._collecting_since
            self._collecting_since = None

    # In the watchdog's

    def _watch(self) -> None:
        before, used = time.monotonic(), self._used()
        while not self._stopping.wait(self._pause):
            now = time.monotonic()
            self._look(now, now - before - self._pause, self._used() - used)
            before, used = time.monotonic(), self._used()

    def _look(self, now: float, overslept: float, used: float) -> None:
        """``overslept`` is by how long this look is late, and ``used`` the loop's processor time since the last one."""
        since = now
        if overslept > self._pause and used > overslept * AT_WORK:
            since = now - overslept  # something in C has let no other thread run
        elif overslept > self._pause and self._stretch is not None:
            self._stretch.began += overslept  # the process was stopped, or had no processor
        frame = sys._current_frames().get(self._loop_thread)
        stretch = self._stretch
        if stretch is not None and self._answered is not None:
            self._stretch = None
            self._ended(stretch, self._answered - stretch.began)
        elif stretch is not None:
            self._goes_on(stretch, now, frame)
        elif frame is not None and not _is_idle(frame):
            self._ask(Stretch(since, self._collected), frame)

    def _ask(self, stretch: Stretch, frame: FrameType) -> None:
        self._stretch, self._answered = stretch, None
        self._note(stretch, frame)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._answer)

    def _note(self, stretch: Stretch, frame: FrameType) -> None:
        stretch.debugged = stretch.debugged or _is_debugged(frame)
        task = asyncio.current_task(self._loop)
        view = _view_of(task) if task is not None else ""
        stretch.places[_place(frame, view)] += 1

    def _goes_on(self, stretch: Stretch, now: float, frame: FrameType | None) -> None:
        if frame is None:
            return
        self._note(stretch, frame)
        seconds = now - stretch.began
        if seconds >= HUNG * self._limit and not stretch.said and not stretch.debugged:
            stretch.said = True
            stack = "".join(traceback.format_list(_below_the_loop(frame)))
            place = _most_seen(stretch)
            logger.warning(
                "The event loop has been held up for %.2f s and still is, %s. "
                "Nothing else is answered meanwhile. Its stack:\n%s",
                *(seconds, _by(place), stack),
            )

    def _ended(self, stretch: Stretch, seconds: float) -> None:
        if seconds < self._limit or stretch.debugged:
            return
        if self._collected - stretch.collected > seconds / 2:
            self._name(None, seconds, _COLLECTOR)
            return
        place = _most_seen(stretch)
        seen, looks = stretch.places[place], stretch.places.total()
        often = "" if seen == looks else f" (seen there at {seen} of {looks} looks)"
        self._name(place, seconds, f"{_by(place)}{often}. {_advice(place)}")

    def _name(self, place: Place | None, seconds: float, text: str) -> None:
        now = time.monotonic()
        key = (place.file, place.line) if place is not None else ("", 0)
        last, count, longest = self._named.get(key, (now - QUIET, 0, 0.0))
        if now - last < QUIET:
            self._named[key] = last, count + 1, max(longest, seconds)
            return
        self._named[key] = now, 0, 0.0
        more = (
            f" Met {count} times more since it was last named, for up to {longest:.2f} s."
            if count
            else ""
        )
        logger.warning("The event loop was held up for %.2f s, %s%s", seconds, text, more)


_COLLECTOR = (
    "by Python's garbage collector. Fewer objects that live long, or gc.freeze() when all is loaded, "
    "make it quicker."
)


def _most_seen(stretch: Stretch) -> Place:
    return stretch.places.most_common(1)[0][0]


def _by(place: Place) -> str:
    view = f"by {place.view}, " if place.view else ""
    note = "" if place.own else " (no code of the project's is running)"
    return f"{view}at {place}{note}"


def _advice(place: Place) -> str:
    if place.green:
        return "It is sync code that runs on the event loop, green; mark the view @threaded if it has to wait so."
    return (
        "What waits or computes long in an async or deferred view holds up all requests: await an async call, "
        "or put it into a worker thread, with sync_to_async()."
    )


# Tasks and frames


def _view_of(task: asyncio.Task[object]) -> str:
    """The view, or the handler of Tornado's, whose request the task is there for; empty for other tasks."""
    frame: FrameType | None = getattr(task.get_coro(), "cr_frame", None)
    handler = frame.f_locals.get("self") if frame is not None else None
    if isinstance(name := getattr(handler, "view_name", None), str):
        return name
    return view_name(type(handler)) if isinstance(handler, RequestHandler) else ""


_RUN = asyncio.Handle._run.__code__
_GREEN = green._Green.run.__code__
_RUN_ONCE = asyncio.BaseEventLoop._run_once.__code__  # type: ignore[attr-defined]


def _is_idle(frame: FrameType) -> bool:
    """Whether the loop waits for something to do. (A loop that is not asyncio's is asked instead.)"""
    return (
        frame.f_back is not None
        and frame.f_back.f_code is _RUN_ONCE
        and frame.f_code.co_name == "select"
    )


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _below_the_loop(frame: FrameType) -> traceback.StackSummary:
    """Without what called the loop, which is the same each time."""
    frames = list(_stack(frame))
    starts = (at for at, inner in enumerate(frames) if inner.f_code is _RUN)
    inside = frames[: next(starts, len(frames))]
    return traceback.StackSummary.extract((inner, inner.f_lineno) for inner in reversed(inside))


def _is_debugged(frame: FrameType) -> bool:
    modules = (str(inner.f_globals.get("__name__", "")) for inner in _stack(frame))
    return any(module.partition(".")[0] in DEBUGGERS for module in modules)


def _place(frame: FrameType, view: str) -> Place:
    """The innermost line of the project's; else of a library's, or Django's, or whatever there is."""
    frames = list(_stack(frame))
    own = next((inner for inner in frames if _is_projects(inner.f_code.co_filename)), None)
    chosen = own or next(
        (inner for inner in frames if not _is_ours(inner.f_code.co_filename)), frame
    )
    is_green = any(inner.f_code is _GREEN for inner in frames)
    code = chosen.f_code
    return Place(
        code.co_filename, chosen.f_lineno, code.co_qualname, view, own is not None, is_green
    )


def _folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    named = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    named += [*site.getsitepackages(), site.getusersitepackages()]
    named += [str(Path(django.__file__).parent), str(_OWN)]
    return tuple({str(Path(path)) + "/" for path in named})


_LIBRARIES = _folders()
_PYTHONS_OWN = tuple(
    str(Path(sysconfig.get_paths()[name])) + "/" for name in ("stdlib", "platstdlib")
)


def _is_projects(file: str) -> bool:
    if file.startswith((*_LIBRARIES, "<")):
        return False
    return "/site-packages/" not in file and "/dist-packages/" not in file


def _is_ours(file: str) -> bool:
    """tornjango's, or the standard library's, in which site-packages is not counted."""
    if "site-packages/" in file and not file.startswith(f"{_OWN}/"):
        return False
    return file.startswith((f"{_OWN}/", *_PYTHONS_OWN, "<"))
