from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import transaction
from django.db.models import Prefetch
from django.db.transaction import TransactionManagementError
from django.db.utils import DataError, ProgrammingError

from tests.app.models import Blog, Entry, Tag
from tests.database import Watcher, opened, picture, until
from tests.postgres import Postgres
from tornjango import db, green
from tornjango.db import pools

pytestmark = pytest.mark.usefixtures("database")


@pytest.fixture
def watcher(postgres: Postgres) -> Iterator[Watcher]:
    watcher = Watcher(postgres.dsn("tornjango"))
    yield watcher
    watcher.close()


@pytest.fixture
def blogs() -> list[Blog]:
    tags = [Tag.objects.create(slug=slug) for slug in ("a", "b")]
    blogs = [Blog.objects.create(name=str(number)) for number in range(7)]
    for blog in blogs:
        for number in range(2):
            Entry.objects.create(blog=blog, title=f"{blog.name}.{number}").tag.set(tags)
    return blogs


def in_use() -> int:
    return int(pools.status()["default"]["in_use"])


async def streamed(queryset: Any, **options: Any) -> list[Any]:
    return [item async for item in db.stream(queryset, **options)]


QUERYSETS = {
    "objects": lambda: Blog.objects.order_by("pk"),
    "values": lambda: Blog.objects.order_by("-pk", "entries__pk").values("name", "entries__title"),
    "flat": lambda: Blog.objects.order_by("pk").values_list("name", flat=True),
    "raw": lambda: Blog.objects.raw("select *, id + %s as more from app_blog order by id", [1]),
    "raw with prefetch": lambda: Blog.objects.raw(
        "select * from app_blog order by id"
    ).prefetch_related("entries"),
    "related": lambda: Entry.objects.select_related("blog").order_by("pk"),
    "prefetch": lambda: Blog.objects.order_by("pk").prefetch_related(
        "entries__tag", Prefetch("entries", Entry.objects.filter(title__endswith="0"), "firsts")
    ),
    "none": lambda: Blog.objects.none(),
    "no rows": lambda: Blog.objects.filter(name="x"),
    "slice": lambda: Blog.objects.order_by("pk")[2:5],
    "union": lambda: (
        Blog.objects.filter(name="1").union(Blog.objects.filter(name="2")).order_by("name")
    ),
}


def test_it_gives_what_iterating_gives(blogs: list[Blog], io_loop: Any) -> None:
    expected = {name: picture(list(make())) for name, make in QUERYSETS.items()}

    async def check(chunk_size: int) -> None:
        for name, make in QUERYSETS.items():
            assert picture(await streamed(make(), chunk_size=chunk_size)) == expected[name], name
            async with db.atomic():
                inside = await streamed(make(), chunk_size=chunk_size)
                assert picture(inside) == expected[name], name
            assert in_use() == 0

    async def main() -> None:
        async with opened(POOL_SIZE=1):
            for chunk_size in (1, 3, 7, 2000):
                await check(chunk_size)

    io_loop.run_sync(main)


@pytest.mark.gen_test
async def test_one_connection_does_it_all(blogs: list[Blog]) -> None:
    async with opened(POOL_SIZE=1):
        queryset = Blog.objects.order_by("pk").prefetch_related("entries__tag")
        async for blog in db.stream(queryset, chunk_size=3):
            assert in_use() == 1
            assert [len(entry.tag.all()) for entry in blog.entries.all()] == [2, 2]
        assert in_use() == 0


@pytest.mark.slow
def test_a_million_rows_take_little_memory() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.stream_memory"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=Path(__file__).parent.parent,
        env=dict(os.environ),
    )
    assert run.returncode == 0, run.stderr
    count, kibibytes, _ = run.stdout.split()
    assert int(count) == 1_000_000
    assert int(kibibytes) < 16 * 1024


@pytest.mark.gen_test
async def test_leaving_early_gives_the_connection_back(blogs: list[Blog], watcher: Watcher) -> None:
    async def breaks() -> None:
        async for _ in db.stream(Blog.objects.all(), chunk_size=2):
            assert in_use() == 1
            break

    async def returns() -> Blog | None:
        async for blog in db.stream(Blog.objects.all(), chunk_size=2):
            return blog
        return None

    async def fails() -> None:
        async for _ in db.stream(Blog.objects.all(), chunk_size=2):
            raise ZeroDivisionError

    async with opened(POOL_SIZE=1):
        await breaks()
        await until(lambda: in_use() == 0)
        assert await returns()
        await until(lambda: in_use() == 0)
        with pytest.raises(ZeroDivisionError):
            await fails()
        await until(lambda: in_use() == 0)
        async with aclosing(db.stream(Blog.objects.all(), chunk_size=2)) as items:
            await anext(items)
        await until(lambda: in_use() == 0)
        assert await Blog.objects.acount() == 7
    assert watcher.rows("select 1 from pg_stat_activity where state like 'idle in%%'") == []


@pytest.mark.gen_test
async def test_cancelled_it_is_ended_on_the_server(watcher: Watcher) -> None:
    async with opened(POOL_SIZE=1):
        sleepy = Blog.objects.raw("select 1 as id, pg_sleep(60)")
        task = asyncio.create_task(streamed(sleepy))
        await until(lambda: watcher.running("FETCH"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: in_use() == 0)
        assert await db.query("select 1") == [(1,)]


@pytest.mark.gen_test
async def test_cancelled_while_its_reader_does_something_else_it_is_ended_too(
    blogs: list[Blog],
) -> None:
    reading = asyncio.Event()

    async def read() -> None:
        async for _ in db.stream(Blog.objects.all(), chunk_size=1):
            reading.set()
            await asyncio.Event().wait()

    async with opened(POOL_SIZE=1):
        task = asyncio.create_task(read())
        await reading.wait()
        assert in_use() == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: in_use() == 0)


@pytest.mark.gen_test
async def test_errors_are_raised_and_end_it(blogs: list[Blog]) -> None:
    async with opened(POOL_SIZE=1):
        with pytest.raises(ProgrammingError):
            await streamed(Blog.objects.extra(where=["nothing"]))
        with pytest.raises(DataError):
            await streamed(
                Blog.objects.order_by("pk").extra(select={"x": "1 / (3 - name::int)"}),
                chunk_size=1,
            )
        with pytest.raises(AttributeError, match="Cannot find 'nothing'"):
            await streamed(Blog.objects.prefetch_related("nothing"))
        with pytest.raises(ValueError, match="chunk_size"):
            await streamed(Blog.objects.all(), chunk_size=0)
        with pytest.raises(TypeError, match="not str"):
            db.stream("select 1")  # type: ignore[call-overload]
        with pytest.raises(TransactionManagementError, match="select_for_update"):
            await streamed(Blog.objects.select_for_update())
        await until(lambda: in_use() == 0)


@pytest.mark.gen_test
async def test_between_rows_its_transaction_is_nobodys(blogs: list[Blog]) -> None:
    async with opened():
        async for blog in db.stream(Blog.objects.order_by("pk"), chunk_size=2):
            assert green.current() is None
            # Committed at once, and not seen by the stream.
            await Blog.objects.filter(pk__gt=blog.pk).aupdate(name="changed")
            assert blog.name != "changed"
            tasks = [asyncio.create_task(Blog.objects.acount()) for _ in range(3)]
            assert await asyncio.gather(*tasks) == [7, 7, 7]
        assert await Blog.objects.filter(name="changed").acount() == 6


@pytest.mark.gen_test
async def test_another_task_may_read_on(blogs: list[Blog]) -> None:
    async with opened(POOL_SIZE=1):
        items = db.stream(Blog.objects.order_by("pk"), chunk_size=2)
        names = [(await asyncio.create_task(anext(items))).name for _ in range(7)]
        assert names == [str(number) for number in range(7)]
        with pytest.raises(StopAsyncIteration):
            await asyncio.create_task(_next(items))
        assert in_use() == 0


async def _next(items: Any) -> Any:
    return await anext(items)


@pytest.mark.gen_test
async def test_in_a_transaction_it_sees_what_is_not_committed(blogs: list[Blog]) -> None:
    async with opened(POOL_SIZE=1):
        async with db.atomic():
            await Blog.objects.acreate(name="new")
            names = []
            async for blog in db.stream(Blog.objects.order_by("pk"), chunk_size=2):
                names.append(blog.name)
                await Blog.objects.filter(pk=blog.pk).aupdate(name="seen")
            assert names == [*map(str, range(7)), "new"]
            assert await db.query("select name from pg_cursors") == []
            async with aclosing(db.stream(Blog.objects.all(), chunk_size=2)) as items:
                await anext(items)
            assert await db.query("select name from pg_cursors") == []
            async for _ in db.stream(Blog.objects.all(), chunk_size=2):
                break
            assert await Blog.objects.filter(name="seen").acount() == 8
        assert await Blog.objects.filter(name="seen").acount() == 8


@pytest.mark.gen_test
async def test_it_ends_with_the_transaction_that_it_began_in(blogs: list[Blog]) -> None:
    async with opened(POOL_SIZE=1):
        items = db.stream(Blog.objects.all(), chunk_size=2)
        async with db.atomic():
            await anext(items)
            await anext(items)
        with pytest.raises(TransactionManagementError, match="not open any more"):
            await anext(items)
        async with db.atomic():
            await Blog.objects.acount()
            with pytest.raises(TransactionManagementError, match="another task's"):
                await asyncio.create_task(streamed(Blog.objects.all()))


@pytest.mark.gen_test
async def test_using_names_the_database(own_postgres: Postgres) -> None:
    own_postgres.psql(
        "truncate app_blog cascade; insert into app_blog values (1, 'own')", "tornjango"
    )
    async with opened():
        [first] = [blog async for blog in db.using("own").stream(Blog.objects.all())]
        [second] = await streamed(Blog.objects.all(), using="own")
        assert (first.name, first._state.db) == (second.name, second._state.db) == ("own", "own")


def test_where_pools_are_not_open_it_is_the_callers_connection(blogs: list[Blog]) -> None:
    async def main() -> dict[str, Any]:
        return {
            name: picture(await streamed(make(), chunk_size=3)) for name, make in QUERYSETS.items()
        }

    async def first() -> Any:
        async with aclosing(db.stream(Blog.objects.order_by("pk"), chunk_size=2)) as items:
            return (await anext(items)).name

    with transaction.atomic():
        Blog.objects.create(name="not committed")
        expected = {name: picture(list(make())) for name, make in QUERYSETS.items()}
        assert async_to_sync(main)() == expected
        assert async_to_sync(first)() == "0"
        transaction.set_rollback(True)
