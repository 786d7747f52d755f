"""What the tests' processes wrote, held against the list of expected failures."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

#: From the best to the worst; a test that has several, one of each of its subtests, has the worst.
RANKS = {"skipped": 0, "passed": 1, "failed": 2, "error": 3}


class Outcome(NamedTuple):
    kind: str
    error: str = ""


@dataclasses.dataclass
class Run:
    """One module's tests over one engine, or over the bridge."""

    engine: str
    module: str
    seconds: float = 0.0
    tests: dict[str, Outcome] = dataclasses.field(default_factory=dict)
    #: What went through tornjango: statements by their engine, or requests by their method.
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    #: Why not all tests were run, if they were not.
    broken: str = ""

    def count(self, *kinds: str) -> int:
        return sum(outcome.kind in kinds for outcome in self.tests.values())


def read(run: Run, lines: Iterable[str]) -> None:
    """Adds to ``run`` what its process wrote."""
    unfinished = None
    for line in lines:
        told = json.loads(line)
        if told["step"] == "counted":
            run.counts.update(told["counts"])
            continue
        test = _plain(told["test"])
        unfinished = test if told["step"] == "started" else None
        if told["step"] != "started":
            _add(run, test, Outcome(told["step"], told["error"]))
    if unfinished is not None:
        _add(run, unfinished, Outcome("error", "the process ended in this test"))


def _plain(test: str) -> str:
    """``setUpClass (module.Class)``, as unittest names it, is ``module.Class.setUpClass`` here."""
    return re.sub(r"^(\w+) \(([\w.]+)\)$", r"\2.\1", test)


def _add(run: Run, test: str, outcome: Outcome) -> None:
    before = run.tests.get(test)
    if before is None or RANKS[outcome.kind] > RANKS[before.kind]:
        run.tests[test] = outcome


class Expected(NamedTuple):
    """A line of ``expected.txt``: what fails, where, and why."""

    engines: str
    django: str
    test: str
    reason: str

    def applies(self, engine: str, django: str) -> bool:
        versions = self.django.split(",")
        return any(fnmatchcase(engine, glob) for glob in self.engines.split(",")) and (
            "*" in versions or ".".join(django.split(".")[:2]) in versions
        )

    def covers(self, test: str) -> bool:
        return fnmatchcase(test, self.test)


def load(path: Path) -> list[Expected]:
    """Raises ValueError for a line without a reason."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return [_parse(line) for line in lines if line and not line.startswith("#")]


def _parse(line: str) -> Expected:
    parts = line.split(None, 3)
    if len(parts) != 4:
        raise ValueError(f"Not engines, Django versions, test and reason: {line!r}")
    return Expected(*parts)


class Verdict(NamedTuple):
    """A run beside what was expected of it."""

    expected: int
    #: Lines for people: what failed and was not listed, or was listed and did not fail.
    problems: list[str]


def judge(run: Run, listed: list[Expected], *, whole: bool) -> Verdict:
    """``whole``: all tests of the module were asked for, so that each line that is about it must be needed."""
    failures = {test: outcome for test, outcome in run.tests.items() if RANKS[outcome.kind] > 1}
    unlisted = [test for test in failures if not _covered(listed, test)]
    problems = [f"{test}: {failures[test].error}" for test in unlisted]
    problems += [
        f"{test}: passed, and is listed in expected.txt"
        for test, outcome in run.tests.items()
        if outcome.kind == "passed" and _covered(listed, test)
    ]
    problems += _needless(run, listed) if whole else []
    problems += [f"{run.module}: {run.broken}"] if run.broken else []
    if not run.tests:
        problems.append(f"{run.module}: no tests were run")
    return Verdict(len(failures) - len(unlisted), problems)


def _covered(listed: list[Expected], test: str) -> bool:
    return any(entry.covers(test) for entry in listed)


def _needless(run: Run, listed: list[Expected]) -> Iterator[str]:
    tests = [test for test, outcome in run.tests.items() if outcome.kind != "skipped"]
    for entry in listed:
        if entry.test.startswith(f"{run.module}.") and not any(map(entry.covers, tests)):
            yield f"{entry.test}: listed in expected.txt, and no test of that name was run"
