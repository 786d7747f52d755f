from __future__ import annotations

import pytest
from django.conf.urls.i18n import i18n_patterns
from django.urls import include, path, re_path
from django.utils.functional import lazy

from tests import views
from tornjango.shapes import ANY, UNKNOWN, Shape, is_translated, shape_of

ROUTES = [
    ("", ("", True, True)),
    ("a/b", ("a/b", True, True)),
    ("a/<int:x>/", ("a/~/", True, True)),
    ("<slug:x>-<x2>/b", ("~-~/b", True, True)),
    ("a<path:x>/b", ("a", False, False)),
    ("<uuid:x>", ("~", True, True)),
    ("a>b<", ("a>b<", True, True)),
]
REGEXES = [
    (r"^a/$", ("a/", True, True)),
    (r"^a/", ("a/", True, False)),
    (r"\Aa/\Z", ("a/", True, False)),
    (r"^blog/(?P<year>\d+)/$", ("blog/~/", True, True)),
    (r"^a(?:b|c)?/\w/", ("a~/~/", True, False)),
    (r"^a/(?:page-(\d+)/)?$", ("a/", False, False)),
    (r"^a/?$", ("a", False, False)),
    (r"^a.b", ("a", False, False)),
    (r"^a[^b]b", ("a", False, False)),
    (r"^a[^/]b", ("a~b", True, False)),
    (r"^a[^\D/]b", ("a~b", True, False)),
    (r"^a[+-9]b", ("a", False, False)),
    (r"^a\Db", ("a", False, False)),
    (r"^a(?=b/)b", ("ab", True, False)),
    (r"^(a)\1/", ("~", False, False)),
    (r"^a\.b\/c\\d", (r"a.b/c\d", True, False)),
    (r"^a|^b", ("~", True, False)),
    (r"^a/|^b/", ("", False, False)),
    (r"a/$", UNKNOWN),
    (r"^a|b", UNKNOWN),
    (r"(?i)^a/$", UNKNOWN),
    (r"(?m)^a/$", UNKNOWN),
    (r"(?x)^ a / $", ("a/", True, True)),
    (r"^(?i:a)/b", ("~/b", True, False)),
    ("", UNKNOWN),
]


@pytest.mark.parametrize(("route", "expected"), ROUTES)
def test_a_route_is_known_to_its_first_converter_for_slashes(
    route: str, expected: tuple[str, bool, bool]
) -> None:
    text, whole, exact = expected
    assert shape_of(path(route, views.sync).pattern) == (text.replace("~", ANY), whole, exact)


@pytest.mark.parametrize(("regex", "expected"), REGEXES)
def test_a_regular_expression_is_known_while_it_is_simple(
    regex: str, expected: tuple[str, bool, bool]
) -> None:
    text, whole, exact = expected
    assert shape_of(re_path(regex, views.sync).pattern) == (text.replace("~", ANY), whole, exact)


def test_an_include_goes_on() -> None:
    assert shape_of(path("a/", include([])).pattern) == Shape("a/", True, False)
    # Not an endpoint: Django searches, and what follows is left to what is included.
    assert shape_of(re_path("^a/$", include([])).pattern) == Shape("a/", True, False)
    assert Shape("a/", True, False).then(Shape("b", False, False)) == Shape("a/b", False, False)


def test_what_is_not_djangos_own_is_unknown() -> None:
    (prefix,) = i18n_patterns(path("a/", views.sync))
    assert shape_of(prefix.pattern) == UNKNOWN
    assert shape_of(type("Own", (type(path("a/", views.sync).pattern),), {})("a/")) == UNKNOWN
    assert shape_of(re_path("^(", views.sync).pattern) == UNKNOWN  # Django says why


def test_translated_patterns_are_told_apart() -> None:
    text = lazy(lambda: "a/", str)()
    for make in (path, re_path):
        assert is_translated(make(text, views.sync).pattern)
        assert not is_translated(make("a/", views.sync).pattern)
    assert not is_translated(None)
