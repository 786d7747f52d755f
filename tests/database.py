"""Rows to query, querysets to query them with, and what to compare their results by."""

from __future__ import annotations

import asyncio
import datetime as dt
import decimal
import os
import uuid
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import psutil
import psycopg2
from django.contrib.postgres.aggregates import ArrayAgg, JSONBAgg, StringAgg
from django.contrib.postgres.search import SearchHeadline, SearchQuery
from django.db.backends.postgresql.psycopg_any import DateRange, DateTimeTZRange, NumericRange
from django.db.models import (
    Count,
    F,
    FilteredRelation,
    Model,
    Prefetch,
    Q,
    QuerySet,
    Subquery,
    Sum,
    Value,
)
from django.db.models import functions as fn

from tests.app.models import Author, Blog, Draft, Entry, Everything, Place, Tag
from tornjango import db
from tornjango.conf import Config
from tornjango.db import pools

UTC = dt.UTC
PLUS_FIVE = dt.timezone(dt.timedelta(hours=5, minutes=30))


def engines() -> dict[str, Any]:
    """The settings that have the engine that TESTS_ENGINE names, if it does, for the databases of PostgreSQL."""
    engine = os.environ.get("TESTS_ENGINE")
    return {"ENGINES": {"default": engine, "own": engine}} if engine else {}


@asynccontextmanager
async def opened(**options: Any) -> AsyncIterator[None]:
    """Pools with these settings, closed at the end; PostgreSQL's of the engine that TESTS_ENGINE names, if it does."""
    pools.open(Config.from_dict({**engines(), **options}))
    try:
        yield
    finally:
        await pools.close()


def picture(value: Any, seen: tuple[Any, ...] = ()) -> Any:
    """What can be told about a result, to compare: types, attributes, and what Django has noted about an object."""
    if isinstance(value, Model):
        if any(value is it for it in seen):
            return "again"
        seen = (*seen, value)
        state = value._state
        attributes = {
            name: picture(it, seen) for name, it in vars(value).items() if name != "_state"
        }
        related = {name: picture(it, seen) for name, it in state.fields_cache.items()}
        return type(value), attributes, related, state.db, state.adding
    if isinstance(value, dict):
        return type(value), {key: picture(it, seen) for key, it in value.items()}
    if isinstance(value, (list, tuple)):
        fields = getattr(value, "_fields", None)
        return type(value).__name__, fields, [picture(it, seen) for it in value]
    if isinstance(value, QuerySet):
        return type(value), picture(value._result_cache, seen)
    if isinstance(value, memoryview):
        return memoryview, bytes(value)
    if isinstance(value, dt.datetime):
        return value, value.tzinfo
    return type(value), value


def fill() -> None:
    blogs = [Blog.objects.create(name=name) for name in ("Tornado", "Django")]
    authors = [Author.objects.create(name=name) for name in ("Ann", "Bob", "Čeněk", "100%")]
    tags = [Tag.objects.create(slug=slug) for slug in ("sport", "news", "python")]
    for number in range(12):
        entry = Entry.objects.create(
            blog=blogs[number % 2],
            editor=authors[number % 3] if number % 4 else None,
            title=f"Entry {number} at {number}%",
            body="'quoted' \\ %s {} \n" * number,
            pubdate=dt.datetime(2008 + number % 3, 1 + number, 7, 23, 30, tzinfo=UTC),
            rating=number % 5,
        )
        entry.authors.set(authors[: number % 4])
        entry.tag.set(tags[number % 3 :])
    Draft.objects.create(blog=blogs[0], title="Draft", reason="Not yet")
    Place.objects.bulk_create(
        Place(country=country, number=number, name=f"{country}{number}")
        for country in ("de", "fr")
        for number in range(2)
    )
    fill_everything()


def fill_everything() -> None:
    moment = dt.datetime(2024, 3, 31, 1, 30, 0, 123456, tzinfo=UTC)
    first = Everything.objects.create(
        big=2**63 - 1,
        binary=bytes(range(256)),
        boolean=True,
        char="ž 100% \\ ' \" \t",
        upper="Upper",
        date=dt.date(1, 1, 1),
        moment=moment,
        decimal=decimal.Decimal("-12345678901234.567890"),
        duration=-dt.timedelta(days=400, hours=5, microseconds=1),
        file="a/b.txt",
        floating=float("inf"),
        ip="2001:db8::1",
        integer=-(2**31),
        json={"a": [1, 2.5, None, True, {"ü": "\\u0000"}], "d": "2024-01-01"},
        small=-32768,
        text="\U0001f600" * 3,
        time=dt.time(23, 59, 59, 999999),
        url="http://example.com/",
        uuid=uuid.UUID(int=2**128 - 1),
        texts=["a,b", 'c"d', "", "NULL", "{}"],
        grid=[[1, None], [3, 4]],
        moments=[moment, moment.astimezone(PLUS_FIVE)],
        uuids=[uuid.UUID(int=1)],
        ips=["10.0.0.1", "::1"],
        decimals=[decimal.Decimal("1.10")],
        jsons=[{"a": 1}, [2], "three"],
        integers=NumericRange(1, 10),
        bigs=NumericRange(None, 2**40),
        numbers=NumericRange(decimal.Decimal("0.5"), decimal.Decimal("1.5"), "[]"),
        dates=DateRange(dt.date(2024, 1, 1), dt.date(2024, 2, 1)),
        period=DateTimeTZRange(moment, None),
    )
    Everything.objects.create(reference=first)
    Everything.objects.create(
        binary=b"",
        boolean=False,
        char="",
        json="text",
        texts=[],
        jsons=[],
        ip="10.1.2.3",
        integers=NumericRange(empty=True),
        duration=dt.timedelta(0),
        moment=dt.datetime(1900, 1, 1, tzinfo=PLUS_FIVE),
    )


def _published() -> Any:
    return Entry.objects.filter(pubdate__isnull=False)


QUERYSETS: dict[str, Callable[[], Any]] = {
    "all": lambda: Entry.objects.all(),
    "the message of 2009": lambda: Entry.objects.filter(pubdate__year=2009).exclude(
        tag__slug="sport"
    ),
    "pk": lambda: Entry.objects.filter(pk=1),
    "none": lambda: Entry.objects.none(),
    "in an empty list": lambda: Entry.objects.filter(pk__in=[]),
    "never": lambda: Entry.objects.filter(Q(pk__in=[]) & Q(rating=1)),
    "no rows": lambda: Entry.objects.filter(rating=-1),
    "percent": lambda: Entry.objects.filter(title__contains="1%"),
    "percent, no parameters": lambda: Entry.objects.extra(where=["title like '%%1%%'"]),
    "percent in an annotation": lambda: Entry.objects.annotate(sign=Value("100%")),
    "unicode": lambda: Author.objects.filter(name__istartswith="č"),
    "slice": lambda: Entry.objects.order_by("-rating", "pk")[2:7],
    "empty slice": lambda: Entry.objects.all()[3:3],
    "reverse": lambda: Entry.objects.reverse(),
    "distinct": lambda: Entry.objects.filter(tag__slug__in=["news", "python"]).distinct(),
    "distinct on": lambda: Entry.objects.order_by("blog", "-pk").distinct("blog"),
    "select_related": lambda: Entry.objects.select_related("blog", "editor"),
    "select_related, all": lambda: Entry.objects.select_related(),
    "select_related back": lambda: Entry.objects.select_related("draft"),
    "inherited": lambda: Draft.objects.select_related("blog"),
    "only": lambda: Entry.objects.only("title", "blog__name").select_related("blog"),
    "defer": lambda: Entry.objects.defer("body", "editor__email").select_related("editor"),
    "defer inherited": lambda: Draft.objects.defer("body"),
    "annotate": lambda: Entry.objects.annotate(n=Count("authors"), up=fn.Upper("title")),
    "group": lambda: Entry.objects.values("blog__name").annotate(n=Count("pk"), s=Sum("rating")),
    "having": lambda: Blog.objects.annotate(n=Count("entries")).filter(n__gt=3),
    "alias": lambda: Entry.objects.alias(n=Count("tag")).filter(n=1),
    "filtered relation": lambda: Blog.objects.annotate(
        good=FilteredRelation("entries", condition=Q(entries__rating=4))
    ).values("name", "good__title"),
    "subquery": lambda: Blog.objects.annotate(
        first=Subquery(Entry.objects.filter(blog=F("pk")).values("title")[:1])
    ),
    "in a subquery": lambda: Entry.objects.filter(blog__in=Blog.objects.filter(name="Django")),
    "values": lambda: Entry.objects.values(),
    "values of some": lambda: Entry.objects.values("title", "blog__name", n=Count("tag")),
    "values_list": lambda: Entry.objects.values_list("pk", "pubdate"),
    "values_list flat": lambda: Entry.objects.values_list("pubdate", flat=True),
    "values_list named": lambda: Entry.objects.values_list("pk", "blog__name", named=True),
    "values_list of an expression": lambda: Entry.objects.values_list(fn.Lower("title"), "pk"),
    "dates": lambda: Entry.objects.dates("pubdate", "year"),
    "datetimes": lambda: _published().datetimes("pubdate", "month", order="DESC"),
    "datetimes in a zone": lambda: _published().datetimes("pubdate", "hour", tzinfo=PLUS_FIVE),
    "union": lambda: Entry.objects.filter(rating=1).union(Entry.objects.filter(rating=2)),
    "union all, ordered": lambda: (
        Entry.objects.filter(rating=1)
        .union(Entry.objects.filter(rating__lt=3), all=True)
        .order_by("-title")[:5]
    ),
    "union with nothing": lambda: Entry.objects.none().union(Entry.objects.filter(rating=2)),
    "union of nothing": lambda: Entry.objects.none().union(Entry.objects.none()),
    "union of values": lambda: Blog.objects.values_list("name").union(
        Author.objects.values_list("name")
    ),
    "union of values, ordered by another": lambda: (
        Entry.objects.filter(rating=1)
        .union(Entry.objects.filter(rating=2))
        .order_by("pk")
        .values("title")
    ),
    "intersection": lambda: Entry.objects.filter(rating__gt=1).intersection(
        Entry.objects.filter(rating__lt=3)
    ),
    "difference": lambda: Entry.objects.difference(Entry.objects.filter(rating=1)),
    "or": lambda: Entry.objects.filter(rating=1) | Entry.objects.filter(rating=2),
    "and": lambda: Entry.objects.filter(rating=1) & Entry.objects.filter(blog__name="Django"),
    "extra": lambda: Entry.objects.extra(select={"twice": "rating * %s"}, select_params=[2]),
    "extra order": lambda: Entry.objects.extra(select={"d": "rating * 2"}).order_by("-d", "pk"),
    "extra values": lambda: Entry.objects.extra(select={"d": "rating * 2"}).values("d", "pk"),
    "distinct ordered by another table": lambda: (
        Entry.objects.order_by("blog__name").distinct().values_list("title")
    ),
    "ordered by what is not selected": lambda: Entry.objects.order_by(
        fn.Length("title").desc(), "pk"
    ).values("rating"),
    "related manager": lambda: Blog.objects.get(name="Django").entries.all(),
    "related manager, many": lambda: Author.objects.get(name="Ann").entries.filter(rating__gt=1),
    "custom manager": lambda: Entry.objects.published(),
    "deferred filter": lambda: Blog.objects.get(name="Django").entries.exclude(rating=1),
    "prefetch": lambda: Entry.objects.prefetch_related("authors", "tag"),
    "prefetch object": lambda: Blog.objects.prefetch_related(
        Prefetch("entries", Entry.objects.filter(rating=1), to_attr="ones")
    ),
    "prefetch and none": lambda: Entry.objects.none().prefetch_related("authors"),
    "raw": lambda: Entry.objects.raw("select * from app_entry order by id"),
    "raw with parameters": lambda: Entry.objects.raw(
        "select id, title, rating + 1 as more from app_entry where rating > %s", [2]
    ),
    "raw with names": lambda: Entry.objects.raw(
        "select id from app_entry where rating = %(rating)s", {"rating": 1}
    ),
    "raw with a percent": lambda: Entry.objects.raw(
        "select id, '100%%' as full from app_entry where title like %s", ["%1%"]
    ),
    "raw with a percent, no parameters": lambda: Entry.objects.raw(
        "select id, '100%%' as full from app_entry", []
    ),
    "raw with a percent, parameters of None": lambda: Entry.objects.raw(
        "select id, '100%' as full from app_entry", None
    ),
    "raw translated": lambda: Author.objects.raw(
        "select id, title as t from app_entry", translations={"t": "name"}
    ),
    "raw with converters": lambda: Everything.objects.raw("select * from app_everything"),
    "raw with prefetch": lambda: Entry.objects.raw("select * from app_entry").prefetch_related(
        "authors"
    ),
    "raw without rows": lambda: Entry.objects.raw("select * from app_entry where false"),
    "aggregates of PostgreSQL": lambda: Blog.objects.annotate(
        ids=ArrayAgg("entries__pk", ordering="entries__pk"),
        rated=JSONBAgg("entries__rating", ordering="entries__pk"),
        names=StringAgg("name", Value(", ")),
    ),
    "quoted by the driver": lambda: Entry.objects.annotate(
        headline=SearchHeadline("title", SearchQuery("entry"), start_sel="<i>", stop_sel="</i>")
    ),
    "everything": lambda: Everything.objects.all(),
    "everything, values": lambda: Everything.objects.values(),
    "everything, by a reference": lambda: Everything.objects.select_related("reference"),
    "part of JSON": lambda: Everything.objects.values_list("json__a", "json__a__4__ü"),
    "by JSON": lambda: Everything.objects.filter(json__contains={"d": "2024-01-01"}),
    "by JSON null": lambda: Everything.objects.filter(json__nothing__isnull=True),
    "by array": lambda: Everything.objects.filter(texts__contains=["a,b"]),
    "by empty array": lambda: Everything.objects.filter(texts=[]),
    "by range": lambda: Everything.objects.filter(integers__contains=3),
    "by range of dates": lambda: Everything.objects.filter(
        dates__overlap=DateRange(dt.date(2024, 1, 5), dt.date(2024, 1, 6))
    ),
    "by duration": lambda: Everything.objects.filter(duration__lt=dt.timedelta(0)),
    "by bytes": lambda: Everything.objects.filter(binary=bytes(range(256))),
    "by address": lambda: Everything.objects.filter(ip="2001:db8::1"),
    "by uuid": lambda: Everything.objects.filter(uuid=uuid.UUID(int=2**128 - 1)),
    "by decimal": lambda: Everything.objects.filter(decimal__lt=decimal.Decimal("0.5")),
    "by infinity": lambda: Everything.objects.filter(floating=float("inf")),
    "in a time zone": lambda: Everything.objects.annotate(
        hour=fn.ExtractHour("moment", tzinfo=PLUS_FIVE), day=fn.TruncDay("moment")
    ),
    "composite key": lambda: Place.objects.all(),
    "composite key, values": lambda: Place.objects.values_list("pk", "name"),
    "composite key, filter": lambda: Place.objects.filter(pk=("de", 1)),
    "a bad column": lambda: Entry.objects.extra(where=["nothing = 1"]),
    "a division by zero": lambda: Entry.objects.extra(where=["1 / (rating - rating) = 1"]),
    "a lock without a transaction": lambda: Entry.objects.select_for_update(),
    "a raw query without the key": lambda: Entry.objects.raw("select title from app_entry"),
    "a raw query with too few parameters": lambda: Entry.objects.raw("select %s, %s", [1]),
}


def outcome(evaluate: Callable[[Any], list[Any]], make: Callable[[], Any]) -> Any:
    """The picture of what it gives; for an error, its class and message."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        try:
            return picture(evaluate(make()))
        except Exception as exc:  # noqa: BLE001 - any error is an outcome
            return type(exc), str(exc), type(exc.__cause__)


def differences(evaluate: Callable[[Any], list[Any]]) -> dict[str, tuple[Any, Any]]:
    """The querysets that `evaluate` sees differently from `list`."""
    pairs = {name: (outcome(evaluate, it), outcome(list, it)) for name, it in QUERYSETS.items()}
    return {name: (got, expected) for name, (got, expected) in pairs.items() if got != expected}


class Watcher:
    """A connection of its own, to see from the outside what others do on a server."""

    def __init__(self, dsn: str) -> None:
        self._connection = psycopg2.connect(dsn)
        self._connection.autocommit = True

    def rows(self, sql: str, params: Any = None) -> list[Any]:
        with self._connection.cursor() as cursor:
            cursor.execute(sql, params)
            return cursor.fetchall() if cursor.description else []

    def running(self, part: str) -> list[int]:
        """The backends whose running statement has `part` in it."""
        sql = "select pid from pg_stat_activity where state = 'active' and position(%s in query) > 0 and pid <> pg_backend_pid()"
        return [pid for (pid,) in self.rows(sql, [part])]

    def terminate(self, pid: int) -> None:
        """Returns when the backend has gone."""
        process = psutil.Process(pid)
        self.rows("select pg_terminate_backend(%s)", [pid])
        psutil.wait_procs([process], timeout=5)
        assert not process.is_running()

    def close(self) -> None:
        self._connection.close()


async def until(condition: Callable[[], object]) -> None:
    """Returns when the condition holds; fails the test when it does not in time."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for is in another process
            await asyncio.sleep(0.005)


def start(sql: str, params: Any = None, alias: str = "default") -> asyncio.Task[Any]:
    return asyncio.create_task(pools.get(alias).execute(sql, params))


async def pid(alias: str = "default") -> int:
    rows = await db.query("select pg_backend_pid()", using=alias)
    return int(rows[0][0])


async def backends(watcher: Watcher, number: int, alias: str = "default") -> set[int]:
    """The processes behind `number` connections of a pool, in use at one time."""
    tasks = [start("select pg_sleep(60)", alias=alias) for _ in range(number)]
    await until(lambda: len(watcher.running("pg_sleep(60)")) == number)
    pids = set(watcher.running("pg_sleep(60)"))
    for task in tasks:
        task.cancel()
    await until(lambda: pools.status()[alias]["in_use"] == 0)
    return pids
