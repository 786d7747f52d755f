from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from tornjango.workers import WorkerPool


@contextmanager
def started_threads() -> Iterator[list[str]]:
    """The names of the threads that are started in the block, however short they live."""
    names: list[str] = []
    start = threading.Thread.start

    def noting(thread: threading.Thread) -> None:
        names.append(thread.name)
        start(thread)

    with mock.patch.object(threading.Thread, "start", noting):
        yield names


@contextmanager
def worker_calls() -> Iterator[list[Any]]:
    """What is handed to worker threads in the block."""
    calls: list[Any] = []
    submit = WorkerPool.submit

    def noting(pool: WorkerPool, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        calls.append((fn, args))
        return submit(pool, fn, *args, **kwargs)

    with mock.patch.object(WorkerPool, "submit", noting):
        yield calls


def thread_name(*args: Any) -> str:
    return threading.current_thread().name
