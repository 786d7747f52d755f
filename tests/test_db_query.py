from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar, copy_context
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.utils import ProgrammingError
from django.http import HttpRequest
from tornado.ioloop import IOLoop

from tests.app.models import Blog, Entry
from tests.database import Watcher, opened, until
from tests.postgres import Postgres
from tornjango import db
from tornjango.db import pools
from tornjango.responses import DeferredResponse, State, running

where: ContextVar[str] = ContextVar("where", default="nowhere")


class Driver:
    """Notes what a response asks for; what it asks for in these tests is to fail."""

    def __init__(self) -> None:
        self.failures: list[BaseException] = []

    def fail(self, exc: BaseException) -> None:
        self.failures.append(exc)


def respond() -> tuple[DeferredResponse, list[BaseException]]:
    driver = Driver()
    response = DeferredResponse(
        HttpRequest(),
        driver,  # type: ignore[arg-type]
        view_name="tests.view",
        context=copy_context(),
    )
    response.context.run(where.set, "the request")
    return response, driver.failures


async def outcome(register: Callable[[Callable[[Any], None]], object]) -> Any:
    """What the callback is called with that `register` is given."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    register(future.set_result)
    return await asyncio.wait_for(future, 5)


@pytest.fixture
def blogs(database: None) -> None:
    Blog.objects.bulk_create([Blog(name="a"), Blog(name="b")])


@pytest.fixture
def watcher(postgres: Postgres) -> Iterator[Watcher]:
    watcher = Watcher(postgres.dsn("tornjango"))
    yield watcher
    watcher.close()


# fetch


@pytest.mark.gen_test
async def test_fetch_leaves_the_queryset_as_it_was(blogs: None) -> None:
    async with opened():
        queryset = Blog.objects.order_by("pk")
        first, second = await db.fetch(queryset), await db.fetch(queryset)
        assert [blog.name for blog in first] == ["a", "b"]
        assert first[0] is not second[0]
        assert queryset._result_cache is None


def test_an_evaluated_queryset_is_not_queried_again(blogs: None, io_loop: IOLoop) -> None:
    queryset = Blog.objects.order_by("pk")
    objects = list(queryset)
    Blog.objects.all().delete()

    async def fetch() -> list[Blog]:
        async with opened():
            return await db.fetch(queryset)

    fetched = io_loop.run_sync(fetch)
    assert fetched is not queryset._result_cache
    assert [id(it) for it in fetched or []] == [id(it) for it in objects]


@pytest.mark.gen_test
async def test_fetched_rows_in_a_queryset_are_prefetched_for_once(blogs: None) -> None:
    async with opened():
        queryset = Blog.objects.prefetch_related("entries")
        queryset._result_cache = await db.fetch(Blog.objects.all())
        [blog, _] = await db.fetch(queryset)
        assert list(blog.entries.all()) == []


@pytest.mark.gen_test
async def test_only_querysets_are_fetched(database: None) -> None:
    with pytest.raises(TypeError, match=r"not EntryManager \(its .all\(\) is one\)"):
        await db.fetch(Entry.objects)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="not str"):
        db.execute_async("select 1", print)  # type: ignore[call-overload]


@pytest.mark.gen_test
async def test_cancelling_a_fetch_ends_it_on_the_server(database: None, watcher: Watcher) -> None:
    async with opened():
        sleepy = Blog.objects.raw("select 1 as id, pg_sleep(60)")
        task = asyncio.create_task(db.fetch(sleepy))
        await until(lambda: watcher.running("pg_sleep(60)"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not watcher.running("pg_sleep(60)"))


# execute_async


@pytest.mark.gen_test
async def test_the_callback_gets_the_rows_in_the_context_of_the_request(blogs: None) -> None:
    async with opened():
        response, failures = respond()
        seen: list[Any] = []

        def done(rows: list[Blog]) -> None:
            seen.append(([row.name for row in rows], where.get(), running()))
            where.set("changed by a callback")

        queryset = Blog.objects.order_by("pk")
        await response.context.run(db.execute_async, queryset, done)
        assert seen == [(["a", "b"], "the request", response)]
        assert response.context[where] == "changed by a callback"
        assert failures == []
    assert where.get() == "nowhere"


@pytest.mark.gen_test
async def test_a_callback_may_be_a_coroutine_function(blogs: None) -> None:
    async with opened():
        names: list[str] = []

        async def done(rows: list[Blog]) -> None:
            for row in rows:
                again = await db.fetch(Blog.objects.filter(pk=row.pk))
                names.append(again[0].name)

        await db.execute_async(Blog.objects.order_by("pk"), done)
        assert names == ["a", "b"]


@pytest.mark.gen_test
async def test_an_error_goes_to_on_error_or_else_fails_the_response(database: None) -> None:
    async with opened():
        wrong = Blog.objects.extra(where=["nothing"])
        response, failures = respond()
        caught: list[Exception] = []
        await response.context.run(db.execute_async, wrong, print, caught.append)
        assert isinstance(caught[0], ProgrammingError)
        assert failures == []
        await response.context.run(db.execute_async, wrong, print)
        assert [type(it) for it in failures] == [ProgrammingError]
        assert response.state is State.FAILED


@pytest.mark.gen_test
async def test_what_a_callback_raises_fails_the_response(database: None) -> None:
    def fail(value: Any) -> None:
        raise ValueError(value)

    async def fail_later(value: Any) -> None:
        raise KeyError(value)

    async with opened():
        for queryset, callback, on_error, error in [
            (Blog.objects.all(), fail, print, ValueError),
            (Blog.objects.all(), fail_later, print, KeyError),
            (Blog.objects.extra(where=["nothing"]), print, fail, ValueError),
        ]:
            response, failures = respond()
            await response.context.run(db.execute_async, queryset, callback, on_error)
            assert [type(it) for it in failures] == [error]


@pytest.mark.gen_test
async def test_without_a_request_errors_go_to_the_loops_exception_handler(database: None) -> None:
    contexts: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, it: contexts.append(it))
    async with opened():
        await db.execute_async(Blog.objects.extra(where=["nothing"]), print)
        await db.execute_async(Blog.objects.all(), lambda rows: rows[0])
        await outcome(lambda it: db.query("nonsense").add_callback(it).add_errback(it))
        db.query("nonsense").add_callback(print)
        await until(lambda: len(contexts) == 3)
    errors = [type(it["exception"]) for it in contexts]
    assert errors == [ProgrammingError, IndexError, ProgrammingError]


@pytest.mark.gen_test
async def test_a_client_that_leaves_ends_the_queries_of_its_request(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=2):
        response, failures = respond()
        sleepy = Blog.objects.raw("select 1 as id, pg_sleep(60)")
        called: list[Any] = []
        response.context.run(db.execute_async, sleepy, called.append, called.append)
        query = db.query("select pg_sleep(60)")
        response.context.run(query.add_callback, called.append)
        await until(lambda: len(watcher.running("pg_sleep(60)")) == 2)
        response.close()
        await until(lambda: not watcher.running("pg_sleep(60)"))
        await until(lambda: pools.status()["default"]["free"] == 2)
        assert (called, failures) == ([], [])


def test_in_a_thread_without_a_loop_the_error_says_what_to_do(database: None) -> None:
    with pytest.raises(RuntimeError, match="In a sync view, use the ORM"):
        db.execute_async(Blog.objects.all(), print)


# query


@pytest.mark.gen_test
async def test_a_query_gives_rows_as_often_as_it_is_awaited_and_is_sent_once(blogs: None) -> None:
    async with opened():
        query = db.query("insert into app_blog (name) values (%s) returning id, name", ["c"])
        first, second = await asyncio.gather(query, query)
        assert first is second is await query
        assert (first[0][1], first.columns, first.rowcount) == ("c", ["id", "name"], 1)
        assert await db.query("select count(*) from app_blog") == [(3,)]


@pytest.mark.gen_test
async def test_callbacks_get_the_rows_each_in_their_order(database: None) -> None:
    async with opened():
        seen: list[Any] = []
        query = db.query("select 1").add_callback(lambda rows: seen.append(("first", rows)))
        assert query.addCallback(lambda rows: seen.append(("second", rows))) is query
        assert query.add_errback(seen.append).addErrback(seen.append) is query
        assert await query == [(1,)]
        assert seen == [("first", [(1,)]), ("second", [(1,)])]
        assert await outcome(query.add_callback) == [(1,)]
        assert len(seen) == 2


@pytest.mark.gen_test
async def test_errbacks_get_the_error_instead(database: None) -> None:
    async with opened():
        response, failures = respond()
        seen: list[Any] = []
        query = db.query("nonsense")
        response.context.run(query.add_errback, seen.append)
        query.add_errback(seen.append).add_callback(print)
        with pytest.raises(ProgrammingError):
            await query
        assert [type(it) for it in seen] == [ProgrammingError] * 2
        assert failures == []
        assert isinstance(await outcome(query.add_errback), ProgrammingError)


@pytest.mark.gen_test
async def test_an_error_without_errback_fails_the_response_unless_it_is_awaited(
    database: None,
) -> None:
    async with opened():
        response, failures = respond()
        query = db.query("nonsense")
        response.context.run(query.add_callback, print)
        with pytest.raises(ProgrammingError):
            await query
        assert failures == []
        response.context.run(db.query("nonsense").add_callback, print)
        await until(lambda: failures)
        assert isinstance(failures[0], ProgrammingError)


@pytest.mark.gen_test
async def test_using_names_the_database(database: None, own_postgres: Postgres) -> None:
    own_postgres.psql(
        "truncate app_blog cascade; insert into app_blog values (1, 'own')", "tornjango"
    )
    async with opened():
        own = db.using("own")
        expected = [(1, "own")]
        assert await own.query("select id, name from app_blog") == expected
        assert await db.query("select id, name from app_blog", using="own") == expected
        assert await db.query("select id, name from app_blog") == []
        [blog] = await own.fetch(Blog.objects.all())
        assert (blog.name, blog._state.db) == ("own", "own")
        [blog] = await outcome(lambda it: own.execute_async(Blog.objects.all(), it))
        assert blog._state.db == "own"


def test_a_query_that_is_never_sent_is_warned_of() -> None:
    query = db.query("select 1")
    with pytest.warns(RuntimeWarning, match="never sent"):
        del query


# Without tornjango's server


def test_where_pools_are_not_open_the_callers_transaction_is_seen(
    database: None, error_log: list[logging.LogRecord]
) -> None:
    from asgiref.sync import async_to_sync

    async def ask() -> tuple[list[Blog], Any, list[Any]]:
        rows = await db.fetch(Blog.objects.all())
        called = await outcome(lambda it: db.execute_async(Blog.objects.all(), it))
        return rows, await db.query("select name from app_blog"), called

    with transaction.atomic():
        Blog.objects.create(name="not committed")
        rows, raw, called = async_to_sync(ask)()
        assert connection.in_atomic_block
        transaction.set_rollback(True)
    assert [blog.name for blog in rows] == ["not committed"]
    assert called == rows
    assert raw == [("not committed",)]
    assert Blog.objects.count() == 0
