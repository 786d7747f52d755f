"""Stretches of sync middleware: one worker thread for all that is between the loop and the loop again.

Django's chain goes into a thread for sync middleware, and from there back to the loop, for what is inside of it: the view.
The thread has to wait meanwhile. Here its code waits in a greenlet, and the thread does something else. Greenlets do not
change their threads, so the stretch goes on where it began, and a sync view inside of it runs there as well.

Two rules say when a thread is given away. Not in a transaction, on Django's own connection: another request would be in
it. And not when the stretch has changed a ``threading.local``: another request would see that. Then the thread waits
until the answer is there, as it does under any other server.
"""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import wraps
from itertools import chain
from operator import is_
from typing import Any, Protocol, TypeVar

import asgiref.sync
from asgiref.current_thread_executor import CurrentThreadExecutor
from asgiref.sync import SyncToAsync
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from greenlet import getcurrent, greenlet

T = TypeVar("T")


class Call:
    """What a thread is to do, and the future of its outcome."""

    __slots__ = ("fn", "future")

    def __init__(self, fn: Callable[[], Any]) -> None:
        self.fn = fn
        self.future: Future[Any] = Future()

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.fn()
        except BaseException as exc:  # noqa: BLE001 - raised where the future is awaited
            self.future.set_exception(exc)
            # The traceback leads here, and from here to the future.
            del self
        else:
            self.future.set_result(result)


class Hub(Protocol):
    """The thread that a `Runner` belongs to."""

    greenlet: greenlet

    def resume(self, runner: Runner) -> None:
        """Has the thread go on with ``runner``, as soon as it can; to be called by any thread."""


class Runner(greenlet):
    """Runs a thread's calls, one after another. While one is parked another runner takes its place."""

    def __init__(self, hub: Hub) -> None:
        super().__init__()
        self.hub = hub
        self.call: Call | None = None
        #: What the thread was like when the stretch began that is running, if one is.
        self.stretch: Stretch | None = None
        #: Not while it runs something else inside of the stretch, a sync view, say.
        self.may_park = False

    def run(self) -> None:
        while True:
            assert self.call is not None
            self.call.run()
            self.call = None
            self.hub.greenlet.switch()

    @property
    def is_idle(self) -> bool:
        return self.call is None

    def can_park(self) -> bool:
        return self.may_park and self.stretch is not None and self.stretch.can_pause()

    def park(self) -> None:
        """Returns after ``resume``; the thread runs other calls meanwhile."""
        assert self.stretch is not None
        self.stretch.pause()
        self.hub.greenlet.switch()
        self.stretch.go_on()


def stretch(fn: Callable[..., T]) -> Callable[..., T]:
    """Sync code whose thread may be given away while it waits for async code that it has called."""

    @wraps(fn)
    def run(*args: Any) -> T:
        runner = getcurrent()
        if not isinstance(runner, Runner):
            return fn(*args)
        outer = runner.stretch, runner.may_park
        runner.stretch, runner.may_park = outer[0] or Stretch(), True
        try:
            return fn(*args)
        finally:
            runner.stretch, runner.may_park = outer

    return run


class WaitingThread(CurrentThreadExecutor):
    """What a thread does while async code runs that it has called with ``async_to_sync``: sync code of that.

    asgiref makes one for every such call. Its own one blocks the thread; this one parks a stretch, if it may.
    """

    def __init__(self, old_executor: Any = None) -> None:
        running = getcurrent()
        self._runner = running if isinstance(running, Runner) else None
        self._thread = threading.current_thread()
        self._outer = old_executor
        self._changed = threading.Condition(threading.Lock())
        self._calls: deque[Call] = deque()
        self._ended = False
        self._parked = False

    def run_until_future(self, future: Future[Any]) -> None:
        """Returns when ``future`` is done, and with it all calls that were submitted before."""
        if threading.current_thread() is not self._thread:
            raise RuntimeError("Only the thread that made it can run what is submitted here.")
        future.add_done_callback(self._end)
        while (call := self._next()) is not None:
            self._run(call)
            del call

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        if threading.current_thread() is self._thread:
            raise RuntimeError("A thread cannot wait for what it would have to do itself.")
        call = Call(lambda: fn(*args, **kwargs))
        with self._changed:
            if not self._ended:
                self._calls.append(call)
                self._notify()
                return call.future
        if self._outer is None:
            raise RuntimeError("The thread that called this async code waits for it no longer.")
        future: Future[T] = self._outer.submit(fn, *args, **kwargs)
        return future

    def _end(self, future: Future[Any]) -> None:
        with self._changed:
            self._ended = True
            self._notify()

    def _notify(self) -> None:
        self._changed.notify()
        if self._parked:
            assert self._runner is not None
            self._parked = False
            self._runner.hub.resume(self._runner)

    def _next(self) -> Call | None:
        """What is to be done now; None when the future is done."""
        while not (self._calls or self._ended):
            parks = self._runner is not None and self._runner.can_park()
            with self._changed:
                if self._calls or self._ended:
                    break
                if not parks:
                    self._changed.wait()
                self._parked = parks
            if parks:
                assert self._runner is not None
                self._runner.park()
        return self._calls.popleft() if self._calls else None

    def _run(self, call: Call) -> None:
        if self._runner is None:
            call.run()
            return
        before, self._runner.may_park = self._runner.may_park, False
        try:
            call.run()
        finally:
            self._runner.may_park = before


_asgiref: Any = asgiref.sync
_BEFORE = CurrentThreadExecutor


def install() -> bool:
    """Until `uninstall`, a stretch that waits for async code gives its thread away; False if it is so already."""
    if _asgiref.CurrentThreadExecutor is WaitingThread:
        return False
    _asgiref.CurrentThreadExecutor = WaitingThread
    return True


def uninstall() -> None:
    _asgiref.CurrentThreadExecutor = _BEFORE


# What a thread keeps

#: Of a container, or an object, that is kept in a threading.local, no more parts than these are compared.
PARTS = 256


class Stretch:
    """What the thread's locals held when a stretch began, and while it is paused what they held then."""

    def __init__(self) -> None:
        self._before = _kept()
        self._paused: list[_Kept] = []

    def can_pause(self) -> bool:
        return not _in_transaction() and not any(
            now.differs(before) for now, before in _pairs(_kept(), self._before)
        )

    def pause(self) -> None:
        self._paused = _kept(everything=True)

    def go_on(self) -> None:
        """Others that ran meanwhile may have left something: that is not this request's to see."""
        for now, then in _pairs(_kept(everything=True), self._paused):
            if now.differs(then):
                now.become(then)
        self._paused = []


class _Kept:
    """What one ``threading.local`` holds in this thread."""

    __slots__ = ("local", "parts", "values")

    def __init__(self, local: threading.local) -> None:
        self.local = local
        held = local.__dict__.items()
        self.values = {key: value for key, value in held if not _is_connection(value)}
        self.parts = {key: _parts(value) for key, value in self.values.items()}

    def differs(self, other: _Kept | None) -> bool:
        if other is None:
            return bool(self.values)
        return self.values.keys() != other.values.keys() or any(
            self.values[key] is not other.values[key] or not _same(parts, other.parts[key])
            for key, parts in self.parts.items()
        )

    def become(self, other: _Kept | None) -> None:
        held = self.local.__dict__
        for key in self.values:
            del held[key]
        if other is not None:
            held.update(other.values)


def _is_connection(value: object) -> bool:
    """Django's own belong to the thread: it looks after them between calls."""
    return issubclass(type(value), BaseDatabaseWrapper)


def _parts(value: Any) -> tuple[Any, ...]:
    """What a value consists of, where it may change without becoming another."""
    # Neither isinstance() nor getattr(): they would have a lazy object look for what it stands for.
    kind = type(value)
    if issubclass(kind, dict):
        found: Iterable[Any] = chain(value, value.values())
    elif issubclass(kind, (list, set, deque)):
        found = value
    else:
        try:
            attributes = object.__getattribute__(value, "__dict__")
        except AttributeError:
            return ()
        return _parts(attributes) if type(attributes) is dict else ()
    return tuple(found) if len(value) <= PARTS else (len(value),)


def _same(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> bool:
    if len(ours) != len(theirs):
        return False
    return all(map(is_, ours, theirs)) or (len(ours) == 1 and ours == theirs)


def _pairs(ours: list[_Kept], theirs: list[_Kept]) -> Iterable[tuple[_Kept, _Kept | None]]:
    by_id = {id(kept.local): kept for kept in theirs}
    return ((kept, by_id.get(id(kept.local))) for kept in ours)


def _kept(everything: bool = False) -> list[_Kept]:
    # What asgiref notes for each call is another one in each.
    own = None if everything else SyncToAsync.threadlocal
    return [_Kept(local) for local in _locals() if local is not own]


_found: list[weakref.ref[threading.local]] = []
_modules = 0


def _locals() -> list[threading.local]:
    """All of the process; looked for again when modules were imported."""
    if len(sys.modules) != _modules:
        find_locals()
    return [local for ref in _found if (local := ref()) is not None]


def find_locals() -> None:
    """Looks through everything there is, which takes some hundredths of a second."""
    global _found, _modules
    _modules = len(sys.modules)
    frozen = gc.get_freeze_count()
    if frozen:  # the collector does not show those
        gc.unfreeze()
    _found = [weakref.ref(it) for it in gc.get_objects() if issubclass(type(it), threading.local)]
    if frozen:
        gc.freeze()


def _in_transaction() -> bool:
    return any(
        connection.in_atomic_block or (connection.connection and not connection.autocommit)
        for connection in connections.all(initialized_only=True)
    )
