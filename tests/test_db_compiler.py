from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import connections
from django.db.backends.postgresql.base import DatabaseWrapper
from django.db.models import Count, Q
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.app.models import Blog, Entry
from tests.database import QUERYSETS, differences, fill, outcome, picture
from tornjango.db.compiler import compile, unevaluated


def evaluate(queryset: Any) -> list[Any]:
    """Compiles, has Django's own connection fetch the rows, and hydrates them; prefetching is left to Django."""
    compiled = compile(queryset)
    if compiled.sql is None:
        return []
    with connections[queryset.db].cursor() as cursor:
        cursor.execute(compiled.sql, compiled.params)
        columns = [column[0] for column in cursor.description]
        return compiled.hydrate(cursor.fetchall(), columns)


@pytest.fixture
def filled(database: None) -> None:
    fill()


def test_rows_become_what_iterating_would_give(filled: None) -> None:
    assert {name for name in differences(evaluate) if "prefetch" not in name} == set()


def test_objects_are_made_anew_from_the_same_rows(filled: None) -> None:
    compiled = compile(Blog.objects.all())
    rows = [(1, "a"), (2, "b")]
    first, second = compiled.hydrate(rows), compiled.hydrate(rows)
    assert first == second
    assert first[0] is not second[0]


def test_a_compiled_queryset_stays_as_it_was(filled: None) -> None:
    queryset = Entry.objects.select_related("blog")
    evaluate(queryset)
    assert queryset._result_cache is None
    assert "get_compiler" not in vars(queryset.query)
    assert len(queryset) == 13


def test_a_compiled_union_stays_as_it_was(filled: None) -> None:
    queryset = QUERYSETS["union of values, ordered by another"]()
    first, second = compile(queryset), compile(queryset)
    assert first.sql == second.sql
    assert picture(evaluate(queryset)) == picture(list(queryset))


def test_a_queryset_that_cannot_have_rows_needs_no_sql(database: None) -> None:
    compiled = compile(Entry.objects.none())
    assert compiled.sql is None
    assert compiled.hydrate([]) == []
    assert compile(Entry.objects.filter(pk__in=[])).sql is None


def test_the_database_is_the_one_that_was_asked_for(database: None) -> None:
    [blog] = compile(Blog.objects.all(), "own").hydrate([(1, "a")])
    assert blog._state.db == "own"
    [blog] = compile(Blog.objects.raw("select"), "own").hydrate([(1, "a")], ["id", "name"])
    assert blog._state.db == "own"


def test_a_router_that_changes_its_mind_is_asked_once(
    database: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["own", "default", "default"])
    monkeypatch.setattr("django.db.router.db_for_read", lambda model, **hints: next(answers))
    [blog] = compile(Blog.objects.all()).hydrate([(1, "a")])
    assert blog._state.db == "own"


def test_an_unevaluated_copy_forgets_rows_and_keeps_the_rest(filled: None) -> None:
    for queryset in (Entry.objects.all(), Entry.objects.raw("select * from app_entry")):
        asked = queryset.prefetch_related("tag")
        before = list(asked)
        copy = unevaluated(asked, "default")
        assert list(copy) == before
        first = next(iter(copy))
        assert first is not before[0]
        assert "tag" in first._prefetched_objects_cache


# One has the driver quote for it; two are deprecated spellings, whose warnings are errors here.
NEEDY = {"quoted by the driver", "aggregates of PostgreSQL", "select_related, all"}


def test_compiling_and_hydrating_touch_neither_server_nor_files(
    filled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for name in QUERYSETS if name not in NEEDY and not name.startswith("a ")]
    querysets = [QUERYSETS[name]() for name in names]
    answers = [_answer(it) for it in querysets]
    connections.close_all()
    touched: list[str] = []
    connect = lambda *args: touched.append("server")  # noqa: E731
    monkeypatch.setattr(DatabaseWrapper, "get_new_connection", connect)
    with _audited(touched):
        for queryset, answer in zip(querysets, answers, strict=True):
            compiled = compile(queryset)
            if compiled.sql is not None:
                compiled.hydrate(*answer)
    assert touched == []


def _answer(queryset: Any) -> Any:
    compiled = compile(queryset)
    if compiled.sql is None:
        return None
    with connections["default"].cursor() as cursor:
        cursor.execute(compiled.sql, compiled.params)
        return cursor.fetchall(), [column[0] for column in cursor.description]


@contextmanager
def _audited(touched: list[str]) -> Iterator[None]:
    """An audit hook cannot be taken away again: afterwards it does nothing."""
    watching = True

    def audit(event: str, args: Any) -> None:
        if watching and event in ("open", "socket.connect", "subprocess.Popen"):
            touched.append(event)

    sys.addaudithook(audit)
    yield
    watching = False


def test_what_needs_a_connection_is_refused_on_a_loop(database: None) -> None:
    async def compile_there() -> str:
        return outcome(lambda it: [compile(it)], QUERYSETS["quoted by the driver"])[0].__name__

    assert asyncio.run(compile_there()) == "SynchronousOnlyOperation"


FIELDS = ["pk", "title", "rating", "pubdate", "blog__name", "editor__name"]
CONDITIONS = [
    Q(rating__gt=1),
    Q(title__contains="1%"),
    Q(blog__name="Django"),
    Q(tag__slug="news"),
    Q(authors__name__startswith="A"),
    Q(pk__in=[]),
    Q(editor=None),
    ~Q(tag__slug="sport"),
    Q(rating=1) | Q(authors__name="Bob"),
]
names = st.lists(st.sampled_from(FIELDS), max_size=3, unique=True)
step = st.one_of(
    st.tuples(st.sampled_from(["filter", "exclude"]), st.sampled_from(CONDITIONS)),
    st.tuples(st.sampled_from(["values", "values_list", "only", "defer", "order_by"]), names),
    st.tuples(st.just("select_related"), st.sampled_from([["blog"], ["editor"], [None]])),
    st.tuples(st.just("annotate"), st.sampled_from(["tag", "authors", "pk"])),
    st.tuples(st.just("slice"), st.tuples(st.integers(0, 5), st.integers(0, 8))),
    st.tuples(st.sampled_from(["distinct", "reverse"]), st.just([])),
    st.tuples(
        st.sampled_from(["union", "intersection", "difference"]), st.sampled_from(CONDITIONS)
    ),
)


def chain(steps: list[Any]) -> Any:
    queryset: Any = Entry.objects.order_by("pk")
    for name, argument in steps:
        if name in ("filter", "exclude"):
            queryset = getattr(queryset, name)(argument)
        elif name in ("union", "intersection", "difference"):
            queryset = getattr(queryset, name)(Entry.objects.filter(argument)).order_by("pk")
        elif name == "annotate":
            queryset = queryset.annotate(number=Count(argument))
        elif name == "slice":
            queryset = queryset[slice(*argument)]
        else:
            queryset = getattr(queryset, name)(*argument)
    return queryset


@given(st.lists(step, max_size=6))
@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_chain_of_a_querysets_methods_gives_the_same(filled: None, steps: list[Any]) -> None:
    assert outcome(evaluate, lambda: chain(steps)) == outcome(list, lambda: chain(steps))
