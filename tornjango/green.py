"""Sync code on the event loop: it runs in a greenlet, and where it would block it waits instead.

The code sees what sync code always sees: no running event loop, its caller's context variables, one thread. It must
not know, but may: `wait` is to it what ``await`` is to a coroutine. The idea is that of SQLAlchemy's asyncio support.

What waits is the database (``tornjango.db.connection``) and whatever calls `wait` or `aside`. Code that blocks in any other
way blocks the loop, and other tasks run while it waits, on the same thread: state in a ``threading.local`` is shared
with them. So nobody's sync code is run like this unless its project says so; Django's own is.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import sys
import threading
from asyncio.events import _set_running_loop
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial, wraps
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast

from asgiref.sync import sync_to_async
from django.views.decorators.debug import coroutine_functions_to_sensitive_variables
from greenlet import GreenletExit, getcurrent, greenlet

from tornjango.conf import get_config

P = ParamSpec("P")
T = TypeVar("T")


class Resource(Protocol):
    """What a `Scope` holds: it is given back when the scope ends."""

    def release(self) -> None:
        """Does not wait: what takes time is done in the background."""


class Scope:
    """What green calls share that belong together: those of one task, while the outermost of them runs.

    ``resources`` are for the modules that green code waits on; each is released at the end, in reverse order.
    """

    __slots__ = ("ended", "lock", "outer", "resources", "task", "task_was_known")

    def __init__(self, task: asyncio.Task[Any] | None, outer: Scope | None) -> None:
        self.task = task
        #: The scope around this one, which another task made.
        self.outer = outer
        self.resources: dict[Any, Resource] = {}
        self.ended = False
        #: Where several tasks share the scope: held by the one whose turn it is.
        self.lock: TaskLock | None = None
        self.task_was_known = False

    def admits(self, task: asyncio.Task[Any] | None) -> bool:
        return not self.ended and (self.task is task or self.lock is not None)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[bool]:
        """For a scope that tasks share: the others wait while a task is in here. False if it has ended meanwhile.

        Inside, the scope is the task's own: to tasks that it starts there, and would wait for, it is another task's.
        """
        assert self.lock is not None
        async with self.lock:
            if self.ended:
                yield False
                return
            own = Scope(asyncio.current_task(), self)
            own.resources = self.resources
            enter(own)
            try:
                yield True
            finally:
                leave(own)

    def end(self) -> None:
        self.ended = True
        while self.resources:
            _, resource = self.resources.popitem()
            resource.release()


class TaskLock:
    """A lock that its owner may take again, for tasks."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._owner: asyncio.Task[Any] | None = None
        self._depth = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self._owner is not task:
            self._tasks.add(task)
            try:
                await self._lock.acquire()
            except BaseException:
                self._tasks.discard(task)
                raise
            self._owner = task
        self._depth += 1

    async def __aexit__(self, *exc: object) -> None:
        self._depth -= 1
        if not self._depth:
            assert self._owner is not None
            self._tasks.discard(self._owner)
            self._owner = None
            self._lock.release()

    def cancel_others(self) -> None:
        """Cancels the tasks that hold the lock or wait for it, but the running one."""
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()


#: The scope that the code of a context is in, unless its task is known to be in another one.
_inherited: contextvars.ContextVar[Scope | None] = contextvars.ContextVar(
    "tornjango.green", default=None
)

# The callbacks of a deferred view are tasks that share one context: what one sets there, the others would find.
_of_task: dict[asyncio.Task[Any] | None, Scope | None] = {}


def current() -> Scope | None:
    """The scope that the caller is in, if any; whether it admits the caller's task is to be asked."""
    running = getcurrent()
    if isinstance(running, _Green):
        return running.scope
    if _of_task and (task := asyncio.current_task()) in _of_task:
        return _of_task[task]
    return _inherited.get()


def enter(scope: Scope) -> None:
    """From now on ``scope`` is the one of its task, which is running, and of the tasks that it starts."""
    scope.task_was_known = scope.task in _of_task
    _of_task[scope.task] = scope
    _inherited.set(scope)


def leave(scope: Scope) -> None:
    """The scope has ended; its task is in the outer one again."""
    scope.ended = True
    _inherited.set(scope.outer)
    if scope.task_was_known:
        _of_task[scope.task] = scope.outer
    else:
        _of_task.pop(scope.task, None)


@contextlib.contextmanager
def lent(scope: Scope | None) -> Iterator[None]:
    """Inside, the running task has what ``scope`` holds, whose own task waits for it meanwhile, and does nothing else."""
    if scope is None or scope.ended or scope.admits(asyncio.current_task()):
        yield
        return
    own = Scope(asyncio.current_task(), scope)
    own.resources = scope.resources
    enter(own)
    try:
        yield
    finally:
        leave(own)


def adopt(task: asyncio.Task[Any]) -> None:
    """For a task in a context that others share: it is in the scope that the caller is in."""
    _of_task[task] = current()
    task.add_done_callback(_forget)


def _forget(task: asyncio.Task[Any]) -> None:
    _of_task.pop(task, None)


class _Green(greenlet):
    """Runs one sync function after another, for there is much to do before a greenlet's first step and little later.

    Between two of them it is idle; while one waits, what it waits for is awaited by the greenlet that drives it.
    """

    driver: greenlet
    scope: Scope | None
    fn: Callable[..., Any] | None
    args: Any
    kwargs: Any
    result: Any
    error: BaseException | None  # type: ignore[assignment]
    #: What its caller was handling when it called: ``sys.exc_info()`` says so to sync code.
    handled: BaseException | None
    idle: bool
    #: How many `shielded` blocks it is in, and what the innermost one says of time.
    shields: int
    limit: float | None
    #: A cancellation that came meanwhile, and is yet to be met.
    cancelled: asyncio.CancelledError | None

    def run(self) -> None:
        while True:
            try:
                # Not in variables of their own: error reports would show the arguments, passwords among them.
                if self.handled is None:
                    self.result = self.fn(*self.args, **self.kwargs)  # type: ignore[misc]
                else:
                    handled, self.handled = self.handled, None
                    self.result = handling(handled, self.fn, *self.args, **self.kwargs)  # type: ignore[arg-type]
                    del handled
            except GreenletExit:
                raise
            except BaseException as exc:  # noqa: BLE001 - raised where the call is awaited
                self.error = exc
            self.idle = True
            self.fn = self.args = self.kwargs = None
            self.driver.switch()


class _Idle(threading.local):
    """A thread's greenlets that have nothing to do."""

    def __init__(self) -> None:
        self.greens: list[_Green] = []


_idle = _Idle()

#: Idle greenlets that a thread keeps.
KEPT = 64


def active() -> bool:
    """Whether the caller runs in a greenlet of `run`, and may `wait`."""
    return isinstance(getcurrent(), _Green)


def wait(awaitable: Awaitable[T]) -> T:
    """What awaiting gives, or raises, for sync code that `run` runs; other tasks run meanwhile.

    Raises ``CancelledError`` when the task is cancelled, and RuntimeError where nothing is green: see `active`.
    """
    running = getcurrent()
    if not isinstance(running, _Green):
        if asyncio.iscoroutine(awaitable):
            awaitable.close()
        raise RuntimeError("green.wait() is for sync code that green.run() runs.")
    if running.cancelled is not None and not running.shields:
        if asyncio.iscoroutine(awaitable):
            awaitable.close()
        cancelled, running.cancelled = running.cancelled, None
        raise cancelled
    return cast(T, running.driver.switch(awaitable))


@contextlib.contextmanager
def shielded(limit: float | None = None) -> Iterator[None]:
    """For what must not be left half done: inside, a wait is not cancelled, and a cancellation is met after the block.

    With a ``limit``, a wait that takes as many seconds more is cancelled after all.
    """
    running = getcurrent()
    if not isinstance(running, _Green):
        yield
        return
    running.shields += 1
    outer, running.limit = running.limit, limit
    try:
        yield
    finally:
        running.shields -= 1
        running.limit = outer


def unreported(fn: Callable[P, T]) -> Callable[P, T]:
    """Django's error reports show no variables of the coroutine function: its arguments may be another's passwords."""
    code: Any = getattr(fn, "__code__")  # noqa: B009 - not known to type checkers
    place = hash(f"{code.co_filename}:{code.co_firstlineno}")
    coroutine_functions_to_sensitive_variables[place] = "__ALL__"
    return fn


@unreported
def handling(exc: BaseException, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """``fn(...)``, as in an ``except`` block that has caught ``exc``: ``sys.exc_info()`` tells, and ``raise`` raises it."""
    traceback = exc.__traceback__
    try:
        raise exc
    except BaseException:  # noqa: BLE001 - it is being handled already
        exc.__traceback__ = traceback  # this is no place that it has come by
        return fn(*args, **kwargs)
    finally:
        del exc, traceback


def runs_green(view: Callable[..., Any]) -> bool:
    """Whether the project has a sync view run green: by a decorator of ``tornjango.views``, or for all of them."""
    view = view.func if isinstance(view, partial) else view
    mode: str = getattr(view, "_sync_mode", None) or get_config().SYNC_VIEWS
    return mode == "green"


class _Served(NamedTuple):
    """What there is while the pools are open."""

    #: The loop that they are for; None while nobody has said.
    loop: asyncio.AbstractEventLoop | None = None


_served: _Served | None = None

#: Whether sync code in a thread waits for the caller, by ``async_to_sync``, in a transaction on Django's own connection.
in_threads_transaction: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "tornjango.green.thread", default=False
)


def serve(loop: asyncio.AbstractEventLoop | None = None) -> None:
    """From now on until `stop_serving` sync code runs green, on this loop, or on any where none is given."""
    global _served
    _served = _Served(loop)


def stop_serving() -> None:
    global _served
    _served = None


def is_served() -> bool:
    """Whether the caller's sync code runs green, and its queries are for the pools.

    Not in a process that tornjango does not serve, nor on another loop than the server's (in a test beside it, say); nor
    for a thread that waits for it in a transaction of its own, for then they are for that.
    """
    if _served is None or in_threads_transaction.get():
        return False
    return _served.loop is None or asyncio._get_running_loop() in (None, _served.loop)


@unreported
async def run(fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """``fn(*args, **kwargs)``, sync code, on the event loop: see the module's description.

    Calls within calls, and all those inside ``async with db.atomic()``, share their database connections; two that run
    at once never do. Cancelled, the code meets ``CancelledError`` where it waits.

    Where tornjango does not serve (`is_served`) it runs in a thread, with Django's own connection of the caller.
    """
    if not is_served():
        return await sync_to_async(fn)(*args, **kwargs)
    task = asyncio.current_task()
    outer = current()
    if outer is not None and outer.admits(task):
        if outer.lock is None:
            return await _drive(outer, fn, args, kwargs)
        async with outer.turn() as admitted:
            if admitted:
                return await _drive(current(), fn, args, kwargs)
    own = Scope(task, outer)
    enter(own)
    try:
        return await _drive(own, fn, args, kwargs)
    finally:
        try:
            own.end()
        finally:
            leave(own)


@unreported
async def _drive(scope: Scope | None, fn: Callable[..., T], args: Any, kwargs: Any) -> T:
    loop = asyncio.get_running_loop()
    driver = getcurrent()
    green = _idle.greens.pop() if _idle.greens else _Green()
    green.driver = driver
    green.scope = scope
    green.gr_context = driver.gr_context
    green.fn, green.args, green.kwargs = fn, args, kwargs
    green.result = green.error = None
    green.handled = sys.exception()
    green.idle, green.shields, green.limit, green.cancelled = False, 0, None, None
    step: Callable[[Any], Any] = _start
    given: Any = green
    while True:
        # While the greenlet runs, its code finds no event loop in its thread.
        _set_running_loop(None)
        try:
            result = step(given)
        finally:
            _set_running_loop(loop)
        if green.idle:
            break
        step, given = green.switch, None
        try:
            given = await (_to_end(result, green) if green.shields else result)
        except BaseException as exc:  # noqa: BLE001 - the green code's own to handle
            step, given = green.throw, exc
        del result
    result, error = green.result, green.error or green.cancelled
    green.result = green.error = green.cancelled = None
    green.gr_context = None
    del green.driver, green.scope
    if len(_idle.greens) < KEPT:
        _idle.greens.append(green)
    if error is None:
        return cast(T, result)
    try:
        raise error
    finally:
        del error, given


def _start(green: _Green) -> Any:
    return green.switch()


def aside(fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``fn(...)`` in a worker thread, if the caller is green code; for what would hold up the loop."""
    if not active():
        return fn(*args, **kwargs)
    # With asgiref, which alone can carry its Locals (the language, the time zone) to another thread.
    handled = sys.exception()
    if handled is not None:
        call = sync_to_async(handling, thread_sensitive=False)
        return wait(call(handled, fn, *args, **kwargs))
    return wait(sync_to_async(fn, thread_sensitive=False)(*args, **kwargs))


def blocking(fn: Callable[P, T]) -> Callable[P, T]:
    """Marks sync code that computes, or blocks, for long: called by green code, it goes to a worker thread by itself."""

    @wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        return aside(fn, *args, **kwargs)

    return wrapper


async def _to_end(work: Awaitable[T], green: _Green) -> T:
    task = asyncio.ensure_future(work)
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as exc:
            green.cancelled = exc
            if green.limit is not None:
                task.get_loop().call_later(green.limit, task.cancel)
    return task.result()


async def finish(work: Awaitable[T]) -> T:
    """Awaits ``work`` to its end, whatever cancels the task meanwhile; raises ``CancelledError`` after it, then."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        task.exception()
        raise cancelled
    return task.result()
