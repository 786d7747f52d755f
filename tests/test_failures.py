from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from django import VERSION
from django.core import mail
from django.core.mail.backends.locmem import EmailBackend
from django.core.signals import got_request_exception
from django.http import HttpRequest, HttpResponse

from tests import failing_views, http_views, views
from tests.app.models import Author
from tests.failing_views import STATUS
from tests.serving import Site, reached, serving
from tests.test_asyncdjango import warm_up
from tests.test_no_threads import MIDDLEWARE
from tests.threads import started_threads, worker_calls

LOOP = threading.main_thread().name
HERE = "tests.failing_views"


@asynccontextmanager
async def failing(**settings: Any) -> AsyncIterator[Site]:
    options = {"ROOT_URLCONF": HERE, "MIDDLEWARE": MIDDLEWARE, **settings}
    async with serving(**options) as site:
        await warm_up()
        yield site


@asynccontextmanager
async def busy(site: Site) -> AsyncIterator[None]:
    """All worker threads are, and the queue is full."""
    pool = site.application.workers.pool
    go = http_views.thread_gates["go"]
    calls = [pool.submit(go.wait, 10) for _ in range(pool._bound)]
    yield
    go.set()
    for call in calls:
        assert call.result()


BUSY = {"THREADS": 1, "THREADS_QUEUE": 1}


@contextmanager
def exceptions_seen() -> Iterator[list[Any]]:
    """Where somebody else's receiver hears of an exception, and which one it is."""
    found: list[Any] = []

    def receiver(**kwargs: Any) -> None:
        found.append((threading.current_thread().name, str(sys.exc_info()[1])))

    got_request_exception.connect(receiver)
    try:
        yield found
    finally:
        got_request_exception.disconnect(receiver)


def expected(kind: str, log: list[logging.LogRecord]) -> None:
    if kind in ("suspicious", "value", "busy"):
        assert len(log) == 1
        log.clear()


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("view", ["async", "deferred", "green"])
@pytest.mark.gen_test
async def test_an_error_page_takes_no_thread(
    database: None, view: str, debug: bool, error_log: list[Any]
) -> None:
    await Author.objects.acreate(name="Ann")
    async with failing(DEBUG=debug) as site, await site.connect() as client:
        for kind, status in STATUS.items():
            with started_threads() as started, worker_calls() as calls:
                answer = await client.request(f"/{view}/{kind}/")
            assert (answer.status, started, calls) == (status, [], [])
            if debug and kind != "busy" and status in (404, 500):
                assert f"in the view: {kind}".encode() in answer.body
                shown = b"QuerySet [&lt;Author: Author object (1)" in answer.body
                assert shown == (view == "async" and kind == "value")
            expected(kind, error_log)
        with worker_calls() as calls:
            assert (await client.request("/no/such/path/")).status == 404
        assert calls == []


@pytest.mark.gen_test
async def test_an_error_is_logged_with_its_traceback_where_there_is_no_page_for_it(
    error_log: list[Any],
) -> None:
    async with serving(ROOT_URLCONF="tests.urls") as site:
        assert (await site.request("/fails-in-view/")).status == 500
    tb = error_log.pop().exc_info[2]
    assert "fails_in_view" in [frame.name for frame in traceback.extract_tb(tb)]


@pytest.mark.gen_test
async def test_a_template_response_of_an_async_view_takes_no_thread(
    database: None, error_log: list[Any]
) -> None:
    await Author.objects.acreate(name="Ann")
    async with failing() as site:
        with worker_calls() as calls:
            assert b"Ann" in (await site.request("/template/")).body
            assert (await site.request("/bad-template/")).status == 500
        assert calls == []
        assert "bad-template" in error_log.pop().getMessage()


@pytest.mark.gen_test
async def test_a_forged_form_takes_no_thread() -> None:
    async with failing() as site:
        with worker_calls() as calls:
            answer = await site.request("/template/", method="POST", body=b"a=1")
        assert (answer.status, calls) == (403, [])


def own_failure_view(request: HttpRequest, reason: str = "") -> HttpResponse:
    failing_views.note("forged")
    return HttpResponse("the project's 403", status=403)


@pytest.mark.gen_test
async def test_the_projects_page_for_a_forged_form_has_a_thread() -> None:
    name = f"{__name__}.own_failure_view"
    async with failing(CSRF_FAILURE_VIEW=name, TORNJANGO=BUSY) as site:
        answer = await site.request("/template/", method="POST", body=b"a=1")
        assert answer.body == b"the project's 403"
        assert views.seen[0][1].startswith("tornjango-worker")
        async with busy(site):
            answer = await site.request("/template/", method="POST", body=b"a=1")
            assert (answer.status, b"CSRF" in answer.body) == (403, True)


# With the worker threads busy


@pytest.mark.parametrize("view", ["async", "deferred", "green"])
@pytest.mark.gen_test
async def test_an_error_is_what_it_is_when_no_thread_is_free(
    view: str, error_log: list[Any]
) -> None:
    async with failing(TORNJANGO=BUSY) as site, busy(site):
        for kind, status in STATUS.items():
            assert (await site.request(f"/{view}/{kind}/")).status == status
            expected(kind, error_log)
        assert (await site.request("/no/such/path/")).status == 404


# What is the project's


@pytest.mark.gen_test
async def test_error_pages_of_the_project_run_in_a_thread_with_its_context_and_exception(
    error_log: list[Any],
) -> None:
    async with failing(ROOT_URLCONF=failing_views.OwnHandlers) as site:
        assert (await site.request("/async/not-found/")).body.startswith(b"user")
        assert (await site.request("/async/value/")).body == b"the project's 500"
        (first, thread, language), (second, _, _) = views.seen
        assert (first, second) == ("Http404", "ValueError: in the view: value")
        assert thread.startswith("tornjango-worker")
        assert language == "de"
        error_log.pop()


@pytest.mark.gen_test
async def test_error_pages_of_the_project_may_run_on_the_loop(error_log: list[Any]) -> None:
    async with failing(ROOT_URLCONF=failing_views.GreenHandlers) as site:
        with worker_calls() as calls:
            assert (await site.request("/async/not-found/")).status == 404
            assert (await site.request("/async/value/")).body == b"the project's 500"
        assert calls == []
        assert [thread for _, thread, _ in views.seen] == [LOOP, LOOP]
        assert views.seen[1][0] == "ValueError: in the view: value"
        error_log.pop()


@pytest.mark.gen_test
async def test_djangos_page_is_the_answer_when_the_projects_has_no_thread(
    error_log: list[Any],
) -> None:
    async with failing(ROOT_URLCONF=failing_views.OwnHandlers, TORNJANGO=BUSY) as site:
        async with busy(site):
            assert (await site.request("/async/not-found/")).status == 404
            answer = await site.request("/async/value/")
            assert (answer.status, answer.body != b"the project's 500") == (500, True)
        assert views.seen == []
        error_log.pop()


@pytest.mark.gen_test
async def test_receivers_of_others_hear_of_an_exception_once_and_in_a_thread(
    error_log: list[Any],
) -> None:
    async with failing(TORNJANGO=BUSY) as site:
        with exceptions_seen() as found:
            assert (await site.request("/async/value/")).status == 500
            (thread, text) = found.pop()
            assert (thread.startswith("tornjango-worker"), text) == (True, "in the view: value")
            async with busy(site):
                await site.request("/async/value/")
            assert found == [(LOOP, "in the view: value")]
    error_log.clear()


# Mail to ADMINS


class SlowMail(EmailBackend):
    def send_messages(self, messages: Any) -> int:
        views.seen.append(threading.current_thread().name)
        http_views.thread_gates["parked"].set()
        http_views.thread_gates["go"].wait(10)
        return super().send_messages(messages)


SLOW = f"{__name__}.SlowMail"
MAIL: dict[str, Any] = {
    "ADMINS": ["ann@example.org"] if VERSION >= (6,) else [("Ann", "ann@example.org")],
    **(
        {"MAILERS": {"default": {"BACKEND": SLOW}}}
        if hasattr(mail, "mailers")
        else {"EMAIL_BACKEND": SLOW}
    ),
}


@pytest.mark.gen_test
async def test_mail_to_admins_is_sent_by_a_thread_while_others_are_answered(
    error_log: list[Any],
) -> None:
    async with failing(**MAIL) as site, await site.connect() as client:
        mail.outbox = []
        await client.send(b"GET /async/value/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reached(http_views.thread_gates["parked"])
        assert (await site.request("/async/not-found/")).status == 404
        http_views.thread_gates["go"].set()
        assert (await client.response()).status == 500
        assert views.seen[0].startswith("tornjango-worker")
        (message,) = mail.outbox
        assert "in the view: value" in message.body
        assert "ERROR (EXTERNAL IP): Internal Server Error: /async/value/" in message.subject
    error_log.clear()


@pytest.mark.gen_test
async def test_an_error_that_cannot_be_mailed_is_still_answered_and_logged(
    error_log: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with failing(**MAIL, TORNJANGO=BUSY) as site:
        mail.outbox = []
        async with busy(site):
            assert (await site.request("/async/value/")).status == 500
        assert mail.outbox == []
        assert "An error was not mailed to ADMINS: All 1 worker threads are busy" in caplog.text
    assert error_log.pop().getMessage() == "Internal Server Error: /async/value/"
