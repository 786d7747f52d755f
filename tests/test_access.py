from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.contrib.auth.models import AnonymousUser, User
from django.http import HttpRequest
from django.test import override_settings
from django.utils.functional import SimpleLazyObject

from tests import views
from tests.serving import Site, serving, until
from tornjango import access
from tornjango.access import Answer, Unread
from tornjango.conf import Config

COMBINED = re.compile(
    r"(?P<client>\S+) - (?P<user>\S+) \[(?P<time>\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4})\] "
    r'"(?P<line>(?:[^"\\]|\\.)*)" (?P<status>\d{3}) (?P<bytes>\d+|-) '
    r'"(?P<referer>(?:[^"\\]|\\.)*)" "(?P<agent>(?:[^"\\]|\\.)*)"'
)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def lines(self) -> list[str]:
        return [record.getMessage() for record in self.records]

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


@contextmanager
def logged(logger: logging.Logger) -> Iterator[_Lines]:
    """What a project's LOGGING would do for this logger, and undo."""
    before = logger.level, logger.propagate, logger.handlers
    lines = _Lines()
    logger.handlers, logger.propagate = [lines], False
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.level, logger.propagate, logger.handlers = before
        logger.setLevel(before[0])


async def _lines_of(site: Site, log: _Lines, count: int) -> None:
    """A line is written when its answer is out: a client may have it before."""
    await until(lambda: len(log.records) >= count)


@pytest.mark.gen_test
async def test_common_is_apaches_combined_format() -> None:
    with logged(access.access_log) as log:
        async with serving(TORNJANGO={"ACCESS_LOG": "common"}) as site:
            headers = [("Referer", "http://a/"), ("User-Agent", "tests")]
            await site.request("/status/404/?a=1", headers=headers)
            await site.request("/status/200/", method="HEAD")
            await _lines_of(site, log, 2)
    first, second = (COMBINED.fullmatch(line) for line in log.lines)
    assert first is not None
    assert second is not None
    assert first["client"] == "127.0.0.1"
    assert first["line"] == "GET /status/404/?a=1 HTTP/1.1"
    assert (first["status"], first["bytes"], first["referer"]) == ("404", "7", "http://a/")
    assert (first["user"], first["agent"]) == ("-", "tests")
    assert (second["bytes"], second["referer"], second["agent"]) == ("0", "-", "-")


@pytest.mark.gen_test
async def test_json_is_an_object_for_each_request() -> None:
    with logged(access.access_log) as log:
        async with serving(TORNJANGO={"ACCESS_LOG": "json"}) as site:
            await site.request("/status/200/?a=%20", headers=[("X-Request-ID", "abc")])
            await _lines_of(site, log, 1)
    (line,) = log.objects
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert 0 <= line.pop("duration_ms") < 60_000
    assert line == {
        "client": "127.0.0.1",
        "method": "GET",
        "path": "/status/200/",
        "query": "a=%20",
        "status": 200,
        "bytes": 7,
        "view": "tests.views.status",
        "user_agent": "",
        "complete": True,
        "request_id": "abc",
    }


@pytest.mark.gen_test
async def test_runserver_is_djangos_line_where_debug_is_off() -> None:
    with logged(access.server_log) as log:
        async with serving(TORNJANGO={"ACCESS_LOG": "runserver"}) as site:
            await site.request("/status/404/")
            await _lines_of(site, log, 1)
    (record,) = log.records
    assert (record.levelname, record.status_code) == ("WARNING", 404)  # type: ignore[attr-defined]
    assert record.getMessage() == '"GET /status/404/ HTTP/1.1" 404 7'
    assert re.fullmatch(r"\d\d/\w{3}/\d{4} \d\d:\d\d:\d\d", record.server_time)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("option", "debug", "writes"),
    [("auto", True, True), ("auto", False, False), ("off", True, False), ("json", False, True)],
)
def test_auto_writes_in_development_only(option: str, debug: bool, writes: bool) -> None:
    with override_settings(DEBUG=debug), logged(access.access_log):
        assert (access.make(Config(ACCESS_LOG=option)) is not None) is writes


@pytest.mark.gen_test
async def test_a_stream_is_logged_at_its_end_with_what_was_sent() -> None:
    with logged(access.access_log) as log:
        async with (
            serving(TORNJANGO={"ACCESS_LOG": "json"}) as site,
            await site.connect() as client,
        ):
            await client.send(b"GET /streams/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await client.head()
            assert await client.chunk() == b"one"
            assert log.records == []
            views.gates["go"].set()
            assert [await client.chunk(), await client.chunk()] == [b"two", b""]
            await _lines_of(site, log, 1)
    (line,) = log.objects
    assert (line["status"], line["bytes"], line["complete"]) == (200, 6, True)


@pytest.mark.gen_test
async def test_a_client_that_leaves_in_a_stream_has_what_was_sent() -> None:
    with logged(access.access_log) as log:
        async with (
            serving(TORNJANGO={"ACCESS_LOG": "json"}) as site,
            await site.connect() as client,
        ):
            await client.send(b"GET /streams/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await client.head()
            assert await client.chunk() == b"one"
            client.abort()
            await _lines_of(site, log, 1)
    (line,) = log.objects
    assert (line["status"], line["bytes"], line["complete"]) == (200, 3, False)


@pytest.mark.gen_test
async def test_a_client_that_leaves_before_the_answer_is_499() -> None:
    with logged(access.access_log) as log:
        async with serving(ROOT_URLCONF="tests.urls", TORNJANGO={"ACCESS_LOG": "json"}) as site:
            async with await site.connect() as client:
                await client.send(b"GET /parks-async/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
                await views.gates["parked"].wait()
            await _lines_of(site, log, 1)
    (line,) = log.objects
    assert (line["status"], line["bytes"], line["complete"]) == (499, 0, False)
    assert line["view"] == "tests.views.parks_async"


@pytest.mark.gen_test
async def test_what_is_refused_before_django_is_logged() -> None:
    with logged(access.access_log) as log:
        async with serving(TORNJANGO={"ACCESS_LOG": "json", "MAX_BODY_SIZE": 10}) as site:
            await site.request("/upload/", method="POST", body=b"x" * 11)
            await site.raw(b"GET /status/200/ HTTP/1.1\r\nHost: a b\r\n\r\n")
            await site.raw(b"nonsense\r\n\r\n")
            await site.raw(b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000)
            await _lines_of(site, log, 4)
    large, hostless, unread, long = log.objects
    assert [(line["status"], line["method"], line["path"]) for line in (unread, long)] == [
        (400, "", ""),
        (431, "", ""),
    ]
    assert unread["bytes"] > 0
    assert (large["status"], large["path"]) == (413, "/upload/")
    assert large["bytes"] == len("The request body is larger than 10 bytes.\n")
    assert (hostless["status"], hostless["path"]) == (400, "/status/200/")


@pytest.mark.gen_test
async def test_a_server_that_is_busy_is_logged_as_503(error_log: list[logging.LogRecord]) -> None:
    with logged(access.access_log) as log:
        async with serving(ROOT_URLCONF="tests.urls", TORNJANGO={"ACCESS_LOG": "json"}) as site:
            assert (await site.request("/overloaded/")).status == 503
            await _lines_of(site, log, 1)
    assert log.objects[0]["status"] == 503
    error_log.clear()


@pytest.mark.gen_test
async def test_tornados_handlers_are_logged_with_their_name() -> None:
    with logged(access.access_log) as log:
        async with serving(ROOT_URLCONF="tests.urls", TORNJANGO={"ACCESS_LOG": "json"}) as site:
            answer = await site.request("/tornado/7/")
            await _lines_of(site, log, 1)
    (line,) = log.objects
    assert (line["status"], line["view"]) == (200, "tests.views.Plain")
    assert line["bytes"] == len(answer.body)


# What is written, without a server


def _line(kind: str, answer: Answer) -> str:
    with logged(access.access_log) as log:
        write = access.make(Config(ACCESS_LOG=kind))
        assert write is not None
        write(answer)
    return log.lines[0]


@pytest.mark.parametrize("kind", ["common", "json"])
def test_no_header_makes_a_line_or_a_field_of_its_own(kind: str) -> None:
    request = Unread("::1", "GET", '/a"\r\nb\x1b[2J\\\u2028', "HTTP/1.1")
    request.headers = {"User-Agent": 'x" 200 1\n"', "Referer": "\x85", "X-Request-ID": "\n"}
    line = _line(kind, Answer(request, 200, 1))
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    if kind == "common":
        parts = COMBINED.fullmatch(line)
        assert parts is not None
        assert parts["line"] == r"GET /a\"\x0d\x0ab\x1b[2J\\\x2028 HTTP/1.1"
        assert (parts["agent"], parts["referer"]) == (r"x\" 200 1\x0a\"", r"\x85")


def test_runserver_escapes_what_a_client_sent() -> None:
    request = Unread("::1", "GET", "/\x1b[2J", "HTTP/1.1")
    with logged(access.server_log) as log:
        write = access.make(Config(ACCESS_LOG="runserver"))
        assert write is not None
        write(Answer(request, 200, 1))
    assert log.lines == [r'"GET /\x1b[2J HTTP/1.1" 200 1']


def _by(user: object, name: str = "user") -> Answer:
    request = HttpRequest()
    setattr(request, name, user)
    return Answer(Unread("", "GET", "/", "HTTP/1.1"), 200, None, django_request=request)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("ada", "ada"), ("ada lovelace", r"ada\x20lovelace"), ("é\n", r"\xc3\xa9\x0a")],
)
def test_a_user_that_is_known_is_named(name: str, shown: str) -> None:
    parts = COMBINED.fullmatch(_line("common", _by(User(username=name))))
    assert parts is not None
    assert parts["user"] == shown
    assert parts["bytes"] == "-"


def test_nobody_is_asked_who_the_user_is() -> None:
    def ask() -> User:
        raise AssertionError("a query")

    assert _by(SimpleLazyObject(ask)).user == ""
    assert _by(AnonymousUser()).user == ""
    user = SimpleLazyObject(lambda: User(username="ada"))
    assert str(user.username) == "ada"
    assert _by(user).user == "ada"
    assert _by(User(username="eve"), "_acached_user").user == "eve"
    deferred = User.from_db("default", ["id"], [1])
    assert _by(deferred).user == ""


# Where it is written


@pytest.fixture
def untouched_logger() -> Iterator[logging.Logger]:
    logger = access.access_log
    before = logger.level, logger.propagate, list(logger.handlers), logger.disabled
    logger.handlers, logger.propagate, logger.disabled = [], True, True
    logger.setLevel(logging.NOTSET)
    yield logger
    logger.propagate, logger.handlers, logger.disabled = before[1:]
    logger.setLevel(before[0])


def test_lines_go_to_standard_output_where_logging_says_nothing(
    untouched_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    for _ in range(2):  # two applications in one process
        write = access.make(Config(ACCESS_LOG="common"))
    assert write is not None
    write(Answer(Unread("::1", "GET", "/", "HTTP/1.1"), 200, 5))
    assert COMBINED.fullmatch(out.getvalue().rstrip("\n"))


@pytest.mark.parametrize("name", ["tornjango", "tornjango.access"])
def test_lines_go_where_logging_says(name: str, untouched_logger: logging.Logger) -> None:
    untouched_logger.disabled = False
    with logged(logging.getLogger(name)) as log:
        write = access.make(Config(ACCESS_LOG="common"))
        assert write is not None
        write(Answer(Unread("::1", "GET", "/", "HTTP/1.1"), 200, 5))
    assert len(log.lines) == 1


def test_a_level_in_logging_is_kept(untouched_logger: logging.Logger) -> None:
    untouched_logger.disabled = False
    with logged(untouched_logger) as log:
        untouched_logger.setLevel(logging.WARNING)
        write = access.make(Config(ACCESS_LOG="json"))
        assert write is not None
        write(Answer(Unread("::1", "GET", "/", "HTTP/1.1"), 200, 5))
    assert log.lines == []
