"""Transactions that several tasks share, and tasks that share a context."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from typing import Any

import pytest
from django.db import transaction
from django.db.transaction import TransactionManagementError

from tests.app.models import Blog
from tests.database import Watcher, opened, until
from tests.test_db_query import blogs, respond, watcher  # noqa: F401
from tornjango import db, green
from tornjango.db.atomic import shared_atomic

SLEEPS = "select pg_sleep(60) /* shared */"


async def names() -> set[str]:
    """What others see, who are in no transaction."""
    seen: set[str] = await asyncio.create_task(_names(), context=contextvars.Context())
    return seen


async def _names() -> set[str]:
    return {blog.name for blog in await db.fetch(Blog.objects.all())}


@pytest.mark.gen_test
async def test_callbacks_in_one_context_have_transactions_of_their_own(database: None) -> None:
    """They are tasks that run in turns, in the context of their response."""
    async with opened():
        response, failures = respond()

        def create(name: str) -> None:
            with transaction.atomic():
                Blog.objects.create(name=name)
                Blog.objects.create(name=name)
                if name == "no":
                    transaction.set_rollback(True)

        async def callback(rows: Any) -> None:
            for name in ("yes", "no") * 5:
                await green.run(create, name)
                async with db.atomic():
                    await Blog.objects.acreate(name=name)
                    if name == "no":
                        await asyncio.sleep(0)
                        transaction.set_rollback(True)

        def start() -> list[Any]:
            return [db.execute_async(Blog.objects.none(), callback) for _ in range(5)]

        await asyncio.gather(*response.context.run(start))
        assert failures == []
        assert await Blog.objects.filter(name="yes").acount() == 75
        assert await Blog.objects.filter(name="no").acount() == 0


@pytest.mark.gen_test
async def test_the_tasks_of_a_shared_transaction_are_in_it(database: None) -> None:
    async def callback(rows: list[Any], done: asyncio.Event) -> None:
        await Blog.objects.acreate(name="callback")
        done.set()

    async def request() -> None:
        done = asyncio.Event()
        async with shared_atomic(["default"]):
            await Blog.objects.acreate(name="own")
            await asyncio.gather(*(Blog.objects.acreate(name=str(i)) for i in range(5)))
            rows = await asyncio.gather(*(db.fetch(Blog.objects.all()) for _ in range(3)))
            assert [len(some) for some in rows] == [6, 6, 6]
            assert await db.query("select count(*) from app_blog") == [(6,)]
            task = asyncio.create_task(callback([], done))
            await done.wait()
            await task
            assert await Blog.objects.acount() == 7
            assert await names() == set()
            raise ZeroDivisionError

    async with opened():
        with pytest.raises(ZeroDivisionError):
            await request()
        assert await names() == set()


@pytest.mark.gen_test
async def test_a_task_in_an_atomic_block_of_its_own_is_not_disturbed(database: None) -> None:
    async def rolls_back(name: str) -> None:
        with contextlib.suppress(KeyError):
            async with db.atomic():
                await Blog.objects.acreate(name=name)
                await asyncio.sleep(0)
                raise KeyError

    async def creates(name: str) -> None:
        for _ in range(3):
            await Blog.objects.acreate(name=name)

    async with opened():
        async with shared_atomic(["default"]):
            await asyncio.gather(rolls_back("a"), creates("b"), rolls_back("c"), creates("d"))
        assert await names() == {"b", "d"}
        assert await Blog.objects.acount() == 6


@pytest.mark.gen_test
async def test_a_task_that_a_block_of_its_own_would_wait_for_is_refused(database: None) -> None:
    """It would wait for the block, and the block for it."""
    async with opened(), shared_atomic(["default"]):
        async with db.atomic():
            with pytest.raises(TransactionManagementError, match="another task's"):
                await asyncio.gather(Blog.objects.acount())
            assert await Blog.objects.acount() == 0

        def code() -> Any:
            return green.wait(asyncio.gather(Blog.objects.acount()))

        with pytest.raises(TransactionManagementError, match="another task's"):
            await green.run(code)


@pytest.mark.gen_test
async def test_what_is_in_hand_at_the_end_is_waited_for_and_what_comes_later_is_apart(
    database: None,
) -> None:
    go = asyncio.Event()

    async def stray(begun: asyncio.Event) -> None:
        async with db.atomic():
            await Blog.objects.acreate(name="in hand")
            begun.set()
            await asyncio.sleep(0.01)
            await Blog.objects.acreate(name="in hand")
        await go.wait()
        await Blog.objects.acreate(name="later")

    async with opened():
        begun = asyncio.Event()
        async with shared_atomic(["default"]):
            task = asyncio.create_task(stray(begun))
            await begun.wait()
        assert await names() == {"in hand"}
        go.set()
        await task
        assert await names() == {"in hand", "later"}


@pytest.mark.gen_test
async def test_cancelled_it_rolls_back_and_cancels_whom_it_waits_for(
    database: None,
    watcher: Watcher,  # noqa: F811
) -> None:
    strays: list[asyncio.Task[Any]] = []

    async def request() -> None:
        async with shared_atomic(["default"]):
            await Blog.objects.acreate(name="no")
            strays.append(asyncio.create_task(_here(SLEEPS)))
            strays.append(asyncio.create_task(_here("select 1")))
            await until(lambda: watcher.running("shared"))

    async with opened():
        task = asyncio.create_task(request())
        await until(lambda: watcher.running("shared"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        ends = await asyncio.gather(*strays, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends)
        await until(lambda: not watcher.running("shared"))
        assert await names() == set()
        assert not watcher.rows("select 1 from pg_stat_activity where state ~ 'in transaction'")


async def _here(sql: str) -> Any:
    return await db.query(sql)


@pytest.mark.gen_test
async def test_streams_and_statements_of_several_tasks_take_turns(database: None) -> None:
    async def counts() -> int:
        return len([blog async for blog in db.stream(Blog.objects.all(), chunk_size=3)])

    async def iterates() -> int:
        return len([blog async for blog in Blog.objects.aiterator(chunk_size=3)])

    async def queries() -> int:
        for _ in range(10):
            async with db.atomic():
                await Blog.objects.filter(name="0").aupdate(name="0")
        return 20

    async with opened(), shared_atomic(["default"]):
        await Blog.objects.abulk_create([Blog(name=str(number)) for number in range(20)])
        work = (counts(), queries(), counts(), iterates(), queries())
        assert await asyncio.gather(*work) == [20] * 5


@pytest.mark.gen_test
async def test_a_stream_ends_with_the_shared_transaction(database: None) -> None:
    async with opened():
        async with shared_atomic(["default"]):
            await Blog.objects.abulk_create([Blog(name="a"), Blog(name="b")])
            stream = db.stream(Blog.objects.all(), chunk_size=1)
            assert (await anext(stream)).name == "a"
        with pytest.raises(TransactionManagementError, match=r"db\.stream\(\) began"):
            await anext(stream)
