"""The deferred response's states, without socket or loop."""

from __future__ import annotations

from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any

import pytest
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase

from tornjango.exceptions import ResponseStateError
from tornjango.responses import TRANSITIONS, DeferredResponse, Event, State


class RecordingDriver:
    def __init__(self) -> None:
        self.delivered: list[HttpResponseBase] = []
        self.failures: list[BaseException] = []
        self.work: list[Coroutine[Any, Any, HttpResponseBase]] = []

    def deliver(self, response: HttpResponseBase) -> None:
        self.delivered.append(response)

    def fail(self, exc: BaseException) -> None:
        self.failures.append(exc)

    def start(self, work: Coroutine[Any, Any, HttpResponseBase]) -> None:
        self.work.append(work)

    async def render(self, template: Any, context: Any, using: Any) -> str:
        return f"{template} with {context}"

    async def open_file(self, path: Any, **options: Any) -> HttpResponseBase:
        return HttpResponse(f"{path} {options}", content_type="text/x-file")

    def run_work(self) -> HttpResponseBase:
        with pytest.raises(StopIteration) as stopped:
            self.work.pop().send(None)
        result: HttpResponseBase = stopped.value.value
        return result


@pytest.fixture
def driver() -> RecordingDriver:
    return RecordingDriver()


@pytest.fixture
def response(driver: RecordingDriver) -> DeferredResponse:
    return DeferredResponse(HttpRequest(), driver, view_name="blog.views.entry")


def content(response: HttpResponseBase) -> bytes:
    assert isinstance(response, HttpResponse)
    return response.content


def test_finish_delivers_what_was_written(
    response: DeferredResponse, driver: RecordingDriver
) -> None:
    response.write("one ")
    response.write(b"two ")
    response.finish("three")
    assert [content(r) for r in driver.delivered] == [b"one two three"]
    assert response.ended


def test_status_headers_and_cookies_are_those_of_an_http_response(
    response: DeferredResponse, driver: RecordingDriver
) -> None:
    response.status_code = 418
    response.reason_phrase = "Tea"
    response["X-A"] = "1"
    response.headers["X-B"] = "2"
    response["X-C"] = "3"
    del response["X-C"]
    response.set_cookie("a", "1", max_age=5)
    response.set_signed_cookie("s", "1", salt="x")
    response.delete_cookie("b")
    response.finish()
    sent = driver.delivered[0]
    assert (sent.status_code, sent.reason_phrase) == (418, "Tea")
    assert (sent["X-A"], sent["X-B"]) == ("1", "2")
    assert "X-A" in response
    assert response["X-A"] == "1"
    assert "X-C" not in sent
    assert set(sent.cookies) == {"a", "s", "b"} == set(response.cookies)


@pytest.mark.parametrize("status", [200, 201])
def test_json_keeps_what_was_set_before(
    response: DeferredResponse, driver: RecordingDriver, status: int
) -> None:
    response.status_code = status
    response["X-A"] = "1"
    response.set_cookie("a", "1")
    response.json([1, None])
    sent = driver.delivered[0]
    assert (content(sent), sent.status_code, sent["X-A"]) == (b"[1, null]", status, "1")
    assert sent["Content-Type"] == "application/json"
    assert "a" in sent.cookies


def test_json_keeps_a_content_type_of_its_own(
    response: DeferredResponse, driver: RecordingDriver
) -> None:
    response["Content-Type"] = "application/geo+json"
    response.json({})
    assert driver.delivered[0]["Content-Type"] == "application/geo+json"


@pytest.mark.parametrize(("permanent", "status"), [(False, 302), (True, 301)])
def test_redirect(
    response: DeferredResponse, driver: RecordingDriver, permanent: bool, status: int
) -> None:
    response.redirect("/there/", permanent=permanent)
    assert (driver.delivered[0].status_code, driver.delivered[0]["Location"]) == (status, "/there/")


def test_render_is_the_drivers_work(response: DeferredResponse, driver: RecordingDriver) -> None:
    response.write("before ")
    response.render("a.html", {"b": 1})
    assert response.state is State.PREPARING
    assert not driver.delivered
    response.complete(driver.run_work())
    assert content(driver.delivered[0]) == b"before a.html with {'b': 1}"


def test_send_file_is_the_drivers_work(response: DeferredResponse, driver: RecordingDriver) -> None:
    response["X-A"] = "1"
    response.send_file("/a", as_attachment=True, content_type="text/x")
    sent = driver.run_work()
    assert b"'as_attachment': True" in content(sent)
    assert b"'content_type': 'text/x'" in content(sent)
    assert (sent["X-A"], sent["Content-Type"]) == ("1", "text/x-file")


ENDINGS = {
    "finish": lambda r: r.finish(),
    "json": lambda r: r.json({}),
    "redirect": lambda r: r.redirect("/"),
    "render": lambda r: r.render("a.html"),
    "send_file": lambda r: r.send_file("/a"),
}


@pytest.mark.parametrize("first", ENDINGS)
@pytest.mark.parametrize("second", [*ENDINGS, "write"])
def test_ending_twice_raises_and_names_the_view(
    response: DeferredResponse, driver: RecordingDriver, first: str, second: str
) -> None:
    ENDINGS[first](response)
    again = {**ENDINGS, "write": lambda r: r.write("more")}[second]
    with pytest.raises(ResponseStateError, match=r"blog\.views\.entry tried to .* already"):
        again(response)
    assert len(driver.delivered) + len(driver.work) == 1
    for work in driver.work:
        work.close()


def test_fail_reaches_the_driver(response: DeferredResponse, driver: RecordingDriver) -> None:
    error = ValueError()
    response.fail(error)
    assert driver.failures == [error]
    assert response.state is State.FAILED


def test_failing_after_the_end_is_logged_with_the_views_name(
    response: DeferredResponse, driver: RecordingDriver, error_log: list[Any]
) -> None:
    response.finish()
    response.fail(ValueError("late"))
    assert not driver.failures
    record = error_log.pop()
    assert "blog.views.entry failed after its response was finished" in record.getMessage()
    assert "late" in str(record.exc_info[1])


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_client_that_left_is_not_answered(
    response: DeferredResponse, driver: RecordingDriver, ending: str
) -> None:
    response.close()
    response.write("nobody reads this")
    ENDINGS[ending](response)
    assert not driver.delivered
    assert not driver.work


def test_on_close_is_called_once_and_in_the_responses_context(driver: RecordingDriver) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="outside")
    response = DeferredResponse(HttpRequest(), driver, view_name="v")
    response.context.run(variable.set, "inside")
    called: list[str] = []
    response.on_close(lambda: called.append(variable.get()))
    response.close()
    response.close()
    assert called == ["inside"]
    response.on_close(lambda: called.append("late"))
    assert called == ["inside", "late"]


def test_on_close_is_not_called_after_an_ordinary_end(response: DeferredResponse) -> None:
    response.on_close(lambda: pytest.fail("called"))
    response.finish()
    response.close()


def test_one_failing_on_close_does_not_keep_the_others_from_being_called(
    response: DeferredResponse, error_log: list[Any]
) -> None:
    called: list[int] = []
    response.on_close(lambda: 1 // 0)
    response.on_close(lambda: called.append(1))
    response.close()
    assert called == [1]
    assert "blog.views.entry" in error_log.pop().getMessage()


class Task:
    """As much of a task as a response knows."""

    cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def add_done_callback(self, callback: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("end", "cancelled"),
    [
        (lambda r: r.close(), True),
        (lambda r: r.fail(ValueError()), True),
        (lambda r: r.expire(HttpResponse()), True),
        (lambda r: r.finish(), False),
    ],
    ids=["left", "failed", "expired", "finished"],
)
def test_what_is_under_way_is_cancelled_unless_the_end_is_an_ordinary_one(
    response: DeferredResponse, end: Any, cancelled: bool
) -> None:
    before: Any = Task()
    after: Any = Task()
    response.track(before)
    end(response)
    response.track(after)
    assert (before.cancelled, after.cancelled) == (cancelled, cancelled)


def test_expiring_gives_the_answer_once(
    response: DeferredResponse, driver: RecordingDriver
) -> None:
    late = HttpResponse(status=504)
    response.expire(late)
    response.expire(HttpResponse())
    assert driver.delivered == [late]
    with pytest.raises(ResponseStateError, match="timed out"):
        response.finish()


def test_every_state_is_in_the_table_and_its_name_in_the_repr(response: DeferredResponse) -> None:
    assert set(TRANSITIONS) == set(State)
    assert TRANSITIONS[State.CLOSED] == dict.fromkeys(Event, State.CLOSED)
    assert repr(response) == "<DeferredResponse of blog.views.entry: open>"
