from __future__ import annotations

import asyncio
import threading
import unittest
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from asgiref.sync import SyncToAsync, async_to_sync
from django.db import connection, connections, transaction
from django.db.transaction import TransactionManagementError
from django.db.utils import InterfaceError
from django.test import TestCase, override_settings

from tests.app.models import Blog
from tornjango import db
from tornjango.conf import get_config
from tornjango.db import pools
from tornjango.db.engines.plain import PlainEngine
from tornjango.exceptions import Overloaded

pytestmark = pytest.mark.usefixtures("database")

INSERT = "insert into app_blog (name) values (%s)"


def engine() -> Any:
    return pools.get("default")


async def count() -> int:
    rows = (await engine().execute("select count(*) from app_blog")).rows
    return int(rows[0][0])


@asynccontextmanager
async def leased(name: str) -> AsyncIterator[Any]:
    """A transaction with a blog of that name in it."""
    async with engine().leased() as lease:
        await lease.execute(INSERT, [name])
        yield lease


def test_it_is_the_engine_where_the_pools_are_not_open() -> None:
    assert isinstance(engine(), PlainEngine)
    assert engine() is engine()
    assert engine().status() == {"engine": "plain"}
    assert pools.status() == {}


# In a transaction of the caller's


def in_transaction(test: Any) -> None:
    """Runs it as an async test of Django's TestCase runs: in a transaction, in the thread that began it."""
    with transaction.atomic():
        Blog.objects.create(name="outer")
        async_to_sync(test)()
        assert connection.in_atomic_block
        assert not connection.needs_rollback
        transaction.set_rollback(True)


def test_the_callers_transaction_is_met() -> None:
    async def test() -> None:
        assert await count() == 1
        assert await db.query("select name from app_blog") == [("outer",)]
        await engine().execute(INSERT, ["inner"])

    in_transaction(test)
    assert not Blog.objects.exists()


def test_a_transaction_in_it_is_a_savepoint() -> None:
    async def test() -> None:
        async with leased("kept") as lease:
            await lease.commit()
        async with leased("lost"):
            pass
        assert await count() == 2
        async with leased("outer one") as lease:
            async with leased("inner one"):
                assert await count() == 4
            assert await count() == 3
            await lease.commit()
        assert await count() == 3

    in_transaction(test)
    assert not Blog.objects.exists()


def test_a_stream_in_it_sees_what_was_done() -> None:
    async def test() -> None:
        stream = await engine().stream("select name from app_blog")
        assert await stream.fetch(10) == [("outer",)]
        await stream.close()

    in_transaction(test)


def test_a_statement_does_not_end_it() -> None:
    async def test() -> None:
        await engine().execute("select 1")
        await engine().execute("savepoint one")
        await engine().execute("rollback to savepoint one")
        assert await count() == 1

    in_transaction(test)


class AsyncTests(TestCase):
    """Run by a test below, for its class begins a transaction that pytest's fixtures know nothing of."""

    __test__ = False

    async def test_its_transaction_is_seen_and_rolled_back(self) -> None:
        await Blog.objects.acreate(name="a")
        async with leased("b") as lease:
            await lease.commit()
        assert await db.fetch(Blog.objects.order_by("name")) == [
            await Blog.objects.aget(name="a"),
            await Blog.objects.aget(name="b"),
        ]

    async def test_nothing_is_left_of_another_test(self) -> None:
        assert await count() == 0
        async with leased("never committed"):
            assert await count() == 1
        assert await count() == 0

    test_again = test_its_transaction_is_seen_and_rolled_back


def test_in_djangos_testcase_its_transaction_is_seen() -> None:
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(AsyncTests).run(result)
    assert (result.testsRun, result.errors, result.failures) == (3, [], [])


# Tasks


@pytest.mark.gen_test
async def test_transactions_of_tasks_wait_for_each_other() -> None:
    order: list[Any] = []

    async def work(name: str) -> None:
        async with leased(name) as lease:
            order.append(name)
            await asyncio.sleep(0.01)
            assert order[-1] == name
            if name != "lost":
                await lease.commit()

    await asyncio.gather(work("a"), work("lost"), work("b"))
    assert await db.query("select name from app_blog order by 1") == [("a",), ("b",)]


@pytest.mark.gen_test
async def test_waiting_for_another_tasks_transaction_has_an_end() -> None:
    with override_settings(TORNJANGO={"POOL_TIMEOUT": 0.05}):
        get_config.cache_clear()
        own = PlainEngine("default")
        async with own.leased():
            with pytest.raises(Overloaded):
                await asyncio.create_task(own.begin())
    async with own.leased():
        pass


@pytest.mark.gen_test
async def test_an_outer_transaction_is_not_committed_before_the_inner_one_has_ended() -> None:
    outer = await engine().begin()
    inner = await engine().begin()
    with pytest.raises(TransactionManagementError, match="inner"):
        await outer.commit()
    await inner.execute(INSERT, ["inner"])
    await inner.commit()
    await outer.commit()
    assert await count() == 1
    outer = await engine().begin()
    inner = await engine().begin()
    await inner.execute(INSERT, ["lost"])
    await outer.rollback()
    with pytest.raises(InterfaceError, match="has ended"):
        await inner.execute("select 1")
    await inner.rollback()
    assert await count() == 1


@pytest.mark.gen_test
async def test_an_abandoned_transaction_is_rolled_back_before_the_next_statement() -> None:
    for then in (count, _count_in_lease):
        lease = await engine().begin()
        await lease.execute(INSERT, ["lost"])
        lease.abandon()
        assert await then() == 0
    outer = await engine().begin()
    inner = await engine().begin()
    await inner.execute(INSERT, ["lost"])
    inner.abandon()
    assert (await outer.execute("select count(*) from app_blog")).rows == [(0,)]
    await outer.rollback()


async def _count_in_lease() -> int:
    async with engine().leased() as lease:
        rows = (await lease.execute("select count(*) from app_blog")).rows
    return int(rows[0][0])


# Cancellation


@pytest.mark.gen_test
async def test_a_cancelled_statement_runs_to_its_end_before_the_next() -> None:
    task = asyncio.create_task(engine().execute(f"{INSERT[:-12]} select 'a' from pg_sleep(0.1)"))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await count() == 1


@pytest.mark.gen_test
async def test_a_cancelled_beginning_leaves_no_transaction() -> None:
    await count()
    for turns in range(8):
        task = asyncio.create_task(engine().begin())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            await task.result().rollback()
        assert not await asyncio.to_thread(_in_transaction_of_the_thread)
        await engine().execute(INSERT, ["committed"])
    assert await count() == 8


def _in_transaction_of_the_thread() -> bool:
    future = SyncToAsync.single_thread_executor.submit(
        lambda: connections["default"].in_atomic_block
    )
    return bool(future.result())


@pytest.mark.gen_test
async def test_a_cancelled_commit_or_rollback_is_carried_to_its_end() -> None:
    for end, expected in (("commit", 1), ("rollback", 1)):
        lease = await engine().begin()
        await lease.execute(INSERT, ["a"])
        task = asyncio.create_task(getattr(lease, end)())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await count() == expected
        async with engine().leased():
            pass


@pytest.mark.gen_test
async def test_a_cancelled_stream_is_closed() -> None:
    task = asyncio.create_task(engine().stream("select pg_sleep(0.1)"))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await _open_cursors() == 0


@pytest.mark.gen_test
async def test_an_abandoned_stream_is_closed_whatever_thread_abandons_it() -> None:
    stream = await engine().stream("select name from app_blog")
    thread = threading.Thread(target=stream.abandon)
    thread.start()
    thread.join()
    async with asyncio.timeout(5):
        while await _open_cursors():
            continue


async def _open_cursors() -> int:
    rows = (await engine().execute("select count(*) from pg_cursors")).rows
    return int(rows[0][0])


# Loops


def test_each_event_loop_has_its_own_turns() -> None:
    async def abandon_nothing() -> None:
        lease = await engine().begin()
        await lease.execute(INSERT, ["a"])
        await lease.commit()

    for _ in range(3):
        asyncio.run(abandon_nothing())
    assert Blog.objects.count() == 3
