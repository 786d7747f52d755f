"""The worker threads: a bounded pool for everything sync, with Django's per-thread state kept as its own handlers do.

Each call begins and ends like a request of Django's WSGI handler: connections past their age are closed, on the thread
that opened them, and no transaction is left open for whoever uses the thread next.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

from asgiref.sync import SyncToAsync, ThreadSensitiveContext
from django.core.cache import close_caches
from django.core.signals import request_finished, request_started
from django.db import close_old_connections, connections, reset_queries
from greenlet import getcurrent, greenlet

from tornjango import stretches
from tornjango.exceptions import Overloaded
from tornjango.stretches import Call, Runner

_at_exit: Any = concurrent.futures.thread._threads_queues

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("tornjango.workers")


class WorkerPool(ThreadPoolExecutor):
    """At most ``threads`` threads, and ``queue`` calls waiting for one.

    ``submit`` raises ``Overloaded`` when the queue is full; it never blocks. A stretch of sync middleware that waits for
    an async view (``tornjango.stretches``) holds no thread, and counts as no call, until it goes on, on its own thread.
    """

    # A ThreadPoolExecutor, since asyncio takes no other. Its threads cannot be given a call that only one of them can
    # go on with; these can.

    def __init__(self, threads: int, queue: int) -> None:
        super().__init__(threads, thread_name_prefix="tornjango-worker")
        self._bound = threads + queue
        self._lock = threading.Lock()
        self._unfinished = 0
        self._waiting: deque[Call] = deque()
        self._idle: list[Worker] = []
        self._started: set[Worker] = set()
        self._threads = self._started  # the base class's name for it
        self._closed = False

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        call = Call(partial(_in_worker, fn, *args, **kwargs))
        with self._lock:
            if self._closed:
                raise RuntimeError("The worker threads take no more calls: the server has stopped.")
            if self._unfinished >= self._bound:
                raise self._overloaded()
            self._wake_one()
            self._unfinished += 1
            self._waiting.append(call)
        call.future.add_done_callback(self._finished)
        return call.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """No more calls are taken; those under way go on until they return, and ``wait`` waits for that."""
        cancelled: list[Call] = []
        with self._lock:
            self._closed = True
            if cancel_futures:
                cancelled.extend(self._waiting)
                self._waiting.clear()
            for worker in self._idle:
                worker.inbox.put(WAKE)
            self._idle.clear()
        for call in cancelled:
            call.future.cancel()
        if wait:
            for thread in list(self._started):
                thread.join()

    def _overloaded(self) -> Overloaded:
        return Overloaded(
            f"All {self._max_workers} worker threads are busy and "
            f"{self._bound - self._max_workers} calls wait for one "
            '(TORNJANGO["THREADS"], TORNJANGO["THREADS_QUEUE"]).'
        )

    @property
    def unfinished(self) -> int:
        """The calls that run, or wait for a thread."""
        return self._unfinished

    def status(self) -> dict[str, int]:
        """Threads there may be, those at work, and calls that wait for one."""
        busy = min(self._unfinished, self._max_workers)
        return {"size": self._max_workers, "busy": busy, "waiting": self._unfinished - busy}

    def _finished(self, future: Future[Any] | None = None) -> None:
        with self._lock:
            self._unfinished -= 1

    def _wake_one(self) -> None:
        """Better a thread that nobody is parked on: who comes back there would have to wait."""
        free = min(reversed(self._idle), key=Worker.load, default=None)
        if (free is None or free.parked) and len(self._started) < self._max_workers:
            worker = Worker(self, f"{self._thread_name_prefix}_{len(self._started)}")
            worker.start()
            self._started.add(worker)
            # As the base class does: they are told, and waited for, when the interpreter exits.
            _at_exit[worker] = worker.inbox
        elif free is not None:
            self._idle.remove(free)
            free.inbox.put(WAKE)

    # What its threads ask

    def next_call(self, worker: Worker) -> Call | None:
        """None when there is nothing to do: then the worker waits for its inbox."""
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            if self.is_done(worker):
                worker.inbox.put(WAKE)
            else:
                self._idle.append(worker)
            return None

    def is_done(self, worker: Worker) -> bool:
        """Whether ``worker`` is to end."""
        return self._closed and not self._waiting and not worker.parked

    def resume(self, worker: Worker, runner: Runner) -> None:
        with self._lock:
            self._unfinished += 1
            if worker in self._idle:
                self._idle.remove(worker)
            worker.inbox.put(runner)

    def parked(self) -> None:
        self._finished()

    def pass_on(self) -> None:
        """For a thread that was woken for a call, and has found something of its own to do first."""
        with self._lock:
            if self._waiting and self._idle:
                self._wake_one()


#: Tells a worker that there is a call, or that it is to end.
WAKE = object()


class Worker(threading.Thread):
    """Runs calls of its pool, and goes on with what is parked on it, which comes first."""

    greenlet: greenlet

    def __init__(self, pool: WorkerPool, name: str) -> None:
        super().__init__(name=name)
        #: Runners to go on with, WAKE, or None when the interpreter exits.
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.parked = 0
        self._pool = pool
        self._spare: Runner | None = None

    def load(self) -> int:
        return self.parked

    def run(self) -> None:
        self.greenlet = getcurrent()
        while not self._pool.is_done(self) and self._step():
            pass
        # A greenlet that waits in a thread that is gone can never end, and whoever finds it has to search all there is.
        if self._spare is not None:
            self._spare.throw()
        del self._spare, self.greenlet

    def _step(self) -> bool:
        """One call, or the next part of a parked one; False when the interpreter exits."""
        try:
            turn = self.inbox.get_nowait()
        except Empty:
            call = self._pool.next_call(self)
            if call is not None:
                self._go_on(self._runner_for(call))
                return True
            turn = self.inbox.get()
        if isinstance(turn, Runner):
            self._pool.pass_on()
            self.parked -= 1
            self._go_on(turn)
        return turn is not None

    def _runner_for(self, call: Call) -> Runner:
        runner, self._spare = self._spare or Runner(self), None
        runner.call = call
        return runner

    def _go_on(self, runner: Runner) -> None:
        runner.switch()
        if runner.is_idle:
            self._spare = runner
        else:
            self.parked += 1
            self._pool.parked()
            close_old_connections()

    def resume(self, runner: Runner) -> None:
        self._pool.resume(self, runner)


def _in_worker(fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    reset_queries()
    close_old_connections()
    try:
        return fn(*args, **kwargs)
    finally:
        _close_abandoned_transactions()
        close_old_connections()
        close_caches()


def _close_abandoned_transactions() -> None:
    """A transaction begun in one call and meant for the next would be met by another request."""
    for connection in connections.all(initialized_only=True):
        if connection.in_atomic_block:
            logger.error(
                "A call in a worker thread left a transaction open on database %r; it is rolled back. "
                "Begin and end a transaction in one function.",
                connection.alias,
            )
            connection.close()
            connection.in_atomic_block = False
            connection.savepoint_ids.clear()
            connection.atomic_blocks.clear()
            connection.run_on_commit.clear()
            connection.needs_rollback = False
            connection.closed_in_transaction = False


#: What Django does around a request, and ``_in_worker`` around a call: on the loop's thread it would find nothing to do.
PER_REQUEST = [
    (request_started, reset_queries),
    (request_started, close_old_connections),
    (request_finished, close_old_connections),
    (request_finished, close_caches),
]


class Workers:
    """Sends every ``sync_to_async`` call, and the loop's default executor, to one :class:`WorkerPool`.

    asgiref looks for the executor of thread-sensitive code in the current context: a request enters it, once.
    """

    def __init__(self, threads: int, queue: int) -> None:
        self.pool = WorkerPool(threads, queue)
        self._key = ThreadSensitiveContext()
        SyncToAsync.context_to_thread_executor[self._key] = self.pool
        self._taken_over = [pair for pair in PER_REQUEST if pair[0].disconnect(pair[1])]
        self._installed = stretches.install()

    def enter(self) -> None:
        """Makes ``sync_to_async`` in the current context, and in tasks started from it, use the pool."""
        SyncToAsync.thread_sensitive_context.set(self._key)

    def install(self, loop: asyncio.AbstractEventLoop) -> None:
        """Makes the pool the loop's default executor."""
        loop.set_default_executor(self.pool)

    def status(self) -> dict[str, int]:
        return self.pool.status()

    def close(self) -> None:
        """No more calls are taken; those under way go on until they return."""
        SyncToAsync.context_to_thread_executor.pop(self._key, None)
        while self._taken_over:
            signal, receiver = self._taken_over.pop()
            signal.connect(receiver)
        if self._installed:
            stretches.uninstall()
            self._installed = False
        self.pool.shutdown(wait=False, cancel_futures=True)
