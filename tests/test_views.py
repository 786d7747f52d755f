from __future__ import annotations

import asyncio
import functools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.syndication.views import Feed
from django.core.cache import cache
from django.core.signals import got_request_exception
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client, RequestFactory, override_settings
from django.views import View
from django.views.decorators.csrf import csrf_exempt
from tornado.httpclient import AsyncHTTPClient, HTTPRequest, HTTPResponse

import tornjango
from tests import views
from tests.app.models import Author, Blog, Entry
from tests.database import Watcher, until
from tests.postgres import Postgres
from tests.serving import serving
from tests.threads import worker_calls
from tornjango.green import runs_green
from tornjango.views import (
    Kind,
    adapt,
    deferred,
    green,
    kind_of,
    methods_of,
    threaded,
    view_name,
)


@pytest.fixture
def app(io_loop: Any) -> Iterator[tornjango.Application]:
    application = tornjango.Application()
    yield application
    io_loop.run_sync(application.close)


class Site:
    """Asks the application over a socket."""

    def __init__(self, client: AsyncHTTPClient, base_url: str) -> None:
        self.client, self.base_url = client, base_url

    async def __call__(self, path: str, **options: Any) -> HTTPResponse:
        options.setdefault("follow_redirects", False)
        request = HTTPRequest(self.base_url + path, **options)
        return await self.client.fetch(request, raise_error=False)


@pytest.fixture
def site(http_client: AsyncHTTPClient, base_url: str) -> Site:
    return Site(http_client, base_url)


@pytest.fixture(autouse=True)
def parked(io_loop: Any) -> None:
    """What parked views tell, and are told, on the loop of this test."""
    views.gates.update(parked=asyncio.Event(), go=asyncio.Event())
    views.Gone.event = asyncio.Event()
    views.seen.clear()


# Which kind a view is


def positional(request: HttpRequest, response: Any) -> None: ...
def keyword(request: HttpRequest, *, response: Any) -> None: ...
def third(request: HttpRequest, pk: int, response: Any) -> None: ...
async def waits(request: HttpRequest, response: Any) -> None: ...
def with_default(request: HttpRequest, response: Any = None) -> None: ...


class Callable:
    def __call__(self, request: HttpRequest, response: Any) -> None: ...


class Methods:
    def view(self, request: HttpRequest, response: Any) -> None: ...


def decorator(view: Any) -> Any:
    @functools.wraps(view)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return view(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize(
    ("view", "groups", "kind"),
    [
        (positional, (), Kind.DEFERRED),
        (with_default, (), Kind.DEFERRED),
        (waits, (), Kind.DEFERRED),
        (decorator(positional), (), Kind.DEFERRED),
        (functools.partial(positional), (), Kind.DEFERRED),
        (Callable(), (), Kind.DEFERRED),
        (Methods().view, (), Kind.DEFERRED),
        (views.marked, (), Kind.DEFERRED),
        (decorator(views.marked), (), Kind.DEFERRED),
        (positional, ("response",), Kind.SYNC),
        (waits, ("response",), Kind.ASYNC),
        (keyword, (), Kind.SYNC),
        (third, (), Kind.SYNC),
        (views.asynchronous, (), Kind.ASYNC),
        (views.sync, (), Kind.SYNC),
        (Feed(), (), Kind.SYNC),
        (View.as_view(), (), Kind.SYNC),
        (print, (), Kind.SYNC),
    ],
)
def test_kind_is_told_from_the_signature(view: Any, groups: Any, kind: Kind) -> None:
    assert kind_of(view, groups) is kind


def test_each_method_of_a_class_has_its_own_kind() -> None:
    kinds = {name: kind_of(fn) for name, fn in methods_of(views.Mixed.as_view()).items()}
    assert kinds == {"GET": Kind.DEFERRED, "POST": Kind.SYNC}


@pytest.mark.parametrize(
    ("view", "name"),
    [
        (views.sync, "tests.views.sync"),
        (views.marked, "tests.views.marked"),
        (views.Mixed.as_view(), "tests.views.Mixed"),
        (functools.partial(views.sync), "tests.views.sync"),
        (Callable(), "tests.test_views.Callable"),
    ],
)
def test_a_view_is_named_by_where_it_is_defined(view: Any, name: str) -> None:
    assert view_name(view) == name


def test_what_decorators_set_on_a_view_is_kept() -> None:
    assert deferred(csrf_exempt(positional)).csrf_exempt  # type: ignore[attr-defined]
    assert adapt(csrf_exempt(positional)).__wrapped__.csrf_exempt  # type: ignore[attr-defined]


# How each kind is called, over a socket


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("method", "path", "kind", "on_loop"),
    [
        ("GET", "/sync/", "sync", False),
        ("GET", "/async/6ba7b810-9dad-11d1-80b4-00c04fd430c8/", "async", True),
        ("GET", "/deferred/7/", "deferred", True),
        ("GET", "/marked/", "deferred", True),
        ("GET", "/async-deferred/", "deferred", True),
        ("GET", "/group/x/", "sync", False),
        ("GET", "/mixed/7/", "deferred", True),
        ("POST", "/mixed/7/", "sync", False),
        ("GET", "/marked-methods/", "deferred", True),
        ("POST", "/marked-methods/", "async", True),
    ],
)
async def test_sync_views_run_in_worker_threads_and_others_on_the_loop(
    site: Site, method: str, path: str, kind: str, on_loop: bool
) -> None:
    answer = json.loads((await site(path, method=method, allow_nonstandard_methods=True)).body)
    assert answer["kind"] == kind
    assert answer["thread"].startswith("tornjango-worker") is not on_loop


@pytest.mark.gen_test
async def test_groups_and_extra_arguments_reach_the_view(site: Site) -> None:
    answer = json.loads((await site("/deferred/7/")).body)
    assert answer["kwargs"] == {"pk": 7, "extra": "yes"}
    assert json.loads((await site("/group/x/")).body)["response"] == "x"


@pytest.mark.gen_test
async def test_head_is_answered_by_a_deferred_get(site: Site) -> None:
    answer = await site("/mixed/7/", method="HEAD")
    assert (answer.code, answer.body) == (200, b"")
    assert int(answer.headers["Content-Length"]) > 0


@pytest.mark.gen_test
async def test_a_head_of_its_own_is_called_as_it_is_written(site: Site) -> None:
    answer = await site("/own-head/", method="HEAD")
    assert answer.headers["X-Head"].startswith("tornjango-worker")
    assert (await site("/own-head/")).body == b"got"


@pytest.mark.gen_test
async def test_a_method_that_a_class_lacks_is_405(site: Site) -> None:
    answer = await site("/mixed/7/", method="DELETE")
    assert answer.code == 405
    assert "GET" in answer.headers["Allow"]


@pytest.mark.gen_test
async def test_a_decorator_may_turn_a_request_away(site: Site) -> None:
    answer = await site("/turned-away/")
    assert (answer.code, answer.headers["Location"]) == (
        302,
        "/accounts/login/?next=/turned-away/",
    )


@pytest.mark.gen_test
async def test_a_deferred_response_takes_status_headers_and_cookies(site: Site) -> None:
    answer = await site("/dressed/")
    assert (answer.code, answer.body) == (201, b"one two three")
    assert answer.headers["X-Header"] == "yes"
    assert [c.split(";")[0] for c in answer.headers.get_list("Set-Cookie")] == ["a=1", 'b=""']


@pytest.mark.gen_test
async def test_redirect_reverses_a_view_name(site: Site) -> None:
    answer = await site("/redirected/")
    assert (answer.code, answer.headers["Location"]) == (302, "/sync/7/")
    assert answer.headers["Set-Cookie"].startswith("a=1")


@pytest.mark.gen_test
async def test_render_fetches_querysets_first(site: Site, database: None) -> None:
    blog = await Blog.objects.acreate(name="a")
    await Entry.objects.acreate(title="A title", blog=blog)
    answer = await site("/rendered/")
    assert (answer.code, answer.body.decode()) == (200, "1: A title;")


@pytest.mark.gen_test
async def test_send_file(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 300_000)
    answer = await site(f"/sent-file/?path={path}&attach")
    assert (answer.code, answer.body) == (200, path.read_bytes())
    assert answer.headers["Content-Type"] == "text/plain"
    assert answer.headers["Content-Disposition"] == 'attachment; filename="a.txt"'
    assert (answer.headers["Content-Length"], answer.headers["X-Header"]) == ("300000", "yes")


@pytest.mark.gen_test
@pytest.mark.parametrize("path", ["/nowhere/at/all", "/"])
async def test_a_file_that_is_not_there_is_404(site: Site, path: str) -> None:
    assert (await site(f"/sent-file/?path={path}")).code == 404


# What goes wrong


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/fails-in-view/", "in the view"),
        ("/fails-in-callback/", "in the callback"),
        ("/fails-by-hand/", "by hand"),
        ("/returns-nonsense/", "tests.views.returns_nonsense is a deferred view and returned str"),
        ("/finishes-twice/", "tests.views.finishes_twice tried to finish a response"),
    ],
)
async def test_an_exception_is_500_logged_and_signalled_once(
    site: Site, path: str, message: str, error_log: list[Any]
) -> None:
    signalled: list[Any] = []

    def receiver(sender: Any, request: HttpRequest, **kwargs: Any) -> None:
        signalled.append(request.path)

    got_request_exception.connect(receiver)
    try:
        answer = await site(path)
    finally:
        got_request_exception.disconnect(receiver)
    assert answer.code == 500
    assert signalled == [path]
    record = error_log.pop()
    assert message in str(record.exc_info[1])
    assert not error_log


@pytest.mark.gen_test
async def test_a_callbacks_exception_has_the_technical_page_in_debug(
    site: Site, error_log: list[Any]
) -> None:
    with override_settings(DEBUG=True):
        answer = await site("/fails-in-callback/")
    assert answer.code == 500
    assert b"ValueError" in answer.body
    assert b"tests/views.py" in answer.body
    error_log.clear()


@pytest.mark.gen_test
async def test_never_ending_is_504_and_the_log_names_the_view(
    site: Site, error_log: list[Any]
) -> None:
    assert (await site("/never-ends/")).code == 504
    assert "tests.views.never_ends did not end its response" in error_log.pop().getMessage()


@pytest.mark.gen_test
async def test_a_full_queue_is_503_with_retry_after_and_logged_once(
    site: Site, error_log: list[Any]
) -> None:
    answer = await site("/overloaded/")
    assert (answer.code, answer.headers["Retry-After"]) == (503, "3")
    message = error_log.pop().getMessage()
    assert message == "tests.views.overloaded is answered 503: the queue is full"


@pytest.mark.gen_test
@pytest.mark.parametrize("path", ["/parks/", "/parks-async/"])
async def test_a_client_that_leaves_cancels_its_view(
    http_server: Any, http_port: int, path: str
) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", http_port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    await views.gates["parked"].wait()
    writer.close()
    await asyncio.wait_for(views.Gone.event.wait(), 5)


@pytest.mark.gen_test
async def test_callbacks_run_in_the_requests_own_context(site: Site) -> None:
    assert (await site("/sets-language/")).body == b"de"
    assert (await site("/language/")).body == b"en-us"


# Sync views on the loop


LOOP = threading.main_thread().name


@pytest.fixture
def ann(database: None) -> None:
    Author.objects.create(name="Ann")


def loop_views(**options: Any) -> Any:
    return serving(ROOT_URLCONF="tests.loop_views", TORNJANGO=options)


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("path", "default", "all_green"),
    [
        ("/green-class/", True, True),
        ("/class/", False, True),
        ("/plain/", False, True),
        ("/opted-out/", False, False),
    ],
)
async def test_a_sync_view_runs_where_its_mark_or_the_setting_says(
    ann: None, path: str, default: bool, all_green: bool
) -> None:
    for options, on_loop in (({}, default), ({"SYNC_VIEWS": "green"}, all_green)):
        async with loop_views(**options) as site:
            thread, count = (await site.request(path)).body.decode().split()
            assert ((thread == LOOP), count) == (on_loop, "1")


@pytest.mark.gen_test
async def test_other_requests_are_answered_while_a_green_view_waits(
    database: None, postgres: Postgres, error_log: list[Any]
) -> None:
    watcher = Watcher(postgres.dsn("tornjango"))
    try:
        async with loop_views() as site:
            slow = [asyncio.create_task(site.request("/green-sleep/")) for _ in range(3)]
            await until(lambda: len(watcher.running("green sleep")) == 3)
            assert (await site.request("/plain/")).status == 200
            for pid in watcher.running("green sleep"):
                watcher.rows("select pg_cancel_backend(%s)", [pid])
            assert [answer.status for answer in await asyncio.gather(*slow)] == [500] * 3
    finally:
        watcher.close()
    error_log.clear()


@pytest.mark.gen_test
async def test_a_client_that_leaves_cancels_the_query_of_a_green_view(
    database: None, postgres: Postgres
) -> None:
    watcher = Watcher(postgres.dsn("tornjango"))
    try:
        async with loop_views() as site:
            client = await site.connect()
            await client.send(b"GET /green-sleep/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await until(lambda: watcher.running("green sleep"))
            client.abort()
            await until(lambda: not watcher.running("green sleep"))
    finally:
        watcher.close()


@pytest.mark.gen_test
@pytest.mark.parametrize("mode", ["green", "threads"])
async def test_a_template_response_is_rendered_as_its_view_runs(ann: None, mode: str) -> None:
    middleware = ["django.middleware.cache.CacheMiddleware"]
    cache.clear()
    with override_settings(MIDDLEWARE=middleware):
        async with loop_views(SYNC_VIEWS=mode) as site:
            await site.request("/plain/")
            with worker_calls() as calls:
                pages = [await site.request("/template-response/") for _ in range(2)]
            assert [page.body for page in pages] == [b"Ann: "] * 2
            assert (calls == []) == (mode == "green")
            # From the cache: what was rendered can be pickled.
            assert pages[0].header("Expires") == pages[1].header("Expires") is not None


def test_a_marked_view_is_another_than_the_one_it_is_made_of() -> None:
    marked = green(views.sync)
    assert runs_green(marked)
    assert not runs_green(views.sync)
    assert not runs_green(threaded(marked))
    assert runs_green(functools.partial(marked, pk=1))


def test_an_async_view_cannot_be_marked() -> None:
    with pytest.raises(TypeError, match=r"tests\.views\.asynchronous is async"):
        green(views.asynchronous)


# Elsewhere: the same views under Django's own handlers


@pytest.mark.parametrize("path", ["/marked/", "/marked-methods/"])
def test_a_marked_view_is_an_ordinary_async_view_to_djangos_test_client(path: str) -> None:
    assert Client().get(path).json()["kind"] == "deferred"
    assert async_to_sync(AsyncClient().get)(path).json()["kind"] == "deferred"


def test_a_green_view_is_an_ordinary_sync_view_to_djangos_test_client(ann: None) -> None:
    with override_settings(ROOT_URLCONF="tests.loop_views"):
        assert Client().get("/green-class/").content.decode() == f"{LOOP} 1"


def test_a_marked_view_queries_on_the_tests_own_connection(database: None) -> None:
    from django.db import transaction

    from tornjango import db

    @deferred
    def view(request: HttpRequest, response: Any) -> None:
        db.execute_async(Entry.objects.all(), lambda rows: response.json([e.title for e in rows]))

    with transaction.atomic():
        Entry.objects.create(title="uncommitted", blog=Blog.objects.create())
        answer: HttpResponse = async_to_sync(view)(RequestFactory().get("/"))
        transaction.set_rollback(True)
    assert json.loads(answer.content) == ["uncommitted"]
