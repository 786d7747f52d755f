from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core.management import call_command
from django.db import connections
from django.db.models import Count
from django.db.utils import IntegrityError, OperationalError

from tests.app.models import Author, Blog, Entry
from tests.database import differences, fill, opened, picture
from tornjango import db
from tornjango.db import pools
from tornjango.db.compiler import unevaluated


@pytest.fixture
def sqlite(database: None) -> Iterator[None]:
    call_command("migrate", database="sqlite", run_syncdb=True, verbosity=0, interactive=False)
    blog = Blog.objects.using("sqlite").create(name="sqlite")
    Entry.objects.using("sqlite").create(blog=blog, title="one 100%")
    yield
    Blog.objects.using("sqlite").all().delete()
    connections["sqlite"].close()


QUERYSETS: list[Any] = [
    Entry.objects.using("sqlite").select_related("blog"),
    Entry.objects.using("sqlite").values("title", n=Count("tag")),
    Entry.objects.using("sqlite").filter(title__contains="%"),
    Entry.objects.using("sqlite").none(),
    Entry.objects.using("sqlite").prefetch_related("tag"),
    Blog.objects.using("sqlite").raw(
        "select id, name, 1 as one from app_blog where name = %s", ["sqlite"]
    ),
    Blog.objects.using("sqlite").raw("select id, name from app_blog").prefetch_related("entries"),
]


@pytest.mark.gen_test
async def test_sqlite_gives_what_iterating_would_give(sqlite: None) -> None:
    async with opened():
        assert pools.status()["sqlite"] == {"engine": "threads"}
        for queryset in QUERYSETS:
            fetched = await db.fetch(queryset)
            assert queryset._result_cache is None
            expected = await sync_to_async(list[Any])(unevaluated(queryset, "sqlite"))
            assert picture(fetched) == picture(expected)


@pytest.mark.gen_test
async def test_raw_sql_and_its_errors_on_sqlite(sqlite: None) -> None:
    async with opened():
        own = db.using("sqlite")
        rows = await own.query("select name, '%%' from app_blog where name = %s", ["sqlite"])
        assert (rows, rows.columns[0]) == ([("sqlite", "%")], "name")
        assert (await own.query("update app_blog set name = 'x'")).rowcount == 1
        with pytest.raises(OperationalError):
            await own.query("select nothing from app_blog")
        with pytest.raises(IntegrityError):
            await own.query("insert into app_blog (id) values (99)")


@pytest.mark.gen_test
async def test_queries_run_in_another_thread_than_the_loops(sqlite: None) -> None:
    threads: list[Any] = []
    async with opened():
        await pools.get("sqlite").open()

        def note(execute: Any, *args: Any) -> Any:
            threads.append(threading.current_thread())
            return execute(*args)

        def wrap() -> Any:
            wrapper = connections["sqlite"].execute_wrapper(note)
            wrapper.__enter__()
            return wrapper

        wrapper = await sync_to_async(wrap)()
        await db.fetch(Author.objects.using("sqlite").all())
        await sync_to_async(wrapper.__exit__)(None, None, None)
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


def test_postgresql_through_threads_gives_the_same(database: None) -> None:
    fill()

    def fetch(queryset: Any) -> list[Any]:
        async def run() -> list[Any]:
            async with opened(ENGINES={"default": "threads"}):
                assert pools.status()["default"] == {"engine": "threads"}
                return await db.fetch(queryset)

        return asyncio.run(run())

    # Prefetched objects compare by their caches, which a thread's connection fills the same way.
    assert differences(fetch) == {}
