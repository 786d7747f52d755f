from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from contextvars import Context
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.db import DatabaseError, connection, connections, transaction
from django.db.transaction import TransactionManagementError
from django.db.utils import IntegrityError, OperationalError

from tests.app.models import Blog, Entry, Tag
from tests.database import Watcher, opened, until
from tests.postgres import Postgres
from tornjango import db, green
from tornjango.db import pools

pytestmark = pytest.mark.usefixtures("database")

ANOTHERS = r"another task's"


@pytest.fixture
def watcher(postgres: Postgres) -> Iterator[Watcher]:
    watcher = Watcher(postgres.dsn("tornjango"))
    yield watcher
    watcher.close()


async def names() -> list[str]:
    return [it async for it in Blog.objects.order_by("pk").values_list("name", flat=True)]


async def add(name: str) -> Blog:
    return await Blog.objects.acreate(name=name)


async def pid() -> int:
    return int((await db.query("select pg_backend_pid()"))[0][0])


@asynccontextmanager
async def fails(**options: Any) -> AsyncIterator[None]:
    """An atomic block with an error at its end."""
    try:
        async with db.atomic(**options):
            yield
            raise ZeroDivisionError
    except ZeroDivisionError:
        return
    raise AssertionError("The error was lost.")


def in_use() -> int:
    return int(pools.status()["default"]["in_use"])


def pid_of_code() -> int:
    with connection.cursor() as cursor:
        cursor.execute("select pg_backend_pid()")
        return int(cursor.fetchone()[0])


# Commit and rollback


@pytest.mark.gen_test
async def test_a_block_commits_or_rolls_back() -> None:
    async with opened():
        async with db.atomic():
            await add("kept")
        async with fails():
            await add("lost")
        assert await names() == ["kept"]
        assert in_use() == 0


@pytest.mark.gen_test
async def test_everything_in_a_block_is_on_its_connection() -> None:
    async def pids() -> set[int]:
        raw = Blog.objects.raw("select 1 as id, pg_backend_pid() as pid")
        found = {await pid(), await green.run(pid_of_code), (await db.fetch(raw))[0].pid}
        found |= {it.pid async for it in db.stream(raw)}
        sql = {"pid": "pg_backend_pid()"}
        found.add((await Blog.objects.extra(select=sql).aget()).pid)  # type: ignore[attr-defined]
        found |= {it.pid async for it in Blog.objects.extra(select=sql)}  # type: ignore[attr-defined]
        return found

    async with opened():
        await add("x")
        async with db.atomic():
            [own] = await pids()
            async with db.atomic():
                assert await pids() == {own}
            assert await _fresh(pid()) != own


@pytest.mark.gen_test
async def test_nested_blocks_are_savepoints() -> None:
    async with opened():
        async with db.atomic():
            await add("outer")
            with pytest.raises(IntegrityError):
                async with db.atomic():
                    await Tag.objects.abulk_create([Tag(slug="x"), Tag(slug="x")])
            async with db.atomic():
                await add("inner")
            await green.run(_nested)
        assert await names() == ["outer", "inner", "green"]


def _nested() -> None:
    with transaction.atomic():
        Blog.objects.create(name="green")
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        raise ZeroDivisionError


@pytest.mark.gen_test
async def test_savepoint_and_durable_are_djangos() -> None:
    async with opened():
        async with db.atomic(durable=True):
            await add("lost")
            async with fails(savepoint=False):
                pass
            with pytest.raises(TransactionManagementError, match="until the end of the 'atomic'"):
                await db.query("select 1")
            with pytest.raises(TransactionManagementError, match="until the end of the 'atomic'"):
                await Blog.objects.acount()
        async with db.atomic():
            with pytest.raises(RuntimeError, match="durable"):
                await db.atomic(durable=True).__aenter__()
            await add("kept")
        assert await names() == ["kept"]


@pytest.mark.gen_test
async def test_set_rollback_works_on_the_loop() -> None:
    async with opened():
        async with db.atomic():
            await add("lost")
            assert connection.in_atomic_block
            transaction.set_rollback(True)
        assert await names() == []


@pytest.mark.gen_test
async def test_a_decorated_function_is_a_block_each_time() -> None:
    @db.atomic()
    async def code(name: str, *, error: bool) -> str:
        """Adds."""
        await add(name)
        if error:
            raise ZeroDivisionError
        return name

    async with opened():
        assert code.__doc__ == "Adds."
        assert await code("kept", error=False) == "kept"
        with pytest.raises(ZeroDivisionError):
            await code("lost", error=True)
        await asyncio.gather(*(code(f"kept {number}", error=False) for number in range(5)))
        assert len(await names()) == 6


@pytest.mark.gen_test
async def test_another_database_is_another_transaction(own_postgres: Postgres) -> None:
    own_postgres.psql("truncate app_blog cascade", "tornjango")
    own = Blog.objects.using("own")
    async with opened():
        async with db.atomic():
            await add("kept")
            async with fails(using="own"):
                await own.acreate(name="lost")
                assert await db.using("own").query("select name from app_blog") == [("lost",)]
            await own.acreate(name="in autocommit")
        assert await names() == ["kept"]
        assert [it.name for it in await db.fetch(own.all())] == ["in autocommit"]


@pytest.mark.gen_test
async def test_fifty_blocks_at_once_some_rolled_back() -> None:
    async def work(number: int) -> None:
        async with db.atomic():
            await add(f"{number} outer")
            try:
                async with db.atomic():
                    await add(f"{number} inner")
                    assert await Blog.objects.filter(name__startswith=f"{number} ").acount() == 2
                    if number % 3 == 0:
                        raise ZeroDivisionError
            except ZeroDivisionError:
                await asyncio.sleep(0)
            if number % 5 == 0:
                raise ZeroDivisionError

    async with opened(POOL_SIZE=4):
        results = await asyncio.gather(*map(work, range(50)), return_exceptions=True)
        assert [number for number, it in enumerate(results) if it] == list(range(0, 50, 5))
        expected = {f"{n} outer" for n in range(50) if n % 5}
        expected |= {f"{n} inner" for n in range(50) if n % 5 and n % 3}
        assert set(await names()) == expected
        assert in_use() == 0


@pytest.mark.gen_test
async def test_two_at_once_never_share_a_transaction() -> None:
    both = asyncio.Barrier(2)

    async def work(name: str) -> list[str]:
        async with db.atomic():
            await add(name)
            await both.wait()
            seen = await names()
            await both.wait()
        return seen

    async with opened():
        assert await asyncio.gather(work("a"), work("b")) == [["a"], ["b"]]


@pytest.mark.gen_test
async def test_on_the_loop_sync_queries_are_refused_in_a_block_too() -> None:
    async with opened(), db.atomic():
        for refused in (lambda: list(Blog.objects.all()), connection.cursor, connection.savepoint):
            with pytest.raises(SynchronousOnlyOperation):
                refused()


# Whose it is


@pytest.mark.gen_test
async def test_another_task_may_not_use_it_while_it_is_open() -> None:
    results: list[Exception] = []

    async def stream() -> None:
        async for _ in db.stream(Blog.objects.all()):
            pass

    async with opened():
        async with db.atomic():
            await add("kept")
            works: list[Callable[[], Any]] = [
                lambda: db.fetch(Blog.objects.all()),
                lambda: Blog.objects.acount(),
                lambda: green.run(pid_of_code),
                pid,
                stream,
                lambda: db.atomic().__aenter__(),
                lambda: _atomic_in_task(),
            ]
            for work in works:
                with pytest.raises(TransactionManagementError, match=ANOTHERS):
                    await asyncio.create_task(work())
            for failed in await asyncio.gather(*(work() for work in works), return_exceptions=True):
                assert isinstance(failed, TransactionManagementError)
            await db.execute_async(Blog.objects.all(), print, results.append)
            db.query("select 1").add_callback(print).add_errback(results.append)
            await until(lambda: len(results) == 2)
            assert await names() == ["kept"]
        assert [type(it) for it in results] == [TransactionManagementError] * 2
        assert await names() == ["kept"]


async def _atomic_in_task() -> None:
    async with db.atomic():
        await add("never")


@pytest.mark.gen_test
async def test_another_database_is_free_to_other_tasks(own_postgres: Postgres) -> None:
    async with opened(), db.atomic():
        await add("x")
        await asyncio.create_task(Blog.objects.using("own").acount())


@pytest.mark.gen_test
async def test_a_task_begun_inside_is_free_when_the_block_has_ended() -> None:
    ended = asyncio.Event()

    async def outlives() -> list[str]:
        await ended.wait()
        async with db.atomic():
            await add("later")
        return await names()

    async with opened():
        async with db.atomic():
            await add("first")
            task = asyncio.create_task(outlives())
            await asyncio.sleep(0)
        ended.set()
        assert await task == ["first", "later"]


@pytest.mark.gen_test
async def test_a_time_out_around_a_query_in_the_same_task_is_no_other_task() -> None:
    async with opened(), db.atomic():
        async with asyncio.timeout(10):
            await add("x")
            assert await names() == ["x"]


# Hooks on commit


@pytest.mark.gen_test
async def test_hooks_run_after_the_commit_before_the_block_is_left() -> None:
    seen: list[Any] = []

    async def hook() -> None:
        seen.append(await Blog.objects.acount())
        async with db.atomic():
            await add("by the hook")
            transaction.on_commit(lambda: seen.append("inner"))

    async with opened():
        async with db.atomic():
            transaction.on_commit(lambda: seen.append("first"))
            transaction.on_commit(hook)
            async with db.atomic():
                await add("x")
                transaction.on_commit(lambda: seen.append("of a savepoint"))
            async with fails():
                transaction.on_commit(lambda: seen.append("never"))
            assert seen == []
        assert seen == ["first", 1, "inner", "of a savepoint"]
        async with fails():
            transaction.on_commit(lambda: seen.append("never"))
        assert await names() == ["x", "by the hook"]
        assert "never" not in seen


@pytest.mark.gen_test
async def test_a_hook_that_fails_is_raised_from_the_block_and_keeps_what_is_committed(
    error_log: list[logging.LogRecord],
) -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError

    async with opened():
        committing = db.atomic()
        await committing.__aenter__()
        await add("kept")
        transaction.on_commit(fail)
        with pytest.raises(ZeroDivisionError):
            await committing.__aexit__(None, None, None)
        async with db.atomic():
            await add("kept, too")
            transaction.on_commit(fail, robust=True)
        assert "fail" in error_log.pop().getMessage()
        assert await names() == ["kept", "kept, too"]


# Cancellation


class Stage:
    """A place in a block where it can be cancelled."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()

    async def __call__(self) -> None:
        self.reached.set()
        await asyncio.Event().wait()


async def cancelled_at(work: Callable[[Stage], Any]) -> None:
    stage = Stage()
    task = asyncio.ensure_future(work(stage))
    await asyncio.wait_for(stage.reached.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: in_use() == 0)


@pytest.mark.gen_test
async def test_a_block_that_is_cancelled_between_statements_rolls_back() -> None:
    async def before(stage: Stage) -> None:
        async with db.atomic():
            await stage()

    async def between(stage: Stage) -> None:
        async with db.atomic():
            await add("lost")
            await stage()

    async def nested(stage: Stage) -> None:
        async with db.atomic():
            await add("lost")
            async with db.atomic():
                await add("lost")
                await stage()

    def code(stage: Stage) -> Any:
        def block() -> None:
            with transaction.atomic(), transaction.atomic():
                Blog.objects.create(name="lost")
                green.wait(stage())

        return green.run(block)

    async with opened(POOL_SIZE=1):
        for work in (before, between, nested, code):
            await cancelled_at(work)
            assert await names() == []


@pytest.mark.gen_test
async def test_a_block_that_is_cancelled_in_a_statement_rolls_back(watcher: Watcher) -> None:
    async def on_the_loop() -> None:
        async with db.atomic():
            await add("lost")
            await db.query("select pg_sleep(60)")

    def block() -> None:
        with transaction.atomic():
            Blog.objects.create(name="lost")
            with transaction.atomic(), connection.cursor() as cursor:
                cursor.execute("select pg_sleep(60)")

    async with opened(POOL_SIZE=1):
        for work in (on_the_loop, lambda: green.run(block)):
            task = asyncio.ensure_future(work())
            await until(lambda: watcher.running("pg_sleep(60)"))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not watcher.running("pg_sleep(60)")
            assert await names() == []


@pytest.mark.gen_test
async def test_a_block_that_is_cancelled_while_it_waits_for_a_connection_leaves_the_queue() -> None:
    async def queued() -> None:
        async with db.atomic(), db.atomic():
            await add("never")

    async with opened(POOL_SIZE=1):
        async with db.atomic():
            await add("kept")
            # A context of its own: inside this one's, it would be refused.
            tasks = [_fresh(queued()) for _ in range(3)]
            await until(lambda: pools.status()["default"]["waiting"] == 3)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(it) for it in results] == [asyncio.CancelledError] * 3
            assert pools.status()["default"]["waiting"] == 0
        assert await names() == ["kept"]


def _fresh(work: Any) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(work, context=Context())


DEFERRED = """
    create or replace function sleep_at_commit() returns trigger as
    $$ begin perform pg_sleep(%s); return null; end $$ language plpgsql;
    drop trigger if exists slow_commit on app_tag;
    create constraint trigger slow_commit after insert on app_tag
    deferrable initially deferred for each row execute function sleep_at_commit()
"""


@pytest.fixture
def slow_commit(watcher: Watcher) -> Iterator[None]:
    """A commit takes a while when a tag was added."""
    watcher.rows(DEFERRED % 0.3)
    yield
    watcher.rows("drop trigger slow_commit on app_tag; drop function sleep_at_commit()")


async def cancel_in_commit(work: Any, watcher: Watcher, times: int = 1) -> None:
    task = asyncio.ensure_future(work)
    await until(lambda: watcher.running("COMMIT"))
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.gen_test
@pytest.mark.parametrize("times", [1, 2])
async def test_a_commit_is_finished_hooks_and_all_and_the_cancellation_raised_after(
    slow_commit: None, watcher: Watcher, times: int
) -> None:
    seen: list[str] = []

    async def later() -> None:
        await asyncio.sleep(0)
        seen.append("async")

    async def on_the_loop() -> None:
        async with db.atomic():
            await Tag.objects.acreate(slug="loop")
            transaction.on_commit(lambda: seen.append("sync"))
            transaction.on_commit(later)
        seen.append("never")

    def block() -> None:
        with transaction.atomic():
            Tag.objects.create(slug="green")
            transaction.on_commit(lambda: seen.append("green"))

    async with opened(POOL_SIZE=1):
        await cancel_in_commit(on_the_loop(), watcher, times)
        assert seen == ["sync", "async"]
        await cancel_in_commit(green.run(block), watcher, times)
        assert seen == ["sync", "async", "green"]
        assert await Tag.objects.acount() == 2


@pytest.mark.gen_test
async def test_a_hook_is_finished_too() -> None:
    seen: list[str] = []
    started, gate = asyncio.Event(), asyncio.Event()

    async def hook() -> None:
        started.set()
        await gate.wait()
        seen.append(f"{await Blog.objects.acount()} there")

    async def work() -> None:
        async with db.atomic():
            await add("kept")
            transaction.on_commit(hook)
            transaction.on_commit(lambda: seen.append("after"))

    async with opened(POOL_SIZE=1):
        task = asyncio.ensure_future(work())
        await started.wait()
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert seen == ["1 there", "after"]


@pytest.mark.gen_test
async def test_cancelled_twice_it_is_rolled_back_once(watcher: Watcher) -> None:
    async def work() -> None:
        async with db.atomic():
            await add("lost")
            await db.query("select pg_sleep(60)")

    async with opened(POOL_SIZE=1):
        task = asyncio.ensure_future(work())
        await until(lambda: watcher.running("pg_sleep(60)"))
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        assert task.cancelled()
        assert await names() == []


@pytest.mark.gen_test
async def test_a_time_out_around_a_nested_block_leaves_the_outer_one_usable(
    watcher: Watcher,
) -> None:
    async def sleeps_in_time() -> None:
        async with asyncio.timeout(0.05), db.atomic():
            await add("lost")
            await db.query("select pg_sleep(60)")

    async with opened(POOL_SIZE=1):
        async with db.atomic():
            await add("outer")
            with pytest.raises(TimeoutError):
                await sleeps_in_time()
            assert not watcher.running("pg_sleep(60)")
            await add("after")
        assert await names() == ["outer", "after"]


@pytest.mark.gen_test
async def test_cancelled_at_any_moment_a_nested_block_leaves_the_outer_one_usable() -> None:
    """Stops it at every turn of the loop that it takes, the savepoint's own statements included."""

    async def nested(turns: int) -> bool:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        pending: list[asyncio.Handle] = []

        def count(left: int) -> None:
            if left:
                pending.append(loop.call_soon(count, left - 1))
            else:
                task.cancel()

        count(turns)
        try:
            async with db.atomic():
                await add("nested")
        except asyncio.CancelledError:
            task.uncancel()
            return False
        finally:
            for handle in pending:
                handle.cancel()
        return True

    finished, stopped = 0, 0
    async with opened(POOL_SIZE=1):
        for turns in [*range(1, 40), 100, 200, 400, 800, 100_000]:
            async with db.atomic():
                await add("before")
                if await nested(turns):
                    finished += 1
                else:
                    stopped += 1
                assert len(connection.savepoint_ids) == 0
                await add("after")
        assert finished
        assert stopped > 10
        everything = await names()
        turns_taken = finished + stopped
        assert (everything.count("before"), everything.count("after")) == (turns_taken,) * 2
        assert everything.count("nested") >= finished


# Trouble


@pytest.mark.gen_test
async def test_a_connection_that_is_lost_takes_its_transaction_along(watcher: Watcher) -> None:
    async def in_block(*, caught: bool) -> None:
        async with db.atomic():
            await add("lost")
            watcher.terminate(await pid())
            if caught:
                with pytest.raises(OperationalError):
                    await names()

    async with opened(POOL_SIZE=1):
        for caught in (True, False):
            with pytest.raises(DatabaseError):
                await in_block(caught=caught)
            assert await names() == []
        async with db.atomic():
            await add("kept")
        assert await names() == ["kept"]


@pytest.mark.gen_test
async def test_an_error_while_the_connection_is_lost_stays_the_error(watcher: Watcher) -> None:
    async with opened(POOL_SIZE=1):
        async with fails():
            await add("lost")
            watcher.terminate(await pid())
        assert await names() == []


@pytest.mark.gen_test
async def test_a_commit_that_the_server_refuses_is_raised_and_rolled_back(
    watcher: Watcher,
) -> None:
    async with opened(POOL_SIZE=1):
        with pytest.raises(IntegrityError):
            async with db.atomic():
                # Foreign keys are checked at the commit.
                await Entry.objects.acreate(blog_id=4711, title="x")
        assert await Entry.objects.acount() == 0


@pytest.mark.gen_test
async def test_nothing_of_a_block_is_kept() -> None:
    class Thing:
        pass

    async def work(thing: Thing) -> None:
        try:
            async with db.atomic():
                await names()
                raise ZeroDivisionError(thing)
        except ZeroDivisionError:
            pass

    async with opened():
        await work(Thing())
        gc.collect()
        gc.disable()
        try:
            thing = Thing()
            gone = weakref.ref(thing)
            await work(thing)
            del thing
            assert gone() is None
        finally:
            gc.enable()


# Without tornjango's server


def test_where_pools_are_not_open_it_is_the_callers_connection() -> None:
    async def ask() -> list[str]:
        async with db.atomic():
            await add("kept")
            async with fails():
                await add("lost")
            assert len(await db.fetch(Blog.objects.all())) == 2
            assert await db.query("select count(*) from app_blog") == [(2,)]
        return await names()

    with transaction.atomic():
        Blog.objects.create(name="not committed")
        assert async_to_sync(ask)() == ["not committed", "kept"]
        assert connection.in_atomic_block
        transaction.set_rollback(True)
    assert Blog.objects.count() == 0


def test_where_pools_are_not_open_hooks_run_too_on_the_callers_connection() -> None:
    seen: list[Any] = []

    async def hook() -> None:
        seen.append(await Blog.objects.acount())

    async def work() -> None:
        async with db.atomic():
            await add("x")
            transaction.on_commit(lambda: seen.append("sync"))
            async with db.atomic():
                transaction.on_commit(hook)
                assert connection.in_atomic_block
            async with fails():
                transaction.on_commit(lambda: seen.append("never"))
            with pytest.raises(SynchronousOnlyOperation):
                Blog.objects.count()
            assert seen == []
        assert seen == ["sync", 1]
        async with db.atomic():
            await add("lost")
            transaction.set_rollback(True)

    async_to_sync(work)()
    asyncio.run(work_alone(seen))
    assert seen == ["sync", 1, "alone"]
    assert [blog.name for blog in Blog.objects.all()] == ["x"]


async def work_alone(seen: list[Any]) -> None:
    async with db.atomic():
        transaction.on_commit(lambda: seen.append("alone"))
        await Blog.objects.acount()
    await sync_to_async(connections.close_all)()
