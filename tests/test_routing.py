from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import pytest
from django.conf.urls.i18n import i18n_patterns
from django.http import HttpRequest
from django.test import override_settings
from django.urls import (
    Resolver404,
    ResolverMatch,
    URLPattern,
    clear_url_caches,
    include,
    path,
    re_path,
    resolve,
    reverse,
)
from django.urls.resolvers import RoutePattern
from django.utils import translation
from django.utils.decorators import async_only_middleware
from django.utils.translation import gettext_lazy
from hypothesis import given
from hypothesis import strategies as st
from tornado.httpclient import AsyncHTTPClient

import tornjango
from tests import views
from tests.serving import serving
from tornjango.routing import Routes


class Urls:
    """A URLconf made by a test."""

    def __init__(self, *patterns: Any) -> None:
        self.urlpatterns = list(patterns)


@pytest.fixture
def urlconf() -> Iterator[Any]:
    with override_settings(ROOT_URLCONF="tests.urls"):

        def use(*patterns: Any) -> Routes:
            from django.conf import settings

            settings.ROOT_URLCONF = Urls(*patterns)
            clear_url_caches()
            return Routes()

        yield use
    clear_url_caches()


def test_routes_name_what_stands_before_them() -> None:
    table = {route.name: route for route in Routes() if route.name}
    year = table["journal:year"]
    assert year.pattern == r"blog/(?P<year>[0-9]{4})/(?:page-(?P<page>[0-9]+)/)?$"
    assert year.groups == {"year", "page"}
    assert table["admin:index"].pattern == "admin/"


def test_extra_arguments_are_inherited(urlconf: Any) -> None:
    inner = [path("in/", views.sync, {"b": 2})]
    (route,) = urlconf(path("out/<int:pk>/", include(inner), {"a": 1}))
    assert route.default_args == {"a": 1, "b": 2}
    assert route.groups == {"pk"}


def test_a_route_without_a_name_has_none(urlconf: Any) -> None:
    inner = ([path("in/", views.sync)], "app")
    (route,) = urlconf(path("out/", include(inner, namespace="space")))
    assert route.name == ""


PATHS = [
    "/",
    "/sync/",
    "/sync/7/",
    "/sync/x/",
    "/blog/2009/",
    "/blog/2009/page-2/",
    "/blog/é/",
    "/x",
]


@pytest.mark.parametrize("path_info", PATHS)
def test_a_match_is_what_djangos_resolver_finds(path_info: str) -> None:
    try:
        expected = resolve(path_info)
    except Resolver404:
        assert Routes().match(path_info) is None
        return
    found = Routes().match(path_info)
    assert found is not None
    for name in ("func", "args", "kwargs", "route", "namespaces", "url_name"):
        assert getattr(found, name) == getattr(expected, name)


@given(st.text())
def test_any_path_is_answered(path_info: str) -> None:
    assert Routes().match(f"/sync/{path_info}\n") is None


def test_only_patterns_with_languages_make_routes_depend_on_them(urlconf: Any) -> None:
    assert not urlconf(path("a/", views.sync)).vary
    assert urlconf(*i18n_patterns(path("a/", views.sync))).vary
    assert urlconf(path("a/", include([path(gettext_lazy("b/"), views.sync)]))).vary


def test_a_language_in_the_path_is_used_and_left_as_it_was(urlconf: Any) -> None:
    routes = urlconf(*i18n_patterns(path("a/", views.sync), prefix_default_language=False))
    assert routes.match("/de/a/") is not None
    assert routes.match("/a/") is not None
    assert translation.get_language() == "en-us"


# Over a socket


@pytest.fixture
def app(io_loop: Any) -> Iterator[tornjango.Application]:
    with override_settings(
        ROOT_URLCONF="tests.language_urls",
        USE_I18N=True,
        MIDDLEWARE=[
            "django.middleware.locale.LocaleMiddleware",
            "django.middleware.common.CommonMiddleware",
        ],
    ):
        clear_url_caches()
        application = tornjango.Application()
        yield application
        io_loop.run_sync(application.close)
    clear_url_caches()


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("path_info", "language", "status", "content"),
    [
        ("/de/where/", "en", 200, b"de"),
        ("/fr/where/", "en", 200, b"fr"),
        ("/where/", "de", 302, b""),
        ("/fixed/", "de", 200, b"de"),
        ("/xx/where/", "en", 404, b"our 404"),
        ("/fixed", "en", 301, b""),
    ],
)
async def test_i18n_patterns_and_handlers_of_errors(
    http_client: AsyncHTTPClient,
    base_url: str,
    path_info: str,
    language: str,
    status: int,
    content: bytes,
) -> None:
    answer = await http_client.fetch(
        base_url + path_info,
        headers={"Accept-Language": language},
        follow_redirects=False,
        raise_error=False,
    )
    assert (answer.code, answer.body) == (status, content)


MANY = 1000


class Numbered:
    """The URLconf of many patterns."""

    urlpatterns = [
        *(path(f"a{number}/<int:pk>/", views.asynchronous) for number in range(MANY)),
        path("bare", views.asynchronous),
    ]


class Elsewhere:
    urlpatterns = [path("elsewhere/", views.asynchronous)]


#: What the middleware below sets for a request.
chosen: ContextVar[bool] = ContextVar("chosen", default=False)


class Choosy(URLPattern):
    """A pattern of the project's own, which looks at more than the path."""

    def resolve(self, path: str) -> ResolverMatch | None:
        return super().resolve(path) if chosen.get() else None


class Chosen:
    urlpatterns = [
        Choosy(path("which/", views.sync).pattern, views.marked),
        path("which/", views.sync),
    ]


@async_only_middleware
def elsewhere(get_response: Any) -> Any:
    async def middleware(request: HttpRequest) -> Any:
        if "elsewhere" in request.GET:
            request.urlconf = Elsewhere  # type: ignore[attr-defined]
        chosen.set("chosen" in request.GET)
        return await get_response(request)

    return middleware


MIDDLEWARE = ["tests.test_routing.elsewhere", "django.middleware.common.CommonMiddleware"]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The patterns that were asked whether they match."""
    asked: list[str] = []
    match = RoutePattern.match

    def noting(pattern: RoutePattern, path: str) -> Any:
        asked.append(str(pattern))
        return match(pattern, path)

    monkeypatch.setattr(RoutePattern, "match", noting)
    return asked


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("target", "status", "location"),
    [
        (f"/a{MANY - 1}/7/", 200, None),
        (f"/a{MANY - 1}/7", 301, f"/a{MANY - 1}/7/"),
        ("/bare", 200, None),
        ("/bare/", 404, None),
        (f"/a{MANY}/7/", 404, None),
        (f"/a{MANY}/7", 404, None),
        ("/a1/x", 404, None),
    ],
)
async def test_slashes_are_appended_and_nothing_is_found_without_asking_all_patterns(
    target: str, status: int, location: str | None, tried: list[str]
) -> None:
    async with serving(ROOT_URLCONF=Numbered, MIDDLEWARE=MIDDLEWARE) as site:
        tried.clear()
        answer = await site.request(target)
        assert (answer.status, answer.header("Location")) == (status, location)
        assert len(tried) <= 4


@pytest.mark.gen_test
async def test_the_page_for_nothing_found_lists_all_patterns_in_development() -> None:
    async with serving(ROOT_URLCONF=Numbered, DEBUG=True) as site:
        answer = await site.request("/nothing/")
        assert answer.status == 404
        assert answer.body.count(b"&lt;int:pk&gt;") == MANY


@pytest.mark.gen_test
async def test_a_urlconf_of_a_request_is_its_own(tried: list[str]) -> None:
    async with serving(ROOT_URLCONF=Numbered, MIDDLEWARE=MIDDLEWARE) as site:
        assert (await site.request("/elsewhere/")).status == 404
        assert (await site.request("/elsewhere/?elsewhere")).status == 200
        assert (await site.request("/elsewhere?elsewhere")).status == 301
        assert (await site.request("/bare?elsewhere")).status == 404
        assert (await site.request("/bare")).status == 200


@pytest.mark.gen_test
async def test_a_urlconf_that_is_exchanged_is_used_at_once() -> None:
    async with serving(ROOT_URLCONF=Numbered) as site:
        assert (await site.request("/bare")).status == 200
        with override_settings(ROOT_URLCONF=Elsewhere):
            assert (await site.request("/bare")).status == 404
            assert (await site.request("/elsewhere/")).status == 200
        assert (await site.request("/bare")).status == 200


@pytest.mark.gen_test
async def test_patterns_of_the_projects_own_are_asked_after_middleware() -> None:
    async with serving(ROOT_URLCONF=Chosen, MIDDLEWARE=MIDDLEWARE) as site:
        assert b'"sync"' in (await site.request("/which/")).body
        assert b'"deferred"' in (await site.request("/which/?chosen")).body


def test_re_path_and_reverse_agree() -> None:
    match = Routes().match(reverse("journal:year", kwargs={"year": "2009", "page": "2"}))
    assert match is not None
    assert match.kwargs == {"year": "2009", "page": "2"}
    assert re_path("", views.sync)
