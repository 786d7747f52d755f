"""The worker threads: a bounded pool for everything sync, with Django's per-thread state kept as its own handlers do.

Each call begins and ends like a request of Django's WSGI handler: connections past their age are closed, on the thread
that opened them, and no transaction is left open for whoever uses the thread next.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

from asgiref.sync import SyncToAsync, ThreadSensitiveContext
from django.core.cache import close_caches
from django.core.signals import request_finished, request_started
from django.db import close_old_connections, connections, reset_queries

from tornjango.exceptions import Overloaded

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("tornjango.workers")


class WorkerPool(ThreadPoolExecutor):
    """At most ``threads`` threads, and ``queue`` calls waiting for one.

    ``submit`` raises ``Overloaded`` when the queue is full; it never blocks.
    """

    def __init__(self, threads: int, queue: int) -> None:
        super().__init__(threads, thread_name_prefix="tornjango-worker")
        self._bound = threads + queue
        self._unfinished = 0
        self._lock = threading.Lock()

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        with self._lock:
            full = self._unfinished >= self._bound
            self._unfinished += not full
        if full:
            raise Overloaded(
                f"All {self._max_workers} worker threads are busy and "
                f"{self._bound - self._max_workers} calls wait for one "
                '(TORNJANGO["THREADS"], TORNJANGO["THREADS_QUEUE"]).'
            )
        try:
            future = super().submit(partial(_in_worker, fn, *args, **kwargs))
        except BaseException:
            self._finished()
            raise
        future.add_done_callback(self._finished)
        return future

    def status(self) -> dict[str, int]:
        """Threads there may be, those at work, and calls that wait for one."""
        busy = min(self._unfinished, self._max_workers)
        return {"size": self._max_workers, "busy": busy, "waiting": self._unfinished - busy}

    def _finished(self, future: Future[Any] | None = None) -> None:
        with self._lock:
            self._unfinished -= 1


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
        self.pool.shutdown(wait=False, cancel_futures=True)
