"""Django's connection over an engine, as in test_db_connection.py, where the database is SQLite."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.core.management import call_command
from django.core.management.color import no_style
from django.db import connections, transaction
from django.db.backends.signals import connection_created
from django.db.backends.sqlite3.base import DatabaseFeatures
from django.db.models import Count, prefetch_related_objects
from django.db.transaction import TransactionManagementError
from django.db.utils import IntegrityError, NotSupportedError, OperationalError, ProgrammingError
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

from tests.app.models import Author, Blog, Entry, Tag
from tests.database import opened
from tornjango import db, green
from tornjango.db import pools

blogs = Blog.objects.using("sqlite")
entries = Entry.objects.using("sqlite")
tags = Tag.objects.using("sqlite")


@pytest.fixture(autouse=True)
def _sqlite(database: None) -> Iterator[None]:
    call_command("migrate", database="sqlite", run_syncdb=True, verbosity=0, interactive=False)
    yield
    for queryset in (entries, blogs, tags, Author.objects.using("sqlite")):
        queryset.all().delete()
    connections["sqlite"].close()


async def in_pool(fn: Callable[[], Any], **options: Any) -> Any:
    """What green code gives over pools that are open for it."""
    async with opened(**options):
        result = await green.run(fn)
        assert pools.status()["sqlite"]["in_use"] == 0
        return result


def atomic(**options: Any) -> Any:
    return transaction.atomic("sqlite", **options)


@contextmanager
def fails() -> Iterator[None]:
    """An atomic block with an error at its end."""
    with pytest.raises(ZeroDivisionError), atomic():  # noqa: PT012
        yield
        _fail()


def names() -> list[str]:
    return list(blogs.order_by("pk").values_list("name", flat=True))


@pytest.mark.gen_test
async def test_blocks_and_savepoints_commit_and_roll_back() -> None:
    def code() -> list[str]:
        with atomic():
            blogs.create(name="outer")
            with fails():
                blogs.create(name="lost")
            with pytest.raises(IntegrityError), atomic():
                tags.bulk_create([Tag(slug="x"), Tag(slug="x")])
            with atomic():
                blogs.create(name="inner")
        with fails():
            blogs.create(name="lost")
        return names()

    assert await in_pool(code) == ["outer", "inner"]
    assert await asyncio.to_thread(_closing, names) == ["outer", "inner"]


@pytest.mark.gen_test
async def test_an_error_makes_a_block_unusable_until_it_is_left() -> None:
    def code() -> list[str]:
        tags.create(slug="x")
        with atomic(), pytest.raises(IntegrityError), atomic(), atomic(savepoint=False):
            tags.create(slug="x")
        with atomic():
            with pytest.raises(ZeroDivisionError), atomic(savepoint=False):
                _fail()
            with pytest.raises(TransactionManagementError):
                names()
            transaction.set_rollback(True, using="sqlite")
        return names()

    assert await in_pool(code) == []


@pytest.mark.gen_test
async def test_hooks_run_after_the_commit_and_only_then() -> None:
    seen: list[Any] = []

    async def later() -> None:
        seen.append(await blogs.acount())

    def code() -> None:
        with atomic():
            blogs.create(name="a")
            transaction.on_commit(lambda: seen.append(names()), using="sqlite")
            transaction.on_commit(later, using="sqlite")
            with fails():
                transaction.on_commit(lambda: seen.append("never"), using="sqlite")
            assert seen == []

    await in_pool(code)
    assert seen == [["a"], 1]


@pytest.mark.gen_test
async def test_iterating_while_writing() -> None:
    def code() -> list[str]:
        blogs.bulk_create(Blog(name=str(number)) for number in range(30))
        for blog in blogs.order_by("pk").iterator(chunk_size=10):
            blog.name += "!"
            blog.save()
        with atomic():
            for blog in blogs.order_by("pk").iterator(chunk_size=10):
                blogs.filter(pk=blog.pk).update(name=f"{blog.name}!")
        return names()

    assert await in_pool(code, POOL_SIZE=1) == [f"{number}!!" for number in range(30)]


@pytest.mark.gen_test
async def test_what_the_orm_does_beside_reading() -> None:
    def code() -> None:
        blog, created = blogs.get_or_create(name="a")
        assert created
        assert blogs.get_or_create(name="a") == (blog, False)
        updated, created = blogs.update_or_create(pk=blog.pk, defaults={"name": "b"})
        assert (updated.name, created) == ("b", False)
        entry = entries.create(blog=blog, title="100%")
        authors = [Author.objects.using("sqlite").create(name=name) for name in "xyz"]
        entry.authors.set(authors)
        entry.authors.remove(authors[0])
        entry.tag.add(tags.create(slug="one"))
        entry.tag.create(slug="two")
        assert entries.filter(tag__slug="two", authors__name="y").get() == entry
        assert entries.annotate(n=Count("authors", distinct=True)).get().n == 2
        assert list(blogs.filter(entries__title__contains="%")) == [blog]
        fetched = list(entries.prefetch_related("authors", "tag").select_related("blog"))
        assert [author.name for author in fetched[0].authors.all()] == ["y", "z"]
        assert fetched[0].blog.name == "b"
        prefetch_related_objects(fetched, "blog__entries")
        blog.delete()
        assert not entries.exists()

    await in_pool(code)


@pytest.mark.skipif(
    not isinstance(DatabaseFeatures.max_query_params, property),
    reason="before Django 6 the limit was a number that Django knew",
)
@pytest.mark.gen_test
async def test_more_parameters_than_sqlite_takes_in_one_statement() -> None:
    def lower(connection: Any, **kwargs: Any) -> None:
        if connection.vendor == "sqlite":
            connection.connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 20)

    def code() -> None:
        assert connections["sqlite"].features.max_query_params == 20
        made = blogs.bulk_create([Blog(name=str(number)) for number in range(100)])
        assert len(blogs.in_bulk([blog.pk for blog in made])) == 100
        assert blogs.count() == 100

    connection_created.connect(lower)
    try:
        await in_pool(code)
    finally:
        connection_created.disconnect(lower)


@pytest.mark.gen_test
async def test_the_limit_of_parameters_is_known_before_the_first_statement() -> None:
    def code() -> Any:
        return connections["sqlite"].features.max_query_params

    expected = await asyncio.to_thread(_closing, code)
    assert await in_pool(code) == expected > 900


@pytest.mark.gen_test
async def test_async_transactions_and_djangos_async_methods() -> None:
    async with opened():
        own = db.using("sqlite")
        async with db.atomic("sqlite"):
            blog = await blogs.acreate(name="a")
            with pytest.raises(ZeroDivisionError):
                await _fail_inside(own)
            assert await own.fetch(blogs.all()) == [blog]
            assert await blogs.acount() == 1
        assert [blog.name async for blog in blogs.all()] == ["a"]
        assert pools.status()["sqlite"]["in_use"] == 0


async def _fail_inside(own: Any) -> None:
    async with db.atomic("sqlite"):
        await own.query("insert into app_blog (name) values ('lost')")
        _fail()


@pytest.mark.gen_test
async def test_many_writers_at_once() -> None:
    def code(number: int) -> None:
        with atomic():
            blog = blogs.create(name=str(number))
            green.wait(asyncio.sleep(0))
            with atomic():
                entries.create(blog=blog, title=str(number))

    async with opened(POOL_SIZE=4):
        await asyncio.gather(*(green.run(code, number) for number in range(30)))
        assert await entries.acount() == 30
        assert pools.status()["sqlite"]["in_use"] == 0


@pytest.mark.gen_test
async def test_a_cancelled_block_is_rolled_back() -> None:
    slow = "select * from (with recursive t(i) as (select 1 union all select i from t) select count(*) from t)"

    def code() -> None:
        with atomic():
            blogs.create(name="lost")
            with connections["sqlite"].cursor() as cursor:
                started.set()
                cursor.execute(slow)

    started = asyncio.Event()
    async with opened(POOL_SIZE=1):
        task = asyncio.create_task(green.run(code))
        await started.wait()
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await blogs.acount() == 0


@pytest.mark.gen_test
async def test_cursors_and_the_log_of_queries() -> None:
    def code() -> list[str]:
        connection = connections["sqlite"]
        with CaptureQueriesContext(connection) as captured:
            with connection.cursor() as cursor:
                cursor.execute("insert into app_blog (name) values (%s)", ["it's 100%"])
                assert (cursor.rowcount, cursor.description) == (1, None)
                with pytest.raises(ProgrammingError, match="no results"):
                    cursor.fetchone()
                cursor.executemany("insert into app_blog (name) values (%s)", [["b"], ["c"]])
                assert cursor.rowcount == 2
                cursor.execute("select name from app_blog where name > %(n)s", {"n": "a"})
                assert (cursor.fetchone(), cursor.fetchall()) == (("it's 100%",), [("b",), ("c",)])
            with atomic():
                names()
        return [query["sql"] for query in captured.captured_queries]

    logged = await in_pool(code)
    assert logged[0] == "insert into app_blog (name) values ('it''s 100%')"
    assert logged[2] == "select name from app_blog where name > 'a'"
    assert (logged[3], logged[-1], len(logged)) == ("BEGIN", "COMMIT", 6)


@pytest.mark.gen_test
async def test_under_debug_each_statement_is_logged_once() -> None:
    with override_settings(DEBUG=True):
        async with opened(POOL_SIZE=1):
            await green.run(names)
            log = pools.get("sqlite").wrapper.queries_log
            assert [entry["sql"][:6] for entry in log] == ["SELECT"]


@pytest.mark.gen_test
async def test_constraints_are_checked_at_the_latest_by_the_commit() -> None:
    def code() -> None:
        with pytest.raises(IntegrityError), atomic():
            entries.create(blog_id=99, title="of no blog")
        with atomic():
            entry = entries.create(blog_id=99, title="of no blog")
            with pytest.raises(IntegrityError, match="invalid foreign key"):
                connections["sqlite"].check_constraints()
            entry.delete()
        assert not entries.exists()

    await in_pool(code)


@pytest.mark.gen_test
async def test_constraints_stay_on_for_every_connection_of_the_pool() -> None:
    def code() -> None:
        connection: Any = connections["sqlite"]
        assert not connection.disable_constraint_checking()
        with connection.constraint_checks_disabled():
            pass
        with pytest.raises(NotSupportedError, match="foreign key"), connection.schema_editor():
            pass

    async with opened(POOL_SIZE=3):
        engine = pools.get("sqlite")
        await green.run(code)
        leases = [await engine.begin() for _ in range(3)]
        for lease in leases:
            assert (await lease.execute("pragma foreign_keys")).rows == [(1,)]
            await lease.rollback()


@pytest.mark.gen_test
async def test_loading_and_flushing() -> None:
    def code() -> None:
        connection: Any = connections["sqlite"]
        tables = connection.introspection.table_names()
        assert {"app_blog", "app_entry"} <= set(tables)
        blogs.create(name="a")
        sql = connection.ops.sql_flush(no_style(), ["app_blog", "app_entry"], allow_cascade=True)
        connection.ops.execute_sql_flush(sql)
        assert not blogs.exists()
        connection.close()
        assert not blogs.exists()

    await in_pool(code)


@pytest.mark.gen_test
async def test_a_database_in_memory_is_one_for_all_green_code() -> None:
    settings = {**connections.settings["sqlite"], "NAME": ":memory:"}
    before, connections.settings["sqlite"] = connections.settings["sqlite"], settings

    def make() -> None:
        with connections["sqlite"].cursor() as cursor:
            cursor.execute("create table app_blog (id integer primary key, name text)")

    def add(name: str) -> None:
        with atomic():
            blogs.create(name=name)

    try:
        async with opened():
            await green.run(make)
            await asyncio.gather(*(green.run(add, name) for name in "abc"))
            assert sorted(await green.run(names)) == ["a", "b", "c"]
            assert await blogs.acount() == 3
    finally:
        connections.settings["sqlite"] = before


@pytest.mark.gen_test
async def test_a_locked_database_is_an_error_that_names_it() -> None:
    settings = {**connections.settings["sqlite"], "OPTIONS": {"timeout": 0.05}}
    before, connections.settings["sqlite"] = connections.settings["sqlite"], settings
    try:
        async with opened(POOL_SIZE=2):
            async with pools.get("sqlite").leased() as lease:
                await lease.execute("insert into app_blog (name) values ('first')")
                with pytest.raises(OperationalError, match="locked"):
                    await blogs.acreate(name="second")
            assert await green.run(names) == []
    finally:
        connections.settings["sqlite"] = before


def _fail() -> None:
    raise ZeroDivisionError


def _closing(fn: Callable[[], Any]) -> Any:
    try:
        return fn()
    finally:
        connections.close_all()
