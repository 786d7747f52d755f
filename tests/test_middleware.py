from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from asgiref.sync import iscoroutinefunction
from django.conf import settings
from django.contrib.auth.middleware import RemoteUserMiddleware
from django.contrib.auth.models import User
from django.core.exceptions import PermissionDenied
from django.core.handlers.base import BaseHandler
from django.http import Http404, HttpRequest, HttpResponse
from django.middleware.common import CommonMiddleware
from django.template.response import SimpleTemplateResponse
from django.test import AsyncClient, RequestFactory, override_settings
from django.urls import path
from django.utils.decorators import async_only_middleware, sync_and_async_middleware
from django.utils.deprecation import MiddlewareMixin
from tornado.httpclient import AsyncHTTPClient, HTTPRequest, HTTPResponse

import tornjango
from tests.serving import until
from tests.threads import worker_calls
from tornjango import middleware as chains

DJANGOS = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.locale.LocaleMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django.middleware.http.ConditionalGetMiddleware",
]

calls: list[tuple[str, str]] = []


def note(what: str) -> None:
    calls.append((what, threading.current_thread().name))


class Mixed(MiddlewareMixin):
    """As most third-party middleware is written."""

    def process_request(self, request: HttpRequest) -> None:
        note("mixed request")

    def process_view(self, request: HttpRequest, view: Any, args: Any, kwargs: Any) -> None:
        note(f"mixed view {view.__name__}")

    def process_exception(self, request: HttpRequest, exc: Exception) -> HttpResponse:
        note("mixed exception")
        return HttpResponse(f"mended: {exc}")

    def process_response(self, request: HttpRequest, response: HttpResponse) -> HttpResponse:
        note("mixed response")
        return response


def sync_only(get_response: Any) -> Callable[[HttpRequest], HttpResponse]:
    def middleware(request: HttpRequest) -> HttpResponse:
        note("sync before")
        response: HttpResponse = get_response(request)
        note("sync after")
        return response

    return middleware


@sync_and_async_middleware
def both(get_response: Any) -> Any:
    if not iscoroutinefunction(get_response):  # something inside of it is sync only
        return sync_only(get_response)

    async def middleware(request: HttpRequest) -> HttpResponse:
        note("both before")
        response: HttpResponse = await get_response(request)
        note("both after")
        return response

    return middleware


class Short(MiddlewareMixin):
    def process_request(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("short")


def here(name: str) -> str:
    return f"{__name__}.{name}"


@pytest.fixture
def middleware(request: pytest.FixtureRequest) -> Iterator[None]:
    with override_settings(MIDDLEWARE=request.param):
        yield


@pytest.fixture
def app(middleware: None, io_loop: Any) -> Iterator[tornjango.Application]:
    calls.clear()
    application = tornjango.Application()
    yield application
    io_loop.run_sync(application.close)


@pytest.fixture
def fetch(app: tornjango.Application, http_client: AsyncHTTPClient, base_url: str) -> Any:
    async def fetch(path: str, **options: Any) -> HTTPResponse:
        request = HTTPRequest(base_url + path, follow_redirects=False, **options)
        return await http_client.fetch(request, raise_error=False)

    return fetch


def with_middleware(*names: str) -> Any:
    return pytest.mark.parametrize("middleware", [list(names)], indirect=True, ids=["chain"])


@pytest.mark.gen_test
@with_middleware(*DJANGOS)
async def test_djangos_own_middleware_costs_no_thread(
    fetch: Any, app: tornjango.Application
) -> None:
    answer = await fetch("/marked/", headers={"Cookie": "sessionid=x; csrftoken=" + "a" * 32})
    assert answer.code == 200
    assert (await fetch("/language/", headers={"Accept-Language": "de"})).body == b"de"
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert "ETag" in answer.headers
    assert not app.workers.pool._threads


@pytest.mark.gen_test
@with_middleware(*DJANGOS)
@pytest.mark.parametrize("engine", ["db", "cached_db", "cache", "file", "signed_cookies"])
async def test_a_session_is_saved(database: None, fetch: Any, engine: str) -> None:
    with override_settings(SESSION_ENGINE=f"django.contrib.sessions.backends.{engine}"):
        first = await fetch("/session/")
        cookie = first.headers["Set-Cookie"].split(";")[0]
        second = await fetch("/session/", headers={"Cookie": cookie})
    assert (first.body, second.body) == (b"1", b"2")


@pytest.mark.gen_test
@with_middleware(*DJANGOS)
async def test_conditional_get_is_answered_304(fetch: Any) -> None:
    etag = (await fetch("/status/200/")).headers["ETag"]
    answer = await fetch("/status/200/", headers={"If-None-Match": etag})
    assert (answer.code, answer.body) == (304, b"")


@pytest.mark.gen_test
@with_middleware(here("Mixed"), here("sync_only"), here("both"))
async def test_the_chain_runs_once_and_in_djangos_order(fetch: Any) -> None:
    assert (await fetch("/marked/")).code == 200
    assert [what for what, _ in calls] == [
        "mixed request",
        "sync before",
        "both before",
        "mixed view marked",
        "both after",
        "sync after",
        "mixed response",
    ]


@pytest.mark.gen_test
@with_middleware(here("both"), here("sync_only"), here("Mixed"))
async def test_third_party_sync_code_runs_in_one_worker_thread_and_async_code_on_the_loop(
    fetch: Any,
) -> None:
    with worker_calls() as handed:
        await fetch("/marked/")
    on_loop = {what for what, thread in calls if thread == "MainThread"}
    assert on_loop == {"both before", "both after"}
    assert len({thread for _, thread in calls}) == 2
    assert len(handed) == 1  # its own hooks are calls inside of the stretch


@pytest.mark.gen_test
@with_middleware(here("sync_only"))
async def test_sync_middleware_and_sync_view_share_a_thread(fetch: Any) -> None:
    answer = await fetch("/sync/")
    assert {thread for _, thread in calls} == {answer.body.decode().split('"')[7]}


@pytest.mark.gen_test
@with_middleware(here("Mixed"))
@pytest.mark.parametrize("path", ["/fails-in-view/", "/fails-in-callback/"])
async def test_process_exception_sees_what_a_view_or_its_callback_raised(
    fetch: Any, path: str
) -> None:
    answer = await fetch(path)
    assert answer.code == 200
    assert answer.body.startswith(b"mended: in the ")


@pytest.mark.gen_test
@with_middleware(here("Short"))
async def test_middleware_may_answer_before_routing(fetch: Any) -> None:
    assert (await fetch("/no/such/path/")).body == b"short"


class OtherUrlconf(MiddlewareMixin):
    def process_request(self, request: HttpRequest) -> None:
        request.urlconf = "tests.other_urls"  # type: ignore[attr-defined]


class OtherPath(MiddlewareMixin):
    def process_request(self, request: HttpRequest) -> None:
        request.path_info = "/marked/"


@pytest.mark.gen_test
@pytest.mark.parametrize(
    "middleware", [[here("OtherUrlconf")], [here("OtherPath")]], indirect=True, ids=str
)
async def test_middleware_may_change_what_a_path_means(fetch: Any) -> None:
    assert b"deferred" in (await fetch("/sync/")).body


@pytest.mark.gen_test
@with_middleware(*DJANGOS)
async def test_a_forged_form_is_403_and_a_good_one_passes(fetch: Any, error_log: Any) -> None:
    assert (await fetch("/protected-form/", method="POST", body="a=1")).code == 403
    token = "a" * 32
    headers = {"Cookie": f"csrftoken={token}"}
    body = f"a=1&csrfmiddlewaretoken={token}"
    answer = await fetch("/protected-form/", method="POST", body=body, headers=headers)
    assert answer.code == 200


@pytest.fixture
def parsing_threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads in which Django parses forms. The client has one of its own, for the name of its host."""
    names: list[str] = []
    parse = HttpRequest._load_post_and_files

    def noting(request: HttpRequest) -> None:
        names.append(threading.current_thread().name)
        parse(request)

    monkeypatch.setattr(HttpRequest, "_load_post_and_files", noting)
    return names


@pytest.mark.gen_test
@with_middleware(*DJANGOS)
@pytest.mark.parametrize(("length", "thread"), [(100, "MainThread"), (100_000, "asyncio_")])
async def test_a_long_form_is_parsed_in_a_worker_thread(
    fetch: Any, parsing_threads: list[str], length: int, thread: str
) -> None:
    token = "a" * 32
    body = f"csrfmiddlewaretoken={token}&a={'x' * length}"
    headers = {"Cookie": f"csrftoken={token}"}
    answer = await fetch("/protected-form/", method="POST", body=body, headers=headers)
    assert answer.code == 200
    # Here the loop's workers are its own, and not the application's.
    (name,) = parsing_threads
    assert name.startswith(thread)


@pytest.mark.gen_test
@with_middleware(*DJANGOS)
async def test_arender_shows_the_user_who_is_logged_in(fetch: Any, database: None) -> None:
    user = await User.objects.acreate(username="ann")
    client = AsyncClient()
    await client.aforce_login(user)
    cookie = f"{settings.SESSION_COOKIE_NAME}={client.cookies['sessionid'].value}"
    for page in ("/user/", "/user-async/"):
        assert (await fetch(page, headers={"Cookie": cookie})).body == b"user: ann"
        assert (await fetch(page)).body == b"user: "


class ByHeader(RemoteUserMiddleware):
    header = "HTTP_X_USER"


REMOTE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("middleware", "user"),
    [
        ([*REMOTE, "django.contrib.auth.middleware.RemoteUserMiddleware"], b"user: "),
        ([*REMOTE, here("ByHeader")], b"user: eve"),
    ],
    indirect=["middleware"],
    ids=["REMOTE_USER", "a header of the project's choice"],
)
async def test_the_remote_user_comes_from_meta_and_from_no_other_header(
    fetch: Any, database: None, user: bytes
) -> None:
    headers = {"Remote-User": "mallory", "Http-X-User": "mallory", "X-User": "eve"}
    backend = "django.contrib.auth.backends.RemoteUserBackend"
    with override_settings(AUTHENTICATION_BACKENDS=[backend]):
        assert (await fetch("/user/", headers=headers)).body == user


class Members(CommonMiddleware):
    """Of a project: what it does is not known."""

    def process_request(self, request: HttpRequest) -> None:
        note("members")


@pytest.mark.gen_test
@with_middleware(
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.auth.middleware.LoginRequiredMiddleware",
    here("Members"),
)
async def test_djangos_hooks_query_on_the_loop_and_a_subclass_of_theirs_in_a_thread(
    fetch: Any, database: None
) -> None:
    user = await User.objects.acreate(username="ann")
    client = AsyncClient()
    await client.aforce_login(user)
    cookie = f"{settings.SESSION_COOKIE_NAME}={client.cookies['sessionid'].value}"
    assert (await fetch("/marked/")).code == 302
    await fetch("/marked/", headers={"Cookie": cookie})
    calls.clear()
    with worker_calls() as handed:
        assert (await fetch("/marked/", headers={"Cookie": cookie})).code == 200
    assert [thread == "MainThread" for _, thread in calls] == [False]
    assert len(handed) == 1  # its own hook, and the one it inherits


# Django's own chain, and this one


#: What each hook does in a test, by its middleware and its name: it raises, or it answers; the others do nothing.
plan: dict[tuple[str, str], Exception | HttpResponse] = {}


def act(who: str, what: str) -> HttpResponse | None:
    note(f"{who} {what}")
    action = plan.get((who, what))
    if isinstance(action, Exception):
        raise action
    return action


class Layer(MiddlewareMixin):
    """As Django's own is written, and taken for Django's own: so it is not run in a worker thread together with the view."""

    def process_request(self, request: HttpRequest) -> HttpResponse | None:
        return act(type(self).__name__, "request")

    def process_view(self, request: HttpRequest, *view: Any) -> HttpResponse | None:
        return act(type(self).__name__, "view")

    def process_exception(self, request: HttpRequest, exc: Exception) -> HttpResponse | None:
        return act(type(self).__name__, "exception")

    def process_template_response(self, request: HttpRequest, response: Any) -> Any:
        return act(type(self).__name__, "template response") or response

    def process_response(self, request: HttpRequest, response: HttpResponse) -> HttpResponse:
        return act(type(self).__name__, "response") or response


First = type("First", (Layer,), {"__module__": "django.first"})
Second = type("Second", (Layer,), {"__module__": "django.second"})
Third = type("Third", (Layer,), {"__module__": "django.third"})


class Outwards(MiddlewareMixin):
    """Third-party code that needs no thread around the view."""

    def process_response(self, request: HttpRequest, response: HttpResponse) -> HttpResponse:
        return act("Outwards", "response") or response


class Rendered(SimpleTemplateResponse):
    def __init__(self) -> None:
        super().__init__("")

    @property
    def rendered_content(self) -> str:
        note("rendered")
        return "rendered"


async def acting(request: HttpRequest) -> HttpResponse:
    return act("View", "view") or HttpResponse("the view's")


WAYS = {"called": lambda *args: False, "green": lambda *args: True, "in a thread": None}
CHAIN = ["First", "both", "Second", "Third", "Outwards"]


def some_plan(chance: random.Random) -> dict[tuple[str, str], Any]:
    """Of all that may happen in a request to the chain, one to four things."""
    hooks = ["request", "view", "exception", "template response", "response"]
    places = [(who, what) for who in ("First", "Second", "Third") for what in hooks]
    places += [("View", "view")] * 8 + [("Outwards", "response")]
    found: dict[tuple[str, str], Any] = {}
    for who, what in chance.sample(places, chance.randint(1, 4)):
        actions = [ValueError("broken"), Http404("lost"), PermissionDenied(), HttpResponse(who)]
        found[who, what] = chance.choice([*actions, Rendered()] if what == "view" else actions)
    return found


async def outcome(chain: BaseHandler) -> tuple[list[str], int, bytes]:
    """What happens, in its order, and what is answered."""
    calls.clear()
    response: Any = await chain.get_response_async(RequestFactory().get("/acting/"))
    return [what for what, _ in calls], response.status_code, response.content


@pytest.mark.gen_test
@pytest.mark.parametrize("way", WAYS)
async def test_whatever_happens_between_layers_is_as_in_djangos_own_chain(
    way: str, monkeypatch: pytest.MonkeyPatch, error_log: list[Any]
) -> None:
    for hook in ("process_request", "process_response"):
        if (waits := WAYS[way]) is not None:
            monkeypatch.setitem(chains.WAITS, f"{__name__}.Layer.{hook}", waits)
    chance = random.Random(way)
    with override_settings(ROOT_URLCONF=__name__):
        for _ in range(40):
            names = chance.sample(CHAIN, chance.randint(1, len(CHAIN)))
            with override_settings(MIDDLEWARE=list(map(here, names))):
                djangos = BaseHandler()
                djangos.load_middleware(is_async=True)
                chain = chains.Chain({})
            seed = chance.random()
            outcomes = []
            for each in (djangos, chain):
                plan.clear()
                plan.update(some_plan(random.Random(seed)))
                outcomes.append(await outcome(each))
            assert outcomes[0] == outcomes[1], (names, plan)
    error_log.clear()


async def waiting(request: HttpRequest) -> HttpResponse:
    note("waiting")
    await asyncio.Event().wait()
    raise AssertionError


@async_only_middleware
def cancelled(get_response: Any) -> Any:
    async def middleware(request: HttpRequest) -> HttpResponse:
        try:
            return cast(HttpResponse, await get_response(request))
        except asyncio.CancelledError:
            note("cancelled")
            raise

    return middleware


@pytest.mark.gen_test
async def test_a_view_that_is_cancelled_is_so_for_middleware_and_nothing_is_answered() -> None:
    calls.clear()
    plan.clear()
    with override_settings(
        ROOT_URLCONF=__name__,
        MIDDLEWARE=list(map(here, ["First", "cancelled", "Second", "Third"])),
    ):
        chain = chains.Chain({})
        request = RequestFactory().get("/waiting/")
        task = asyncio.ensure_future(chain.get_response_async(request))
        await until(lambda: "waiting" in dict(calls))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert [what for what, _ in calls][-2:] == ["waiting", "cancelled"]


urlpatterns = [path("acting/", acting), path("waiting/", waiting)]
