"""Django's own resolver is the measure: random URLconfs, and paths that are made of their patterns or nearly so."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.conf.urls.i18n import i18n_patterns
from django.test import override_settings
from django.urls import (
    Resolver404,
    ResolverMatch,
    URLPattern,
    URLResolver,
    clear_url_caches,
    include,
    path,
    re_path,
    register_converter,
    resolve,
    reverse,
)
from django.urls.converters import REGISTERED_CONVERTERS, get_converters
from django.urls.resolvers import RegexPattern, RoutePattern
from django.utils import translation
from django.utils.functional import lazy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import views
from tornjango.resolving import Branch, Index, Tree
from tornjango.routing import Routes, indexed

LANGUAGES = ["en-us", "de", "fr"]
FIELDS = [
    "func",
    "args",
    "kwargs",
    "url_name",
    "app_names",
    "namespaces",
    "route",
    "tried",
    "captured_kwargs",
    "extra_kwargs",
    "view_name",
]


class Refusing:
    """Takes letters, but for a "b" at the start."""

    regex = "[a-z]+"

    def to_python(self, value: str) -> str:
        if value.startswith("b"):
            raise ValueError(value)
        return value.upper()

    def to_url(self, value: str) -> str:
        return value.lower()


class Slashed(Refusing):
    regex = "[ab/]+"


class Either(Refusing):
    regex = "a|1/b|[^a-z]"


@pytest.fixture(autouse=True, scope="module")
def _converters() -> Iterator[None]:
    ours = {"refusing": Refusing, "slashed": Slashed, "either": Either}
    for name, converter in ours.items():
        register_converter(converter, name)
    yield
    for name in ours:
        del REGISTERED_CONVERTERS[name]
    get_converters.cache_clear()


def root(*patterns: Any) -> URLResolver:
    """As ``get_resolver()`` makes it."""
    return URLResolver(RegexPattern(r"^/"), list(patterns))


def outcome(resolver_resolve: Any, path_info: str) -> Any:
    try:
        match = resolver_resolve(path_info)
    except Resolver404 as exc:
        return {**exc.args[0]}
    return {name: getattr(match, name) for name in FIELDS} | {"order": list(match.kwargs)}


def assert_as_django(resolver: URLResolver, index: Index, path_info: str) -> None:
    expected = outcome(lambda path: URLResolver.resolve(resolver, path), path_info)
    assert outcome(index.resolve, path_info) == expected
    assert (index.find(path_info) is None) == ("func" not in expected)


# Random URLconfs


@dataclass
class Piece:
    """Of a pattern, with what it matches: nearly, at times."""

    source: str
    samples: list[str]


@dataclass
class Pattern:
    entry: Any
    samples: list[str]


LITERALS = [
    Piece(text, [text])
    for text in ("", "a", "b", "a/", "b/", "ab/", "/", "1", "-", "é/", "%/", ".", "a\n", "\0", "//")
]
CONVERTERS = {
    "int": ["1", "10", "\N{ARABIC-INDIC DIGIT ONE}"],
    "str": ["a", "b-1", "1", "a\n"],
    "slug": ["a", "ab-1", "b"],
    "path": ["a", "a/b", "b/1/", "\n"],
    "uuid": ["12345678-1234-1234-1234-123456789abc"],
    "refusing": ["a", "b", "ab"],
    "slashed": ["a", "b/a", "/"],
    "either": ["a", "1/b", "/", "b"],
}
REGEXES = [
    Piece(r"(?P<one>\d+)", ["1", "10"]),
    Piece(r"(?P<two>[ab]+)", ["a", "ba"]),
    Piece(r"(\w+)", ["a", "1b"]),
    Piece(r"([^/]+)", ["a", "b-1"]),
    Piece(r"(?:page-(?P<page>[0-9]+)/)?", ["", "page-1/"]),
    Piece(r"(?P<maybe>a/)?", ["", "a/"]),
    Piece(r"(a|b/)", ["a", "b/"]),
    Piece(r"(?:a|b)", ["a", "b"]),
    Piece(r".*", ["", "a", "a/b"]),
    Piece(r".", ["a", "/"]),
    Piece(r"\D+", ["a", "/"]),
    Piece(r"\S", ["a", "/"]),
    Piece(r"[^b]", ["a", "/"]),
    Piece(r"[!-a]*", ["", "/", "1"]),
    Piece(r"[\W]", ["-", "/"]),
    Piece(r"[^\W]*", ["", "a"]),
    Piece(r"a?", ["", "a"]),
    Piece(r"/?", ["", "/"]),
    Piece(r"/*", ["", "/", "//"]),
    Piece(r"b+?", ["b", "bb"]),
    Piece(r"(?:a/){2}", ["a/a/"]),
    Piece(r"(?>a+)", ["a", "aa"]),
    Piece(r"a++", ["a"]),
    Piece(r"(?=a)", [""]),
    Piece(r"(?!b)", [""]),
    Piece(r"(?<!a)", [""]),
    Piece(r"\b", [""]),
    Piece(r"^", [""]),
    Piece(r"$", ["", "\n"]),
    Piece(r"(?i:a/)", ["A/", "a/"]),
    Piece(r"(?:(a)|(b))(?(1)/|-)", ["a/", "b-"]),
    Piece(r"(?P<q>a|/)(?P=q)", ["aa", "//"]),
    Piece(r"\/", ["/"]),
    Piece(r"\-", ["-"]),
    Piece(r"#", ["#", ""]),
]


def samples_of(pieces: list[Piece]) -> list[str]:
    found = [""]
    for piece in pieces:
        found = [text + sample for text in found for sample in piece.samples][:12]
    return found


def some(random: Random, choices: list[Any], most: int) -> list[Any]:
    return [random.choice(choices) for _ in range(random.randint(0, most))]


def parameters(random: Random) -> list[str]:
    return some(random, sorted(CONVERTERS), 3)


def route(random: Random, names: list[str]) -> Piece:
    pieces = [random.choice(LITERALS)]
    for number, name in enumerate(names):
        pieces += [Piece(f"<{name}:p{number}>", CONVERTERS[name]), random.choice(LITERALS)]
    return Piece("".join(piece.source for piece in pieces), samples_of(pieces))


FLAGS = ["", "", "", "", "", "(?i)", "(?m)", "(?s)", "(?x)", "(?a)"]
STARTS = ["^", "^", "^", "^", "", r"\A", "a|^", "^b/|^"]
ENDS = {"": "", "/": "/", "/$": "/", "$": "", r"\Z": "", r"\$": "$", "|a/": "a/"}
PIECES = [*REGEXES, *(Piece(re.escape(piece.source), piece.samples) for piece in LITERALS)]


def regex(random: Random) -> Piece:
    start, end = random.choice(STARTS), random.choice(sorted(ENDS))
    middle = some(random, PIECES, 4)
    source = random.choice(FLAGS) + start + "".join(piece.source for piece in middle) + end
    try:
        re.compile(source)
    except re.error:  # a group twice, say
        return regex(random)
    return Piece(source, samples_of([*middle, Piece("", [ENDS[end]])]))


def _in_language(by_language: dict[str, str]) -> str:
    return by_language.get(translation.get_language() or "", by_language["en-us"])


def translated(random: Random, make: Any) -> Piece:
    pieces = {language: make() for language in LANGUAGES[:2]}
    source: Any = lazy(_in_language, str)({name: piece.source for name, piece in pieces.items()})
    return Piece(source, [text for piece in pieces.values() for text in piece.samples])


def anything(random: Random) -> tuple[Any, Piece]:
    """``path`` or ``re_path``, and what it may be given."""
    if random.randrange(3) == 0:
        make = partial(regex, random)
    else:
        # Routes of one pattern in several languages have the same parameters: else Django itself fails.
        make = partial(route, random, parameters(random))
    piece = translated(random, make) if random.randrange(5) == 0 else make()
    return (re_path if make.func is regex else path), piece


class Shouting(RoutePattern):
    def match(self, path: str) -> Any:
        return super().match(path.lower())


class Half(URLPattern):
    """Takes a path with an "a" for another one."""

    def resolve(self, path: str) -> ResolverMatch | None:
        return super().resolve(path.replace("a", "b"))


class Quarter(URLResolver):
    def resolve(self, path: str) -> ResolverMatch:
        return super().resolve(path.replace("b", "a"))


VIEWS = [views.sync, views.asynchronous, views.marked]
KWARGS: list[dict[str, Any]] = [{}, {}, {"extra": 1}, {"one": "x", "p0": 0}]


def leaf(random: Random) -> Pattern:
    name = random.choice([None, "first", "second"])
    make, piece = anything(random)
    entry = make(piece.source, random.choice(VIEWS), random.choice(KWARGS), name=name)
    odd = random.randrange(30)
    if odd == 1:
        entry = Half(entry.pattern, entry.callback, entry.default_args, entry.name)
    elif odd == 2 and make is path:
        entry.pattern = Shouting(piece.source, name=name, is_endpoint=True)
    return Pattern(entry, piece.samples)


def included(random: Random, depth: int) -> Pattern:
    make, piece = anything(random)
    patterns = several(random, depth - 1)
    entries: Any = [pattern.entry for pattern in patterns]
    app_name, namespace = random.choice([("", None), ("app", None), ("app", "space")])
    what = include((entries, app_name), namespace=namespace) if app_name else include(entries)
    entry = make(piece.source, what, random.choice(KWARGS))
    if random.randrange(30) == 1:
        entry = Quarter(entry.pattern, entry.urlconf_name, entry.default_kwargs)
    samples = [
        before + text
        for before in piece.samples[:5]
        for pattern in patterns
        for text in pattern.samples[:5]
    ]
    return Pattern(entry, samples)


def several(random: Random, depth: int = 3) -> list[Pattern]:
    return [
        included(random, depth) if depth and random.randrange(3) == 1 else leaf(random)
        for _ in range(random.randint(0, 5))
    ]


def urlconf(random: Random) -> tuple[list[Any], list[str]]:
    patterns = several(random)
    samples = [text for pattern in patterns for text in pattern.samples]
    entries = [pattern.entry for pattern in patterns]
    if random.randrange(4) == 1:
        inner = several(random, 1)
        entries[1:1] = i18n_patterns(
            *(pattern.entry for pattern in inner),
            prefix_default_language=random.choice([True, False]),
        )
        inside = [text for pattern in inner for text in pattern.samples]
        samples += [*inside, *(f"{code}/{text}" for code in LANGUAGES for text in inside)]
    return entries, samples or [""]


def nearly(random: Random, text: str) -> str:
    where = random.randint(0, len(text))
    changed = [
        text.removesuffix("/"),
        text + "/",
        text + "\n",
        text[:where] + text[where + 1 :],
        text[:where] + random.choice("ab1-/.\nA\0") + text[where:],
        text[:where],
        text + text,
        text.upper(),
    ]
    return random.choice([text] * 4 + changed)


# A run by hand takes as many as it is told.
EXAMPLES = int(os.environ.get("RESOLVING_EXAMPLES", "250"))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
@pytest.mark.filterwarnings("ignore::FutureWarning")  # odd sets in regular expressions
def test_any_urlconf_resolves_as_with_django(random: Random) -> None:
    entries, samples = urlconf(random)
    resolver = root(*entries)
    index = Index(resolver)
    for _ in range(8):
        path_info = "/" + nearly(random, random.choice(samples))
        with translation.override(random.choice(LANGUAGES)):
            assert_as_django(resolver, index, path_info)


# How many patterns are tried


class Tries:
    """Counts what is asked of Django's own patterns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for kind in (RoutePattern, RegexPattern):
            monkeypatch.setattr(kind, "match", self._counting(kind.match))

    def _counting(self, match: Any) -> Any:
        def counted(pattern: Any, path: str) -> Any:
            self.count += 1
            return match(pattern, path)

        return counted

    def during(self, call: Any) -> int:
        before = self.count
        call()
        return self.count - before


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> Tries:
    return Tries(monkeypatch)


def _nested(entry: Any, depth: int) -> Any:
    return path("in/", include([_nested(entry, depth - 1)])) if depth else entry


def _lazily(text: str) -> Any:
    return lazy(lambda: f"{translation.get_language()}-{text}", str)()


MANY = 300
#: By name: what makes the patterns of so many numbers, and a path for one of them.
FAMILIES: dict[str, tuple[Any, str]] = {
    "texts": (lambda n: [path(f"a{i}/", views.sync) for i in n], "a{}/"),
    "numbers": (lambda n: [path(f"a{i}/<int:x>/", views.sync) for i in n], "a{}/7/"),
    "ends": (lambda n: [path(f"a<int:x>/b/c{i}", views.sync) for i in n], "a7/b/c{}"),
    "slugs first": (lambda n: [path(f"<slug:x>/b{i}/", views.sync) for i in n], "x/b{}/"),
    "within a segment": (
        lambda n: [path(f"item-{i}-<int:x>/", views.sync) for i in n],
        "item-{}-7/",
    ),
    "below each other": (lambda n: [path("a/" * (i % 40) + f"{i}/", views.sync) for i in n], ""),
    "one include": (
        lambda n: [path("in/", include([path(f"a{i}/", views.sync) for i in n]))],
        "in/a{}/",
    ),
    "includes": (
        lambda n: [path(f"in{i}/", include([path("a/", views.sync)])) for i in n],
        "in{}/a/",
    ),
    "includes of one text": (
        lambda n: [path("api/", include([path(f"a{i}/", views.sync)])) for i in n],
        "api/a{}/",
    ),
    "includes of none": (
        lambda n: [path("", include([path(f"a{i}/", views.sync)])) for i in n],
        "a{}/",
    ),
    "includes with captures": (
        lambda n: [path("<slug:x>/", include([path(f"a{i}/", views.sync)])) for i in n],
        "x/a{}/",
    ),
    "expressions": (
        lambda n: [re_path(rf"^blog{i}/(?P<year>\d+)/$", views.sync) for i in n],
        "blog{}/2009/",
    ),
    "optional groups": (
        lambda n: [re_path(rf"^b{i}/(?:page-(?P<p>\d+)/)?$", views.sync) for i in n],
        "b{}/page-2/",
    ),
    "languages": (
        lambda n: i18n_patterns(*(path(f"a{i}/", views.sync) for i in n)),
        "en-us/a{}/",
    ),
    "translated": (lambda n: [path(_lazily(f"{i}/"), views.sync) for i in n], "en-us-{}/"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_few_patterns_are_tried_however_many_there_are(family: str, tries: Tries) -> None:
    make, example = FAMILIES[family]
    resolver = root(*make(range(MANY)))
    index = Index(resolver)
    for number in (0, MANY // 2, MANY - 1):
        path_info = "/" + (example.format(number) or "a/" * (number % 40) + f"{number}/")
        # The root, what includes it, and the pattern itself.
        assert tries.during(lambda path_info=path_info: index.find(path_info)) <= 3
        assert_as_django(resolver, index, path_info)
        assert index.find(path_info) is not None
    for nothing in ("/", "/no/", "/x/no/", "/" + example.format("no"), "/in/no"):
        assert tries.during(lambda nothing=nothing: index.find(nothing)) <= 3
        assert_as_django(resolver, index, nothing)


def test_a_language_has_an_index_of_its_own(tries: Tries, monkeypatch: pytest.MonkeyPatch) -> None:
    planted: list[str | None] = []
    plant = Branch.plant

    def noting(branch: Branch) -> Tree:
        planted.append(translation.get_language())
        return plant(branch)

    monkeypatch.setattr(Branch, "plant", noting)
    index = Index(root(*(path(_lazily(f"{i}/"), views.sync) for i in range(MANY))))
    for language in ("de", "fr", "de"):
        with translation.override(language):
            assert index.find(f"/{language}-7/") is not None
            assert tries.during(partial(index.find, f"/{language}-{MANY - 1}/")) == 2
    assert planted == ["en-us", "de", "fr"]


def test_includes_nest_as_deep_as_with_django(tries: Tries) -> None:
    resolver = root(_nested(path("a/", views.sync), 150))
    index = Index(resolver)
    path_info = "/" + "in/" * 150 + "a/"
    assert tries.during(partial(index.find, path_info)) == 152
    assert tries.during(partial(index.find, path_info + "no")) == 151
    assert_as_django(resolver, index, path_info)


def test_a_urlconf_that_includes_itself() -> None:
    patterns: list[Any] = [path("end/", views.sync, name="end")]
    patterns.append(path("more/<int:n>/", include((patterns, "app"))))
    resolver = URLResolver(RegexPattern(r"^/"), patterns)
    index = Index(resolver)
    for path_info in ("/end/", "/more/1/end/", "/more/1/more/2/end/", "/more/1/more/2/", "/more/"):
        assert_as_django(resolver, index, path_info)


# Django's own functions


@pytest.fixture
def use() -> Iterator[Any]:
    """Makes patterns the project's."""
    with override_settings(ROOT_URLCONF="tests.urls"):

        def use(*patterns: Any) -> None:
            urlconf = type("Urls", (), {"urlpatterns": list(patterns)})
            django_settings.ROOT_URLCONF = urlconf
            clear_url_caches()

        yield use
    clear_url_caches()


def test_resolve_uses_the_index_once_it_is_there(use: Any, tries: Tries) -> None:
    use(*(path(f"a{i}/", views.sync, name=f"n{i}") for i in range(MANY)))
    assert tries.during(partial(resolve, "/a200/")) == 202
    indexed()
    assert tries.during(partial(resolve, "/a200/")) == 2
    assert resolve(lazy(lambda: "/a7/", str)()).url_name == "n7"


def test_patterns_that_changed_are_seen_when_the_caches_are_cleared(use: Any) -> None:
    patterns = [path("a/", views.sync)]
    use(*patterns)
    before = indexed()
    assert indexed() is before
    use(*patterns, path("b/", views.sync))
    assert indexed() is not before
    assert indexed().find("/b/") is not None


def test_what_was_tried_is_listed_when_it_is_looked_at(use: Any, tries: Tries) -> None:
    use(*(path(f"a{i}/", views.sync) for i in range(MANY)))
    indexed()
    with pytest.raises(Resolver404) as raised:
        resolve("/no/")
    assert tries.count < 5
    tried = raised.value.args[0]["tried"]
    assert len(tried) == MANY
    assert (tried[0], [*tried][-1]) == (tried[:1][0], tried[-1])
    assert repr(tried).startswith("[[<URLPattern")
    match = resolve("/a3/")
    assert match.tried == resolve("/a3/").tried
    assert match.tried != resolve("/a4/").tried


def test_reverse_is_as_it_was(use: Any) -> None:
    inner = [
        path("<int:pk>/", views.sync, name="entry"),
        re_path(r"^(\w+)/$", views.sync, name="word"),
    ]
    use(path("out/<slug:s>/", include((inner, "app"))))
    arguments = [("app:entry", {"s": "x", "pk": 7})]
    before = [reverse(name, kwargs=kwargs) for name, kwargs in arguments]
    indexed()
    assert [reverse(name, kwargs=kwargs) for name, kwargs in arguments] == before == ["/out/x/7/"]
    assert resolve("/out/x/7/").view_name == "app:entry"


def test_regular_expressions_are_compiled_when_they_are_needed(use: Any) -> None:
    entry, other = path("a/<int:x>/", views.sync), path("b/<int:x>/", views.sync)
    use(entry, other)
    Routes()
    resolve("/b/1/")
    assert "regex" not in entry.pattern.__dict__
    assert "regex" in other.pattern.__dict__
