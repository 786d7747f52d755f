from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.conf.urls.i18n import i18n_patterns
from django.test import override_settings
from django.urls import Resolver404, clear_url_caches, include, path, re_path, resolve, reverse
from django.utils import translation
from django.utils.translation import gettext_lazy
from hypothesis import given
from hypothesis import strategies as st
from tornado.httpclient import AsyncHTTPClient

import tornjango
from tests import views
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


def test_re_path_and_reverse_agree() -> None:
    match = Routes().match(reverse("journal:year", kwargs={"year": "2009", "page": "2"}))
    assert match is not None
    assert match.kwargs == {"year": "2009", "page": "2"}
    assert re_path("", views.sync)
