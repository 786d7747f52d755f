from __future__ import annotations

import asyncio
import datetime as dt
import decimal
import enum
import re
import uuid
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core.management import call_command
from django.db import router, transaction
from django.db.models import Case, Count, Exists, F, OuterRef, Prefetch, Q, QuerySet, Value, When
from django.db.models import functions as fn
from django.db.models.fields import CharField, IntegerField
from django.db.models.lookups import Exact, Transform
from django.db.models.signals import post_delete
from django.db.transaction import TransactionManagementError
from django.db.utils import DataError
from django.test.utils import override_settings, register_lookup
from django.utils import timezone
from django.utils.safestring import mark_safe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tornado.ioloop import IOLoop

from tests.app.models import Author, Blog, CuriousBlog, Draft, Entry, Everything, Place
from tests.database import fill, opened, picture
from tornjango import db
from tornjango.db.compiler import compile
from tornjango.db.prepared import (
    COUNT,
    DELETE,
    EXISTS,
    FIRST,
    GET,
    LIST,
    UPDATE,
    Operation,
    Prepared,
)
from tornjango.db.template import same

METHODS = {LIST: "__call__", GET: "get", FIRST: "first", COUNT: "count", EXISTS: "exists"}


@pytest.fixture
def filled(database: None) -> None:
    fill()


class Folded(Transform):
    """Upper case on both sides."""

    lookup_name = "folded"
    function = "UPPER"
    bilateral = True


@pytest.fixture
def folded() -> Iterator[None]:
    with register_lookup(CharField, Folded):
        yield


def outcome(run: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return picture(run())
        except Exception as exc:  # noqa: BLE001 - any error is an outcome
            return type(exc), re.sub("0x[0-9a-f]+", "", str(exc)), type(exc.__cause__)


class Compared:
    """A prepared queryset beside the plain one."""

    def __init__(self, loop: IOLoop, function: Callable[..., Any]) -> None:
        self.loop = loop
        self.function = function
        self.prepared: Prepared[Any, Any] = Prepared(function)

    def check(self, operation: Operation, **values: Any) -> None:
        call = getattr(self.prepared, METHODS[operation])
        got = outcome(lambda: self.loop.run_sync(lambda: call(**values)))
        expected = outcome(lambda: operation.run(self.function(**values), {}))
        assert got == expected
        self.check_statement(operation, values)

    def check_statement(self, operation: Operation, values: dict[str, Any]) -> None:
        """What would be sent is what Django would send, letter by letter."""
        key = self.prepared._key(operation, values, None)
        shape = self.prepared._shapes.get(key)
        if operation is not LIST or shape is None:
            return
        template = shape.ready["default"].template
        try:
            params = template.bind(values)
        except Exception:  # noqa: BLE001 - then the plain queryset ran
            return
        plain = compile(self.function(**values))
        assert template.sql == plain.sql
        assert same(params, plain.params)

    @property
    def is_prepared(self) -> bool:
        """Whether a template served, made for no particular values."""
        return bool(self.prepared._shapes) and not self.prepared._seen and not self.prepared._unfit


@pytest.fixture
def served(io_loop: IOLoop) -> Iterator[IOLoop]:
    context = opened()
    io_loop.run_sync(context.__aenter__)
    yield io_loop
    io_loop.run_sync(lambda: context.__aexit__(None, None, None))


# Lookups that are compiled once, with two values each.
MOMENT = dt.datetime(2009, 2, 7, 23, 30, tzinfo=dt.UTC)
PREPARED: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "pk": (lambda x: Entry.objects.filter(pk=x), [1, 2]),
    "exact": (lambda x: Entry.objects.filter(title=x), ["Entry 1 at 1%", "none"]),
    "iexact": (lambda x: Author.objects.filter(name__iexact=x), ["ANN", "100%"]),
    "contains": (lambda x: Entry.objects.filter(title__contains=x), ["1%", "_"]),
    "startswith": (lambda x: Author.objects.filter(name__istartswith=x), ["č", "a"]),
    "regex": (lambda x: Author.objects.filter(name__regex=x), ["^A", "b$"]),
    "range": (lambda a, b: Entry.objects.filter(rating__range=(a, b)), [1, 3]),
    "gt": (lambda x: Entry.objects.filter(rating__gt=x), [1, 3]),
    "gte of a float": (lambda x: Entry.objects.filter(rating__gte=x), [1.5, 2.0]),
    "year": (lambda x: Entry.objects.filter(pubdate__year=x), [2009, 2010]),
    "year gt": (lambda x: Entry.objects.filter(pubdate__year__gt=x), [2008, 2010]),
    "month": (lambda x: Entry.objects.filter(pubdate__month=x), [1, 3]),
    "date": (lambda x: Entry.objects.filter(pubdate__date=x), [dt.date(2009, 2, 8), MOMENT.date()]),
    "moment": (lambda x: Entry.objects.filter(pubdate=x), [MOMENT, MOMENT.replace(hour=1)]),
    "the message of 2009": (
        lambda x: Entry.objects.filter(pubdate__year=x).exclude(tag__slug="sport"),
        [2009, 2010],
    ),
    "exclude many": (lambda x: Entry.objects.exclude(tag__slug=x), ["sport", "news"]),
    "exclude nullable": (lambda x: Entry.objects.exclude(editor__name=x), ["Ann", "Bob"]),
    "relation": (lambda x: Entry.objects.filter(blog=x), [1, 2]),
    "relation's field": (lambda x: Entry.objects.filter(authors__name=x), ["Ann", "Bob"]),
    "or": (lambda x: Entry.objects.filter(Q(rating=x) | ~Q(blog=x)), [1, 2]),
    "in a list": (lambda x: Entry.objects.filter(pk__in=x), [[1, 2], [4, 3]]),
    "in a list of relations": (lambda x: Entry.objects.filter(blog__in=x), [[1, 2], [4, 3]]),
    "inherited": (lambda x: Draft.objects.filter(title=x), ["Draft", "x"]),
    "JSON key": (lambda x: Everything.objects.filter(json__d=x), ["2024-01-01", "x"]),
    "JSON index": (lambda x: Everything.objects.filter(json__a__1=x), [2.5, 3.5]),
    "array": (lambda x: Everything.objects.filter(texts__contains=x), [["a,b"], ["x"]]),
    "array index": (lambda x: Everything.objects.filter(texts__0=x), ["a,b", "x"]),
    "range contains": (lambda x: Everything.objects.filter(integers__contains=x), [3, 12]),
    "uuid": (lambda x: Everything.objects.filter(uuid=x), [uuid.UUID(int=1), uuid.UUID(int=2)]),
    "address": (lambda x: Everything.objects.filter(ip=x), ["::1", "2001:db8::1"]),
    "decimal": (
        lambda x: Everything.objects.filter(decimal__lt=x),
        [decimal.Decimal("0.5"), decimal.Decimal("-1e14")],
    ),
    "duration": (
        lambda x: Everything.objects.filter(duration__lt=x),
        [dt.timedelta(0), dt.timedelta(-900)],
    ),
    "values": (lambda x: Entry.objects.filter(rating=x).values("title", "blog__name"), [1, 2]),
    "values_list": (lambda x: Entry.objects.filter(rating=x).values_list("pk", flat=True), [1, 2]),
    "annotated": (lambda x: Blog.objects.annotate(n=Count("entries")).filter(n__gt=x), [5, 6]),
    "aggregate filter": (
        lambda x: Blog.objects.annotate(n=Count("entries", filter=Q(entries__rating=x))),
        [1, 2],
    ),
    "value": (lambda x: Blog.objects.annotate(v=Value(x)), ["a", "b"]),
    "arithmetic": (lambda x: Entry.objects.annotate(v=F("rating") + x), [1, 2]),
    "arithmetic, reversed": (lambda x: Entry.objects.annotate(v=x - F("rating")), [1, 2]),
    "case": (
        lambda x: Entry.objects.annotate(c=Case(When(rating=x, then=1), default=0)).order_by(
            "c", "pk"
        ),
        [1, 2],
    ),
    "exists": (
        lambda x: Blog.objects.filter(
            Exists(Entry.objects.filter(blog=OuterRef("pk"), rating__gt=x))
        ),
        [3, 9],
    ),
    "in a subquery": (
        lambda x: Entry.objects.filter(blog__in=Blog.objects.filter(name=x)),
        ["Django", "x"],
    ),
    "union": (
        lambda x: Entry.objects.filter(rating=x).union(Entry.objects.filter(pk=x)).order_by("pk"),
        [1, 2],
    ),
    "slice": (lambda x: Entry.objects.filter(rating__lt=x)[1:4], [3, 4]),
    "select_related": (
        lambda x: Entry.objects.select_related("blog", "editor").filter(rating=x),
        [1, 2],
    ),
    "only": (lambda x: Entry.objects.only("title").filter(rating=x), [1, 2]),
    "prefetch": (lambda x: Entry.objects.filter(rating=x).prefetch_related("tag"), [1, 2]),
    "extra": (lambda x: Entry.objects.extra(where=["rating > %s"], params=[x]), [1, 2]),
    "folded": (lambda x: Author.objects.filter(name__folded=x), ["ann", "x"]),
    "part of a key": (lambda x: Place.objects.filter(number=x), [0, 1]),
    "instance": (lambda x: Entry.objects.filter(blog=x), [Blog(pk=1), Blog(pk=2)]),
    "marked safe": (lambda x: Entry.objects.filter(title=x), [mark_safe("a"), mark_safe("b")]),
    "twice": (lambda x: Entry.objects.filter(Q(rating=x) | Q(pk=x)), [1, 2]),
}


def test_querysets_are_compiled_once_for_all_values(
    filled: None, folded: None, served: IOLoop
) -> None:
    for name, (function, values) in PREPARED.items():
        compared = Compared(served, function)
        names = compared.prepared._names
        for value in [*values, *values]:
            arguments = {"a": value, "b": 3} if names == ("a", "b") else {"x": value}
            for operation in METHODS:
                compared.check(operation, **arguments)
        assert (name, compared.is_prepared) == (name, True)
        assert (name, len(compared.prepared._shapes)) == (name, len(METHODS))


def shape(prepared: Prepared[..., Any], operation: Operation) -> Any:
    """What is ready for an operation on "default"; it has been used with one shape."""
    [found] = [it for key, it in prepared._shapes.items() if key[0] is operation]
    return found.ready["default"]


@pytest.mark.gen_test
async def test_update_takes_the_functions_arguments_and_the_fields_values(filled: None) -> None:
    author = db.prepare(lambda pk: Author.objects.filter(pk=pk))
    async with opened():
        for pk in (1, 2, 99):
            assert await author.update(pk=pk, name=f"Name {pk}") == (pk != 99)
        assert await author.update(3, name=F("email"), email="x@example.com") == 1
        assert "UPDATE" in shape(author, UPDATE).template.sql
        changed = [it async for it in Author.objects.order_by("pk").values_list("name", "email")]
    assert changed[:3] == [("Name 1", ""), ("Name 2", ""), ("", "x@example.com")]


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"rating": 5}, {"rating": "five"}),
        ({"rating": 5}, {"rating": 2**70}),
        ({"rating": 5}, {"rating": None}),
        ({"blog": 2}, {"blog": 99}),
        ({"blog": Blog(pk=2)}, {"blog": Blog()}),
        ({"blog": Blog(pk=2)}, {"title": Blog(pk=2)}),
        ({"pubdate": MOMENT}, {"pubdate": "tomorrow"}),
        ({"title": "a"}, {"nothing": "a"}),
        ({"title": "a"}, {"title": Count("pk")}),
    ],
    ids=str,
)
def test_update_fails_as_djangos(
    filled: None, served: IOLoop, good: dict[str, Any], bad: dict[str, Any]
) -> None:
    entry = Prepared(lambda pk: Entry.objects.filter(pk=pk))
    assert served.run_sync(lambda: entry.update(1, **good)) == 1
    expected = outcome(lambda: Entry.objects.filter(pk=1).update(**bad))
    assert outcome(lambda: served.run_sync(lambda: entry.update(1, **bad))) == expected
    assert issubclass(expected[0], Exception)
    assert served.run_sync(lambda: entry.update(1, **good)) == 1
    assert entry._shapes
    assert not entry._seen


@pytest.mark.gen_test
async def test_an_argument_and_a_field_may_have_the_same_name(filled: None) -> None:
    named = db.prepare(lambda name: Author.objects.filter(name=name))
    async with opened():
        assert await named.update("Ann", name="Ann") == 1
        assert await named.update("Ann", name="Anna") == 1
        assert await named.update("Bob", name="Anna") == 1
        assert await named.count("Anna") == 2
        assert shape(named, UPDATE)


@pytest.mark.gen_test
async def test_delete_is_one_statement_where_django_has_one(filled: None) -> None:
    numbered = db.prepare(lambda number: Place.objects.filter(number=number))
    deleted = []

    def note(sender: Any, instance: Any, **kwargs: Any) -> None:
        deleted.append(instance.name)

    async with opened():
        assert await numbered.delete(number=0) == (2, {"app.Place": 2})
        assert await numbered.delete(number=0) == (0, {})
        assert "DELETE" in shape(numbered, DELETE).template.sql
        post_delete.connect(note, sender=Place)
        try:
            assert await numbered.delete(number=1) == (2, {"app.Place": 2})
        finally:
            post_delete.disconnect(note, sender=Place)
    assert sorted(deleted) == ["de1", "fr1"]


@pytest.mark.gen_test
async def test_delete_cascades_as_djangos(filled: None) -> None:
    blog = db.prepare(lambda pk: Blog.objects.filter(pk=pk))
    async with opened():
        count, by_model = await blog.delete(pk=1)
        assert by_model["app.Entry"] == 7
        assert count == sum(by_model.values())
        assert not await Entry.objects.filter(blog=1).aexists()


@pytest.mark.gen_test
async def test_a_transaction_of_the_task_is_used(filled: None) -> None:
    author = db.prepare(lambda pk: Author.objects.filter(pk=pk))
    async with opened():
        async with db.atomic():
            await author.update(1, name="In the transaction")
            assert (await author.get(pk=1)).name == "In the transaction"
            transaction.set_rollback(True)
        assert (await author.get(pk=1)).name == "Ann"


@pytest.mark.gen_test
async def test_a_failed_write_breaks_the_transaction(filled: None) -> None:
    entry = db.prepare(lambda pk: Entry.objects.filter(pk=pk))
    async with opened():
        await entry.update(pk=1, blog_id=2)
        async with db.atomic():
            with pytest.raises(DataError):
                await entry.update(pk=1, title="x" * 300)
            with pytest.raises(TransactionManagementError):
                await entry.get(pk=1)
            transaction.set_rollback(True)


@pytest.fixture
def sqlite() -> Iterator[None]:
    call_command("migrate", database="sqlite", run_syncdb=True, verbosity=0, interactive=False)
    Blog.objects.using("sqlite").create(name="Django", pk=7)
    yield
    Blog.objects.using("sqlite").all().delete()


@pytest.mark.gen_test
async def test_each_database_has_its_own_statement(
    filled: None, sqlite: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def function(name: str) -> Any:
        return Blog.objects.filter(name__contains=name)

    routed, pinned = db.prepare(function), db.using("sqlite").prepare(function)
    chosen = db.prepare(lambda alias: Blog.objects.using(alias).filter(name__contains="jang"))
    async with opened():
        for _ in range(2):
            assert [it.pk for it in await routed(name="jang")] == [2]
            [blog] = await pinned(name="jang")
            assert (blog.pk, blog._state.db) == (7, "sqlite")
            assert [it.pk for it in await chosen(alias="default")] == [2]
            assert [it.pk for it in await chosen(alias="sqlite")] == [7]
        monkeypatch.setattr(router, "db_for_read", lambda model, **hints: "sqlite")
        monkeypatch.setattr(routed, "_shapes", {})
        assert [it.pk for it in await routed(name="jang")] == [7]


@pytest.mark.gen_test
async def test_the_active_time_zone_counts(filled: None) -> None:
    day = dt.date(2009, 2, 8)
    on_day = db.prepare(lambda least: Entry.objects.filter(pubdate__date=day, rating__gte=least))
    at_year = db.prepare(lambda year: Entry.objects.filter(pubdate__year=year))
    async with opened():
        for zone, count in (("Europe/Berlin", 1), ("America/New_York", 0), ("Asia/Tokyo", 1)):
            with timezone.override(zone):
                assert await on_day.count(least=0) == count
                plain = Entry.objects.filter(pubdate__year=2009).values_list("pk", flat=True)
                assert [it.pk for it in await at_year(year=2009)] == [it async for it in plain]


@pytest.mark.gen_test
async def test_settings_that_change_make_it_forget(filled: None) -> None:
    on_day = db.prepare(lambda day: Entry.objects.filter(pubdate__date=day))
    async with opened():
        assert await on_day.count(day=dt.date(2009, 2, 8)) == 1
        with override_settings(USE_TZ=False):
            assert not on_day._shapes
            compiled = compile(Entry.objects.filter(pubdate__date=dt.date(2009, 2, 8)))
            await on_day(day=dt.date(2009, 2, 8))
            assert shape(on_day, LIST).template.sql == compiled.sql
        assert not on_day._shapes


@pytest.mark.gen_test
async def test_many_may_use_it_at_once(filled: None) -> None:
    entry = db.prepare(lambda pk: Entry.objects.filter(pk=pk).select_related("blog"))
    async with opened():
        for _ in range(2):
            found = await asyncio.gather(*(entry.get(pk=pk) for pk in range(1, 13)))
            assert [it.pk for it in found] == list(range(1, 13))


@pytest.mark.gen_test
async def test_it_outlives_the_pools(filled: None) -> None:
    blog = db.prepare(lambda pk: Blog.objects.filter(pk=pk))
    for _ in range(2):
        async with opened():
            assert (await blog.get(pk=1)).name == "Tornado"


def test_outside_of_the_server_it_is_in_the_callers_transaction(filled: None) -> None:
    named = db.prepare(lambda name: Blog.objects.filter(name=name))
    with transaction.atomic():
        Blog.objects.create(name="New")
        for _ in range(2):
            assert async_to_sync(named.count)(name="New") == 1
        assert async_to_sync(named.update)("New", name="Newer") == 1
        transaction.set_rollback(True)
    assert async_to_sync(named.count)(name="Newer") == 0


@pytest.mark.gen_test
async def test_an_argument_that_is_looked_at_has_a_statement_for_each_value(
    filled: None, caplog: pytest.LogCaptureFixture
) -> None:
    def page(number: int, size: int, rating: int) -> Any:
        queryset = Entry.objects.filter(rating__gte=rating)
        return queryset[number * size : (number + 1) * size]

    prepared = db.prepare(page)
    async with opened():
        for number in (0, 1, 0, 1):
            for rating in (0, 1, 2):
                found = await prepared(number=number, size=3, rating=rating)
                expected = [it async for it in page(number, 3, rating)]
                assert found == expected
    assert prepared._seen == {"number", "size"}
    assert len(prepared._shapes) == 2
    [record] = [it for it in caplog.records if it.name == "tornjango.db"]
    assert "the function looks at its argument 'number'" in record.getMessage()


class Named(Exact):
    """Nothing is named by an empty string."""

    lookup_name = "named"

    def get_prep_lookup(self) -> Any:
        value = super().get_prep_lookup()
        return None if type(value) is str and not value else value

    def get_rhs_op(self, connection: Any, rhs: str) -> str:
        return f"= {rhs}"


def test_values_that_change_the_sql_do_not_fit_and_run_plain(filled: None, served: IOLoop) -> None:
    cases: list[tuple[Callable[[Any], Any], list[Any]]] = [
        (lambda x: Everything.objects.filter(boolean=x), ["True", "False", "True"]),
        (lambda x: Entry.objects.filter(rating__lt=x), [2**70, 2, -(2**70), 3]),
        (lambda x: Entry.objects.exclude(rating__lt=x), [2**70, 2, -(2**70), 3]),
        (lambda x: Entry.objects.filter(rating=x), [1, 2**70, 2]),
        (lambda x: Entry.objects.filter(rating__in=x), [[1, 2], [1, 1], [2, 3]]),
        (lambda x: Entry.objects.exclude(editor__in=x), [[1, 2], [1, None], [2, 3]]),
        (lambda x: Author.objects.filter(name__named=x), ["Ann", "", "Bob"]),
    ]
    with register_lookup(CharField, Named):
        for function, values in cases:
            compared = Compared(served, function)
            for value in values:
                for operation in METHODS:
                    compared.check(operation, x=value)
            assert (values, compared.is_prepared) == (values, True)


LOOKS: list[Callable[[Any], Any]] = [
    lambda x: Author.objects.filter(name=x.strip()),
    lambda x: Author.objects.filter(name=str(x)),
    lambda x: Author.objects.filter(name=f"{x}"),
    lambda x: Author.objects.filter(name=x + ""),
    lambda x: Author.objects.filter(name="".join([x])),
    lambda x: Author.objects.filter(name=x[:2]),
    lambda x: Author.objects.filter(name=x) if x else Author.objects.none(),
    lambda x: Author.objects.filter(name=x) if x == "Ann" else Author.objects.all(),
    lambda x: Author.objects.filter(name=x) if x in {"Ann"} else Author.objects.all(),
    lambda x: Author.objects.filter(name=x.strip() if isinstance(x, str) else x),
    lambda x: Author.objects.filter(name=getattr(x, "strip", lambda: x)()),
    lambda x: Author.objects.filter(name=x) if type(x) is str else Author.objects.all(),
    lambda x: Author.objects.order_by(x),
    lambda x: Author.objects.filter(**{x: 1}),
    lambda x: Author.objects.extra(where=[f"name = '{x}'"]),
    lambda x: Author.objects.annotate(v=fn.Concat("name", x)),
    lambda x: Author.objects.prefetch_related(
        Prefetch("entries", Entry.objects.filter(title__contains=x))
    ),
]


@pytest.mark.parametrize("number", range(len(LOOKS)))
def test_looking_at_an_argument_changes_nothing(filled: None, served: IOLoop, number: int) -> None:
    compared = Compared(served, LOOKS[number])
    for x in ("Ann", " Ann", "", "name", "Bob ", "Ann", "name"):
        compared.check(LIST, x=x)
    assert not compared.is_prepared


@pytest.mark.gen_test
async def test_statements_kept_are_bounded(filled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tornjango.db.prepared.KEPT", 4)
    one_of = db.prepare(lambda keys: Entry.objects.filter(pk__in=keys))
    async with opened():
        for count in [*range(1, 10), 1]:
            assert len(await one_of(keys=list(range(1, count + 1)))) == count
    assert len(one_of._shapes) == 4


def test_functions_that_cannot_be_prepared_are_refused() -> None:
    async def waits(x: int) -> Any: ...

    with pytest.raises(TypeError, match="async"):
        db.prepare(waits)
    with pytest.raises(TypeError, match="arguments have names"):
        db.prepare(lambda *x: Blog.objects.filter(pk__in=x))


@pytest.mark.gen_test
async def test_wrong_arguments_and_results_are_told(database: None) -> None:
    blog = db.prepare(lambda pk: Blog.objects.filter(pk=pk))
    manager: Any = db.prepare(lambda: Blog.objects)
    with pytest.raises(TypeError, match="missing a required argument: 'pk'"):
        await blog()
    with pytest.raises(TypeError, match="unexpected keyword argument 'name'"):
        await blog(pk=1, name="x")
    with pytest.raises(TypeError, match="has to return a QuerySet"):
        await manager()


@pytest.mark.gen_test
async def test_arguments_may_have_defaults_and_kinds(filled: None) -> None:
    def function(pk: int, /, name: str = "Tornado", *, order: str = "pk") -> Any:
        return Blog.objects.filter(pk=pk, name=name).order_by(order)

    blog = db.prepare(function)
    async with opened():
        assert (await blog.get(1)).name == "Tornado"
        assert await blog.exists(1, "Django") is False
        assert await blog.exists(2, name="Django", order="-pk") is True


class OwnQuerySet(QuerySet[Any]):
    def get(self, *args: Any, **kwargs: Any) -> Any:
        return "its own"


def test_a_querysets_own_methods_are_called(filled: None, served: IOLoop) -> None:
    compared = Compared(served, lambda x: OwnQuerySet(Blog).filter(pk=x))
    for x in (1, 2):
        compared.check(GET, x=x)
        compared.check(LIST, x=x)
    assert list(compared.prepared._shapes)


def test_what_is_unusual_is_as_djangos(filled: None, served: IOLoop) -> None:
    blog = Blog.objects.get(name="Django")
    for function in (
        lambda x: blog.entries.filter(rating=x),
        lambda x: CuriousBlog.objects.filter(pk=x),
        lambda x: Entry.objects.raw("select * from app_entry where rating = %s", [x]),
        lambda x: Entry.objects.filter(rating=x).defer("body"),
        lambda x: Entry.objects.filter(rating=x).values_list("pk", "title", named=True),
        lambda x: Place.objects.filter(number=x),
        lambda x: Everything.objects.filter(pk=x),
    ):
        compared = Compared(served, function)
        for x in (1, 2, 1):
            compared.check(LIST, x=x)


# Any lookup, any value.
# Any lookup, any value.


class Status(enum.IntEnum):
    ONE = 1


class Name(enum.StrEnum):
    ANN = "Ann"


LOOKUPS: dict[Any, list[str]] = {
    Entry: [
        *("pk", "rating", "rating__gt", "rating__gte", "rating__lt", "rating__lte", "rating__in"),
        *("rating__range", "rating__isnull", "rating__contains", "rating__regex", "rating__iexact"),
        *("title", "title__iexact", "title__contains", "title__icontains", "title__startswith"),
        *("title__endswith", "title__regex", "title__in", "title__gt", "title__folded"),
        *("pubdate", "pubdate__year", "pubdate__year__lt", "pubdate__date", "pubdate__month__in"),
        *("pubdate__isnull", "pubdate__time__gt", "pubdate__range", "pubdate__week_day"),
        *("blog", "blog__in", "blog_id", "blog__name", "blog__name__folded", "blog__isnull"),
        *("editor", "editor__isnull", "editor__name", "editor__name__in", "authors", "authors__in"),
        *("authors__name", "authors__name__startswith", "tag__slug", "tag__slug__in", "tag"),
        *("draft__reason", "nothing", "title__nothing"),
    ],
    Everything: [
        *("big", "small", "small__gte", "boolean", "boolean__exact", "binary", "char", "upper"),
        *("date", "date__year", "date__gt", "decimal", "decimal__lt", "duration", "floating"),
        *("ip", "ip__startswith", "json", "json__a", "json__a__0", "json__contains", "json__d"),
        *("json__has_key", "json__d__icontains", "json__isnull", "json__a__isnull", "time"),
        *("time__hour", "uuid", "uuid__icontains", "uuid__in", "texts", "texts__contains"),
        *("texts__overlap", "texts__len", "texts__0", "texts__0__icontains", "grid", "integers"),
        *("integers__contains", "integers__startswith", "dates__contains", "period__contains"),
        *("numbers__contained_by", "reference", "reference__big", "moments__contains", "file"),
    ],
    Place: ["pk", "pk__in", "country", "number__lt", "pk__gt"],
    Draft: ["title", "reason", "entry_ptr", "blog__name", "pk"],
}

FAMILIES: list[list[Any]] = [
    [0, 1, 2, 3, 2009, -1, 2**31, 2**63, -(2**70), 2**31 - 1, Status.ONE],
    ["", "1", "Ann", "Django", "1%", "_", "\\", "sport", "č", "'", "2009-02-07", Name.ANN, "True"],
    ["a", "Entry 1 at 1%", "^A", "(", "\x00", "true", "::1", "de", "Not yet", "{}", "x" * 300],
    [0.5, 1.0, float("inf"), float("nan"), -1e300],
    [decimal.Decimal("1.10"), decimal.Decimal("NaN"), decimal.Decimal(10) ** 30],
    [MOMENT, dt.datetime(2009, 2, 7), dt.datetime.max, dt.datetime.min],
    [dt.date(2009, 2, 8), dt.date.max, dt.date.min],
    [dt.time(1, 30), dt.time.max],
    [dt.timedelta(days=-401), dt.timedelta.max],
    [uuid.UUID(int=2**128 - 1), uuid.UUID(int=1)],
    [b"", bytes(range(256))],
    [True, False, None],
]
families = st.sampled_from(FAMILIES).map(st.sampled_from)
scalars = st.one_of(*map(st.sampled_from, FAMILIES), st.text(max_size=3), st.integers())
values = st.one_of(
    scalars,
    scalars,
    st.lists(scalars, max_size=3),
    st.lists(scalars, min_size=2, max_size=2).map(tuple),
    st.just(("de", 1)),
    st.just({"d": "2024-01-01"}),
    st.just({1}),
    st.builds(lambda: F("rating")),
    st.builds(lambda: Value(1)),
    st.builds(lambda: Q(pk=1)),
    st.builds(lambda: Blog(pk=1)),
    st.builds(lambda: Blog()),
    st.builds(lambda: Author(pk=2, name="Ann")),
    st.builds(lambda: Blog.objects.filter(pk=1)),
    st.builds(lambda: Author.objects.values("pk")[:1]),
    st.builds(object),
)
joined = st.sampled_from(["filter", "exclude", "or", "or not", "xor", "both"])
ends: dict[str, Callable[..., Any]] = {
    "as it is": lambda it, x: it,
    "values": lambda it, x: it.values("pk"),
    "annotated": lambda it, x: it.annotate(annotated=Value(x)),
    "of a type": lambda it, x: it.annotate(annotated=Value(x, IntegerField())),
    "sum": lambda it, x: it.annotate(annotated=F("pk") + x),
    "case": lambda it, x: it.annotate(annotated=Case(When(pk=x, then=1), default=0)),
    "coalesced": lambda it, x: it.annotate(annotated=fn.Coalesce("pk", x)),
    "grouped": lambda it, x: it.values("pk").annotate(n=Count("pk", filter=Q(pk=x))),
    "having": lambda it, x: it.annotate(n=Count("pk")).filter(n__gte=x),
    "slice": lambda it, x: it[:x],
    "ordered": lambda it, x: it.order_by(x),
    "branched": lambda it, x: it if x else it.none(),
    "by type": lambda it, x: it.reverse() if isinstance(x, str) else it,
    "computed": lambda it, x: it.filter(pk=x * 2),
    "formatted": lambda it, x: it.filter(pk__in=[len(f"{x}")]),
    "several": lambda it, x: it.filter(pk__in=[1, x, 3]),
    "subquery": lambda it, x: it.filter(Exists(Blog.objects.filter(pk=x))),
    "union": lambda it, x: it.union(it.model.objects.filter(pk=x)),
    "extra": lambda it, x: it.extra(where=["%s::text = '1'"], params=[x]),
}


def build(model: Any, conditions: list[tuple[str, str]], end: str) -> Callable[[Any, Any], Any]:
    def function(x: Any, y: Any) -> Any:
        queryset = model.objects.all()
        for argument, (lookup, way) in zip((x, y), conditions, strict=False):
            condition = Q(**{lookup: argument})
            if way == "both":
                queryset = queryset.filter(condition, **{lookup: x})
            elif way in ("filter", "exclude"):
                queryset = getattr(queryset, way)(condition)
            elif way == "or not":
                queryset = queryset.filter(Q(pk=1) | ~condition)
            else:
                queryset = queryset.filter(
                    Q(pk=1) | condition if way == "or" else Q(pk=1) ^ condition
                )
        return ends[end](queryset, y)

    return function


@st.composite
def functions(draw: Any) -> Any:
    model = draw(st.sampled_from(list(LOOKUPS)))
    condition = st.tuples(st.sampled_from(LOOKUPS[model]), joined)
    end = draw(st.one_of(st.just("as it is"), st.sampled_from(list(ends))))
    return build(model, draw(st.lists(condition, min_size=1, max_size=2)), end)


@st.composite
def calls(draw: Any) -> list[Any]:
    """Of arguments that are mostly of the same types from call to call, so that what was compiled is used again."""
    family = draw(st.one_of(families, families, st.just(values)))
    other = draw(
        st.one_of(families, st.just(st.lists(family, min_size=1, max_size=2)), st.just(values))
    )
    argument = st.one_of(family, family, family, values)
    another = st.one_of(other, other, other, values)
    call = st.tuples(st.sampled_from(list(METHODS)), argument, another)
    same_operation = st.tuples(st.just(LIST), argument, another)
    return draw(st.lists(st.one_of(same_operation, call), min_size=3, max_size=6))


@given(functions(), calls())
@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_prepared_and_plain_give_the_same(
    filled: None, folded: None, served: IOLoop, function: Callable[..., Any], calls: list[Any]
) -> None:
    compared = Compared(served, function)
    for operation, x, y in calls:
        compared.check(operation, x=x, y=y)
