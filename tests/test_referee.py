"""What runs Django's own tests: a referee that cannot show red would be no use."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from django.http import HttpResponse

from tests.postgres import Postgres
from tests.referee import bridge, outcomes
from tests.referee.__main__ import BRIDGE, DATABASE, Referee, Subject, report
from tests.referee.outcomes import Expected, Outcome, Run
from tornjango.testing import Response


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


@pytest.mark.parametrize("subject", [DATABASE, BRIDGE])
def test_the_list_is_of_modules_that_are_run(subject: Subject) -> None:
    listed = {entry.test.partition(".")[0] for entry in outcomes.load(subject.expected)}
    assert listed <= {label.partition(".")[0] for label in subject.modules}
    assert set(subject.quick) <= set(subject.modules)


@pytest.mark.parametrize("counted", ["statements", "requests"])
def test_a_run_of_which_nothing_went_through_tornjango_is_a_problem(
    counted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run("momoko", "basic", tests=PASSED.tests)
    assert report("momoko", iter([run]), [], {"basic"}, counted) == 1
    assert f"no {counted} went through tornjango" in capsys.readouterr().out
    run.counts = Counter(momoko=1)
    assert report("momoko", iter([run]), [], {"basic"}, counted) == 0


# A suite of our own in the place of Django's

RUNTESTS = """
import os, sys
import django
django.setup()
from django.conf import settings
from django.test.utils import get_runner
sys.exit(bool(get_runner(settings)().run_tests(sys.argv[3:])))
"""

SETTINGS = """
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.staticfiles"]
SECRET_KEY = "x"
STATIC_URL = "static/"
STATIC_ROOT = "."
DATABASES = {a: {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"} for a in ("default", "other")}
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
    return made(folder, SUITE)


def made(folder: Path, suite: str) -> Path:
    for name, text in {
        "runtests.py": RUNTESTS,
        "test_sqlite.py": SETTINGS,
        "sample/__init__.py": "",
        "sample/tests.py": suite,
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
    assert (run.counts.total() > 5) is green


# The bridge

REQUESTS = """
from unittest import mock
from urllib.request import urlopen
from django.contrib.contenttypes.models import ContentType
from django.http import HttpResponse, StreamingHttpResponse
from django.test import LiveServerTestCase, SimpleTestCase, TestCase, override_settings
from django.urls import path
from django.utils import translation
from tornjango.requests import TornadoRequest

def counts(request):
    ContentType.objects.create(app_label="a", model="c")
    return HttpResponse(str(ContentType.objects.filter(app_label="a").count()))

async def counts_async(request):
    return HttpResponse(str(await ContentType.objects.filter(app_label="a").acount()))

def tells(request):
    language = translation.get_language()
    return HttpResponse(f"{type(request).__name__} {language} {request.META.get('REMOTE_USER')} {request.body!r}")

def streams(request):
    return StreamingHttpResponse(iter([b"a", b"b"]))

def breaks(request):
    def parts():
        yield b"a"
        raise ValueError("midway")
    return StreamingHttpResponse(parts())

def wrong(request):
    raise KeyError("wrong")

urlpatterns = [
    path(f"{view.__name__}/", view) for view in (counts, counts_async, tells, streams, breaks, wrong)
]

@override_settings(ROOT_URLCONF="sample.tests")
class Database(TestCase):
    def test_transaction(self):
        ContentType.objects.create(app_label="a", model="b")
        with self.assertNumQueries(2):
            assert self.client.get("/counts/").content == b"2"
        assert self.client.get("/counts_async/").content == b"2"
        assert ContentType.objects.filter(app_label="a").count() == 2

    async def test_async(self):
        assert (await self.async_client.get("/counts_async/")).content == b"0"

@override_settings(ROOT_URLCONF="sample.tests")
class Plain(SimpleTestCase):
    def test_told(self):
        with translation.override("de"):
            response = self.client.post("/tells/", b"x", "text/plain", REMOTE_USER="me")
        assert response.content == b"TornadoRequest de me b'x'", response.content
        assert isinstance(response.wsgi_request, TornadoRequest)

    def test_streams(self):
        assert b"".join(self.client.get("/streams/").streaming_content) == b"ab"

    def test_broken(self):
        with self.assertRaisesMessage(ValueError, "midway"):
            self.client.get("/breaks/")

    def test_raises(self):
        with self.assertRaisesMessage(KeyError, "wrong"):
            self.client.get("/wrong/")

    def test_setting(self):
        with override_settings(ROOT_URLCONF=__name__ + "_other"):
            with self.assertRaises(ModuleNotFoundError):
                self.client.get("/tells/")

@override_settings(ROOT_URLCONF="sample.tests")
class Live(LiveServerTestCase):
    def test_live(self):
        with urlopen(self.live_server_url + "/tells/") as answer:
            assert answer.headers["Server"] == "tornjango"
            assert answer.read().startswith(b"TornadoRequest en")
"""


@pytest.mark.slow
def test_requests_are_sent_over_the_bridge(folder: Path) -> None:
    (run,) = Referee("bridge", made(folder, REQUESTS), folder, None, folder, 1).run(["sample"])
    assert not run.broken, (folder / run.broken.rpartition(" ")[2]).read_text()
    assert {
        test.rpartition(".")[2]: outcome.error for test, outcome in run.tests.items()
    } == dict.fromkeys(
        (
            "test_transaction",
            "test_async",
            "test_told",
            "test_streams",
            "test_broken",
            "test_raises",
            "test_setting",
            "test_live",
        ),
        "",
    )
    assert run.counts == Counter(GET=7, POST=1)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"status": 201}, "201"),
        ({"headers": (("Content-Type", "text/plain"), ("X-A", "2"))}, "X-A"),
        ({"headers": (("Content-Type", "text/plain"),)}, "x-a"),
        ({"body": b"other"}, "other"),
    ],
)
def test_an_answer_that_is_not_what_django_answered_is_a_failure(
    changed: dict[str, Any], what: str
) -> None:
    message = bridge.Message("GET", "/", [], b"", "http", {})
    call = bridge.Call(message, enforce_csrf_checks=False)
    call.response = HttpResponse("a", "text/plain", headers={"X-A": "1"})
    head = Response("HTTP/1.1", 200, "OK", (("Content-Type", "text/plain"), ("X-A", "1")), b"a")
    assert bridge._received(call, head, [b"a"]) is call.response
    came = dataclasses.replace(head, **changed)
    with pytest.raises(AssertionError, match=what):
        bridge._received(call, came, [came.body])
