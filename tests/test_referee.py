"""What runs Django's own tests: a referee that cannot show red would be no use."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.postgres import Postgres
from tests.referee import outcomes
from tests.referee.__main__ import EXPECTED, MODULES, QUICK, Referee, report
from tests.referee.outcomes import Expected, Outcome, Run


def line(step: str, test: str, error: str = "") -> str:
    return json.dumps({"step": step, "test": test, "error": error})


def run_of(*lines: str) -> Run:
    run = Run("momoko", "basic")
    outcomes.read(run, lines)
    return run


def problems(run: Run, *listed: Expected, whole: bool = True) -> list[str]:
    return outcomes.judge(run, list(listed), whole=whole).problems


def expected(test: str, engines: str = "momoko", django: str = "*") -> Expected:
    return Expected(engines, django, test, "a reason")


FAILED = run_of(line("started", "basic.T.a"), line("failed", "basic.T.a", "AssertionError: 1 != 2"))
PASSED = run_of(line("started", "basic.T.a"), line("passed", "basic.T.a"))


def test_the_worst_outcome_of_a_tests_subtests_counts() -> None:
    run = run_of(*(line(step, "basic.T.a") for step in ("started", "error", "failed", "passed")))
    assert run.tests == {"basic.T.a": Outcome("error")}


def test_a_class_that_cannot_be_set_up_has_a_name_like_a_test() -> None:
    assert list(run_of(line("error", "setUpClass (basic.tests.T)", "E")).tests) == [
        "basic.tests.T.setUpClass"
    ]


def test_a_test_in_which_the_process_ended_is_an_error() -> None:
    run = run_of(line("started", "basic.T.a"), line("passed", "basic.T.a"), line("started", "b"))
    assert run.tests["b"] == Outcome("error", "the process ended in this test")


def test_a_failure_is_a_problem_unless_it_is_listed() -> None:
    assert problems(FAILED) == ["basic.T.a: AssertionError: 1 != 2"]
    assert problems(FAILED, expected("basic.T.*")) == []


def test_a_listed_test_that_passes_is_a_problem() -> None:
    assert problems(PASSED, expected("basic.T.a")) == [
        "basic.T.a: passed, and is listed in expected.txt"
    ]


def test_a_line_for_a_test_that_there_is_not_is_a_problem_when_the_whole_module_was_run() -> None:
    gone = expected("basic.T.gone")
    assert len(problems(PASSED, gone)) == 1
    assert problems(PASSED, gone, whole=False) == []
    assert problems(PASSED, expected("queries.T.a")) == []


def test_a_module_that_broke_or_ran_nothing_is_a_problem() -> None:
    assert problems(Run("momoko", "basic")) == ["basic: no tests were run"]
    assert problems(Run("momoko", "basic", tests=PASSED.tests, broken="killed")) == [
        "basic: killed"
    ]


@pytest.mark.parametrize(
    ("engines", "django", "applies"),
    [
        ("*", "*", True),
        ("psycopg,momoko", "5.2,6.1", True),
        ("threads*", "*", False),
        ("momoko", "5.2", False),
    ],
)
def test_a_line_is_for_its_engines_and_versions(engines: str, django: str, applies: bool) -> None:
    assert expected("basic.T.a", engines, django).applies("momoko", "6.1.3") is applies


def test_a_line_without_a_reason_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "expected.txt"
    path.write_text("# engines, versions, test, reason\n\nmomoko * basic.T.a\n")
    with pytest.raises(ValueError, match=re.escape("'momoko * basic.T.a'")):
        outcomes.load(path)


def test_the_list_is_of_modules_that_are_run() -> None:
    assert {entry.test.partition(".")[0] for entry in outcomes.load(EXPECTED)} <= set(MODULES)
    assert set(QUICK) <= set(MODULES)


def test_a_run_whose_statements_went_elsewhere_is_a_problem(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Run("momoko", "basic", tests=PASSED.tests)
    assert report("momoko", iter([run]), [], {"basic"}) == 1
    assert "no statement went through the engine" in capsys.readouterr().out
    run.statements = Counter(momoko=1)
    assert report("momoko", iter([run]), [], {"basic"}) == 0


# A suite of our own in the place of Django's

RUNTESTS = """
import os, sys
import django
django.setup()
from django.conf import settings
from django.test.utils import get_runner
sys.exit(bool(get_runner(settings)().run_tests(sys.argv[3:])))
"""

SUITE = """
from asgiref.sync import sync_to_async
from django.contrib.contenttypes.models import ContentType
from django.db import connection, connections
from django.test import TestCase, TransactionTestCase, override_settings

class Tests(TestCase):
    @classmethod
    def setUpTestData(cls):
        ContentType.objects.create(app_label="a", model="b")

    def test_good(self):
        assert type(connection.connection).__name__ == "PoolConnection"
        assert ContentType.objects.filter(app_label="a").count() == 1

    async def test_wrapped_by_hand(self):
        await sync_to_async(ContentType.objects.create)(app_label="a", model="c")
        assert await ContentType.objects.filter(app_label="a").acount() == 2

    def test_bad(self):
        assert False, "wrong"

    def test_blocking(self):
        try:
            connections.create_connection("default").ensure_connection()
        except AssertionError:
            pass

class Zoned(TransactionTestCase):
    @override_settings(USE_TZ=False, TIME_ZONE="Europe/Paris")
    def test_zone(self):
        if connection.vendor == "postgresql":
            with connection.cursor() as cursor:
                cursor.execute("show timezone")
                assert cursor.fetchone() == ("Europe/Paris",)
"""


@pytest.fixture
def suite(folder: Path) -> Path:
    for name, text in {
        "runtests.py": RUNTESTS,
        "test_sqlite.py": 'INSTALLED_APPS = ["django.contrib.contenttypes"]\nSECRET_KEY = "x"\n',
        "sample/__init__.py": "",
        "sample/tests.py": SUITE,
    }.items():
        (folder / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tests" / name).write_text(text)
    return folder / "tests"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["momoko", "django", "threads-sqlite"])
def test_a_suite_is_run_over_an_engine(
    suite: Path, folder: Path, postgres: Postgres, engine: str
) -> None:
    (run,) = Referee(engine, suite, folder, postgres, folder, 1).run(["sample"])
    told = {test.rpartition(".")[2]: outcome.kind for test, outcome in run.tests.items()}
    assert not run.broken, (folder / run.broken.rpartition(" ")[2]).read_text()
    green = engine != "django"
    assert told == {
        "test_good": "passed" if green else "failed",
        "test_wrapped_by_hand": "passed",
        "test_bad": "failed",
        "test_blocking": "error" if green else "passed",
        "test_zone": "passed",
    }
    assert (run.statements.total() > 5) is green
