from __future__ import annotations

import asyncio
import contextlib
import tracemalloc
from typing import Any

import pytest
from django.db import transaction
from django.db.utils import DatabaseError, ProgrammingError

from tests.app.models import Blog
from tests.database import Watcher, opened, until
from tornjango import green
from tornjango.db import pools
from tornjango.db.engines.base import Lease, Stream

SERIES = "select i, i * 2 as twice from generate_series(1, %s) i"


async def begin() -> Lease:
    return await pools.get("default").begin()


async def open_stream(sql: str = SERIES, params: Any = (7,)) -> Stream:
    return await pools.get("default").stream(sql, params)


async def cursors(lease: Lease) -> int:
    return len((await lease.execute("select 1 from pg_cursors")).rows)


def in_use() -> int:
    used: int = pools.status()["default"]["in_use"]
    return used


# A query of its own


@pytest.mark.gen_test
async def test_rows_come_as_they_are_asked_for_and_the_connection_comes_back(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=1):
        stream = await open_stream()
        assert await stream.fetch(3) == [(1, 2), (2, 4), (3, 6)]
        assert [column[0] for column in stream.description or ()] == ["i", "twice"]
        assert in_use() == 1
        assert await stream.fetch(100) == [(4, 8), (5, 10), (6, 12), (7, 14)]
        assert await stream.fetch(100) == await stream.fetch(1) == []
        await stream.close()
        assert in_use() == 0
        await stream.close()
    assert not watcher.rows("select 1 from pg_stat_activity where state like 'idle in%'")


@pytest.mark.gen_test
async def test_a_query_without_rows_has_columns_all_the_same(database: None) -> None:
    async with opened():
        stream = await open_stream("select 1 as one where false", None)
        assert await stream.fetch(10) == []
        assert [column[0] for column in stream.description or ()] == ["one"]
        await stream.close()


@pytest.mark.gen_test
async def test_percent_signs_are_only_escapes_where_there_are_parameters(database: None) -> None:
    async with opened():
        for sql, params, value in [
            ("select 'a%%b'", None, "a%%b"),
            ("select 'a%%b'", (), "a%b"),
            ("select %s || '%%'", ["a"], "a%"),
            ("select %(x)s || '%%'", {"x": "a"}, "a%"),
        ]:
            stream = await open_stream(sql, params)
            assert await stream.fetch(10) == [(value,)]
            await stream.close()


@pytest.mark.gen_test
async def test_what_is_no_query_is_refused_and_costs_no_connection(database: None) -> None:
    async with opened(POOL_SIZE=1):
        for sql in ("nonsense", "insert into app_blog (name) values ('a') returning id"):
            with pytest.raises(ProgrammingError):
                await open_stream(sql, None)
        await until(lambda: in_use() == 0)


@pytest.mark.gen_test
async def test_what_a_query_writes_is_kept_when_it_is_closed_and_not_when_it_fails(
    database: None, watcher: Watcher
) -> None:
    watcher.rows(
        "create or replace function note_blog(i int) returns int language sql "
        "as $$ insert into app_blog (name) values ('blog ' || i) returning 1 / (5 - i) $$"
    )
    try:
        async with opened(POOL_SIZE=1):
            stream = await open_stream("select note_blog(i) from generate_series(1, 9) i", None)
            assert len(await stream.fetch(2)) == 2
            await stream.close()
            assert watcher.rows("select count(*) from app_blog") == [(2,)]
            stream = await open_stream("select note_blog(i) from generate_series(1, 9) i", None)
            await stream.fetch(3)
            with pytest.raises(DatabaseError, match="division by zero"):
                await stream.fetch(3)
            await stream.close()
            assert in_use() == 0
            assert watcher.rows("select count(*) from app_blog") == [(2,)]
    finally:
        watcher.rows("drop function note_blog")


@pytest.mark.gen_test
async def test_a_cancelled_fetch_ends_on_the_server_and_the_connection_comes_back(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=1):
        stream = await open_stream("select pg_sleep(60)", None)
        task = asyncio.create_task(stream.fetch(1))
        await until(lambda: watcher.running("FETCH"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await stream.close()
        assert in_use() == 0
        assert not watcher.running("FETCH")


@pytest.mark.gen_test
async def test_a_stream_cancelled_while_it_opens_costs_no_connection(database: None) -> None:
    async with opened(POOL_SIZE=1):
        for turns in range(30):
            task = asyncio.create_task(open_stream())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await (await task).close()
        await until(lambda: in_use() == 0)


@pytest.mark.gen_test
async def test_an_abandoned_stream_gives_its_connection_back_in_the_background(
    database: None,
) -> None:
    async with opened(POOL_SIZE=1):
        stream = await open_stream()
        await stream.fetch(1)
        stream.abandon()
        stream.abandon()
        await until(lambda: in_use() == 0)
        await stream.close()


# In a transaction


@pytest.mark.gen_test
async def test_streams_and_statements_take_turns_in_a_transaction(database: None) -> None:
    async with opened(POOL_SIZE=1):
        lease = await begin()
        await lease.execute("insert into app_blog (name) values ('mine')")
        blogs = await lease.stream("select name from app_blog")
        numbers = await lease.stream(SERIES, [3])
        assert await numbers.fetch(1) == [(1, 2)]
        assert (await lease.execute("select 1")).rows == [(1,)]
        assert await blogs.fetch(5) == [("mine",)]
        assert await numbers.fetch(5) == [(2, 4), (3, 6)]
        assert await cursors(lease) == 2
        await blogs.close()
        await numbers.close()
        await numbers.close()
        assert await cursors(lease) == 0
        await lease.commit()


@pytest.mark.gen_test
async def test_closing_a_stream_leaves_a_failed_transaction_to_its_rollback(
    database: None,
) -> None:
    async with opened(POOL_SIZE=1):
        lease = await begin()
        await lease.execute("savepoint before")
        stream = await lease.stream(SERIES, [3])
        with pytest.raises(ProgrammingError):
            await lease.execute("nonsense")
        await stream.close()
        await lease.execute("rollback to savepoint before")
        assert (await lease.execute("select 1")).rows == [(1,)]
        await lease.rollback()
        lease = await begin()
        stream = await lease.stream(SERIES, [3])
        await lease.rollback()
        await stream.close()


@pytest.mark.gen_test
async def test_closing_a_stream_that_a_savepoint_took_along_harms_nothing(
    database: None,
) -> None:
    async with opened(POOL_SIZE=1):
        lease = await begin()
        await lease.execute("savepoint before")
        stream = await lease.stream(SERIES, [3])
        await lease.execute("rollback to savepoint before")
        await stream.close()
        assert (await lease.execute("select 1")).rows == [(1,)]
        await lease.commit()


@pytest.mark.gen_test
async def test_a_stream_abandoned_in_a_transaction_ends_with_it(database: None) -> None:
    async with opened(POOL_SIZE=1):
        lease = await begin()
        stream = await lease.stream(SERIES, [3])
        stream.abandon()
        assert (await lease.execute("select 1")).rows == [(1,)]
        await lease.commit()
        async with pools.get("default").leased() as lease:
            assert await cursors(lease) == 0


# In green code


@pytest.mark.gen_test
async def test_an_iterator_of_djangos_is_a_server_side_cursor(database: None) -> None:
    def work() -> tuple[int, int, int]:
        blogs = Blog.objects.order_by("pk").iterator(chunk_size=2)
        first = next(blogs).pk
        holding = in_use()
        del blogs
        with transaction.atomic():
            total = sum(1 for _ in Blog.objects.iterator(chunk_size=2))
        return first, holding, total

    async with opened(POOL_SIZE=2):
        await Blog.objects.abulk_create([Blog(name=str(number)) for number in range(5)])
        first, holding, total = await green.run(work)
        assert (first > 0, holding, total) == (True, 1, 5)
        assert in_use() == 0


@pytest.mark.gen_test
async def test_many_rows_take_the_memory_of_a_few(database: None) -> None:
    async with opened(POOL_SIZE=1):
        stream = await open_stream(SERIES, [100_000])
        await stream.fetch(2000)
        tracemalloc.start()
        total = 2000
        while rows := await stream.fetch(2000):
            total += len(rows)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        await stream.close()
    assert total == 100_000
    assert peak < 2_000_000
