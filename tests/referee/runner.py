"""In the process of Django's ``runtests.py``: its runner, with a line of JSON for each test, and on the loop."""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import threading
import unittest
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias
from unittest import mock

from asgiref.sync import SyncToAsync
from django.core.signals import setting_changed
from django.db import connections
from django.test.runner import DiscoverRunner
from django.test.utils import iter_test_cases  # type: ignore[attr-defined]

from tests.referee.bridge import Bridge, runserver_of_tornjango
from tornjango import green
from tornjango.db import pools
from tornjango.db.engines.base import Engine, Lease, Stream

#: How long one test, or what comes between two, may take; then all threads' stacks are printed, and the process ends.
TEST_LIMIT = 180

Error: TypeAlias = (
    "tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]"
)


class Lines:
    """What the run has to tell, for ``outcomes`` to read: a line at a time, for the process may end in any test."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._test = ""

    def started(self, test: str) -> None:
        self._test = test
        self.write("started", test)

    def blocked(self, alias: str) -> None:
        self.write("error", self._test, f"connected to {alias!r} in the blocking way, on the loop")

    def write(self, step: str, test: str, error: str = "") -> None:
        self._line({"step": step, "test": test, "error": error})

    def counted(self, counts: Counter[str]) -> None:
        """How much went through tornjango: statements by their engine, or requests by their method."""
        self._line({"step": "counted", "counts": counts})

    def _line(self, line: dict[str, object]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


lines = Lines(os.environ["REFEREE_LINES"])


class Result(unittest.TextTestResult):
    def startTest(self, test: unittest.TestCase) -> None:
        faulthandler.dump_traceback_later(TEST_LIMIT, exit=True)
        lines.started(test.id())
        super().startTest(test)

    def stopTestRun(self) -> None:
        super().stopTestRun()
        faulthandler.cancel_dump_traceback_later()

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self._write("passed", test)

    def addError(self, test: unittest.TestCase, err: Error) -> None:
        super().addError(test, err)
        self._write("error", test, err[1])

    def addFailure(self, test: unittest.TestCase, err: Error) -> None:
        super().addFailure(test, err)
        self._write("failed", test, err[1])

    def addSubTest(
        self, test: unittest.TestCase, subtest: unittest.TestCase, err: Error | None
    ) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None:
            failed = isinstance(err[1], test.failureException)
            self._write("failed" if failed else "error", test, err[1])

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        super().addSkip(test, reason)
        self._write("skipped", test)

    def addExpectedFailure(self, test: unittest.TestCase, err: Error) -> None:
        """Of those that Django itself expects to fail on a database."""
        super().addExpectedFailure(test, err)
        self._write("skipped", test)

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        super().addUnexpectedSuccess(test)
        self._write("failed", test, AssertionError("Django expects this test to fail."))

    def _write(self, step: str, test: unittest.TestCase, error: object = None) -> None:
        first = (str(error).splitlines() or [""])[0]
        lines.write(step, test.id(), "" if error is None else f"{type(error).__name__}: {first}")


#: They expect that a file's permissions keep them out.
NOT_AS_ROOT = {
    "file_uploads.tests.DirectoryCreationTests.test_readonly_root",
    "i18n.test_compilation.PoFileTests.test_no_write_access",
    "template_tests.test_loaders.FileSystemLoaderTests.test_permissions_error",
}


class Runner(DiscoverRunner):
    """Django's own connections: what fails here is not tornjango's."""

    def __init__(self, **options: Any) -> None:
        # A database that a killed run has left behind is made anew: nobody is here to be asked.
        super().__init__(**{**options, "interactive": False})

    def get_resultclass(self) -> type[Result]:
        return Result


class GreenRunner(Runner):
    """The databases are made as ever; then the suite runs on an event loop, as green code, with the pools open."""

    def run_suite(self, suite: unittest.TestSuite, **kwargs: Any) -> unittest.TextTestResult:
        serialized = {
            alias: getattr(connections[alias], "_test_serialized_contents", None)
            for alias in connections
        }
        # Nothing of what was used so far is to serve the suite.
        connections.close_all()
        return asyncio.run(self._serve(suite, serialized))

    async def _serve(
        self, suite: unittest.TestSuite, serialized: dict[str, str | None]
    ) -> unittest.TextTestResult:
        counts: Counter[str] = Counter()
        try:
            with _no_blocking(), _sync_to_async_green(), Pools(counts):
                return await green.run(self._run, suite, serialized)
        finally:
            await pools.close()
            lines.counted(counts)

    def _run(
        self, suite: unittest.TestSuite, serialized: dict[str, str | None]
    ) -> unittest.TextTestResult:
        for alias, contents in serialized.items():
            if contents is not None:
                connections[alias]._test_serialized_contents = contents  # type: ignore[attr-defined]
        result: unittest.TextTestResult = super().run_suite(suite)
        return result


def _nothing(test: unittest.TestCase) -> None:
    """In the place of a test that is skipped."""


class BridgeRunner(Runner):
    """What the tests' clients request goes through tornjango: see `tests.referee.bridge`."""

    def build_suite(self, *args: Any, **kwargs: Any) -> unittest.TestSuite:
        with runserver_of_tornjango():
            suite: unittest.TestSuite = super().build_suite(*args, **kwargs)
        if os.geteuid() == 0:
            for test in iter_test_cases(suite):
                if test.id() in NOT_AS_ROOT:
                    setattr(type(test), test._testMethodName, unittest.skip("as root")(_nothing))
        return suite

    def run_suite(self, suite: unittest.TestSuite, **kwargs: Any) -> unittest.TextTestResult:
        with Bridge() as bridge:
            try:
                result: unittest.TextTestResult = super().run_suite(suite, **kwargs)
            finally:
                lines.counted(bridge.requests)
        return result


class Pools:
    """Opens the pools, and opens others when a test changes what their connections were set up with."""

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts

    def __enter__(self) -> None:
        self._open()
        setting_changed.connect(self._setting_changed)

    def __exit__(self, *exc: object) -> None:
        setting_changed.disconnect(self._setting_changed)

    def _open(self) -> None:
        pools.open()
        for alias in connections:
            _count(pools.get(alias), self._counts)

    def _setting_changed(self, *, setting: str, **kwargs: object) -> None:
        if setting not in {"TIME_ZONE", "USE_TZ"} or not green.active():
            return
        wrappers: list[Any] = [connections[alias] for alias in connections]
        if any(wrapper.in_transaction for wrapper in wrappers):
            return
        for wrapper in wrappers:
            wrapper.close()
        green.wait(pools.close())
        self._open()
        for wrapper in wrappers:
            wrapper.engine = pools.get(wrapper.alias)


class _CountedLease:
    def __init__(self, lease: Lease, count: Callable[[], None]) -> None:
        self._lease = lease
        self._count = count

    def execute(self, *args: Any) -> Awaitable[Any]:
        self._count()
        return self._lease.execute(*args)

    def stream(self, *args: Any) -> Awaitable[Stream]:
        self._count()
        return self._lease.stream(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lease, name)


def _count(engine: Engine, counts: Counter[str]) -> None:
    """Counts what reaches the engine from now on, under its name."""
    execute, stream, begin = engine.execute, engine.stream, engine.begin

    def count() -> None:
        counts[engine.name] += 1

    def counted_execute(*args: Any) -> Awaitable[Any]:
        count()
        return execute(*args)

    def counted_stream(*args: Any) -> Awaitable[Stream]:
        count()
        return stream(*args)

    async def counted_begin() -> _CountedLease:
        return _CountedLease(await begin(), count)

    vars(engine).update(execute=counted_execute, stream=counted_stream, begin=counted_begin)


@contextmanager
def _no_blocking() -> Iterator[None]:
    """Django's own connection to a database may be made in other threads than this one only."""
    loop_thread = threading.get_ident()
    base = type(connections["default"])
    connect = base.get_new_connection

    def guarded(self: Any, conn_params: Any) -> Any:
        if threading.get_ident() == loop_thread:
            # Told here, for the test may pass in spite of the error.
            lines.blocked(self.alias)
            raise AssertionError("Django's own connection was asked for on the event loop.")
        return connect(self, conn_params)

    with mock.patch.object(base, "get_new_connection", guarded):
        yield


@contextmanager
def _sync_to_async_green() -> Iterator[None]:
    """What the tests wrap by hand is code that queries, in the test's own transaction: no thread sees that."""
    before = SyncToAsync.__call__

    async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        scope = green.current()
        if self._thread_sensitive and scope is not None and scope.admits(asyncio.current_task()):
            return await green.run(self.func, *args, **kwargs)
        return await before(self, *args, **kwargs)

    with mock.patch.object(SyncToAsync, "__call__", call):
        yield
