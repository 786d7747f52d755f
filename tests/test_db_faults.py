"""What queries and transactions can rely on when things go wrong, whatever the engine: promises, each beside its fault.

The engines are the one that Django's driver for PostgreSQL decides (psycopg where psycopg 3 is installed, else momoko), and
the one that runs Django's own connections in threads; ``TESTS_ENGINE`` names a single one.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest
from django.db import connections, transaction
from django.db.backends.postgresql.psycopg_any import is_psycopg3
from django.db.transaction import TransactionManagementError
from django.db.utils import (
    DatabaseError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    ProgrammingError,
)
from django.http import HttpRequest, HttpResponse
from django.urls import path
from tornado.ioloop import IOLoop

from tests.app.models import Blog
from tests.database import Watcher, backends, engines, opened, pid, start, until
from tests.postgres import Postgres
from tests.proxy import Proxy
from tests.serving import serving
from tornjango import DeferredResponse, db, green
from tornjango.conf import Config
from tornjango.db import pools
from tornjango.db.engines import base
from tornjango.db.engines.base import Lease
from tornjango.exceptions import Overloaded
from tornjango.testing import RawClient
from tornjango.views import green as as_green

#: How many are cancelled at random; 10,000 takes about a minute.
CANCELLATIONS = int(os.environ.get("TESTS_CANCELLATIONS", "300"))

SLEEP = "select pg_sleep(60)"

ENGINES = [os.environ.get("TESTS_ENGINE")] if "TESTS_ENGINE" in os.environ else [None, "threads"]


@pytest.fixture(autouse=True, params=ENGINES, ids=lambda engine: engine or "driver's")
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """As `opened` and `engines` take it; None for the one that the driver decides."""
    if request.param:
        monkeypatch.setenv("TESTS_ENGINE", request.param)
    name: str | None = request.param
    return name


def last_words(engine: str | None, words: str) -> str:
    """What the server said when it ended a session.

    psycopg2 that blocks cannot tell: of several results libpq leaves it the last one, that the server has gone.
    """
    deaf = engine == "threads" and not is_psycopg3
    return "server closed the connection unexpectedly" if deaf else words


async def whole(size: int, watcher: Watcher, alias: str = "default") -> None:
    """Returns when nobody holds a connection and all of them are good; else the test fails in time."""
    await until(lambda: pools.status()[alias]["in_use"] == 0)
    assert pools.status()[alias]["waiting"] == 0
    assert len(await backends(watcher, size, alias)) == size
    assert not watcher.rows("select query from pg_stat_activity where state like 'idle in%'")


async def names(alias: str = "default") -> list[str]:
    return [name for (name,) in await db.query("select name from app_blog order by 1", using=alias)]


def running(lease: Lease, sql: str) -> asyncio.Task[Any]:
    return asyncio.create_task(lease.execute(sql))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For servers that will not answer."""
    monkeypatch.setattr(base, "CANCEL_TIMEOUT", 0.1)


@pytest.fixture
def own_watcher(own_postgres: Postgres) -> Iterator[Watcher]:
    watcher = Watcher(own_postgres.dsn("tornjango"))
    yield watcher
    watcher.close()


@pytest.fixture
def slow_commit(postgres: Postgres, database: None) -> Iterator[None]:
    """A commit after an insert into app_tag takes long, unless it is cancelled."""
    postgres.psql(
        """
        create function sleep_a_while() returns trigger language plpgsql
            as $$ begin perform pg_sleep(new.slug::float); return null; end $$;
        create constraint trigger slow after insert on app_tag deferrable initially deferred
            for each row execute function sleep_a_while();
        """,
        "tornjango",
    )
    yield
    postgres.psql("drop function sleep_a_while cascade", "tornjango")


# A statement that is cancelled


@pytest.mark.gen_test
async def test_a_cancelled_query_ends_on_the_server_and_its_connection_comes_back(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=1):
        before = await pid()
        task = start("select pg_sleep(60)")
        await until(lambda: watcher.running("pg_sleep(60)"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await pid() == before
        assert not watcher.running("pg_sleep(60)")


@pytest.mark.gen_test
async def test_a_query_cancelled_at_any_moment_costs_no_connection(database: None) -> None:
    async with opened(POOL_SIZE=2):
        for turns in range(40):
            tasks = [start("select pg_sleep(0.001)") for _ in range(5)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(not isinstance(it, Exception) for it in results)
        await until(lambda: pools.status()["default"]["in_use"] == 0)
        assert len(await asyncio.gather(pid(), pid())) == 2


async def _pair(number: int) -> None:
    async with db.atomic():
        await db.query("insert into app_blog (name) values (%s)", [f"pair {number}"])
        await Blog.objects.acreate(name=f"pair {number}")


async def _read(number: int) -> None:
    stream = await pools.get("default").stream("select generate_series(1, 1000)")
    try:
        while await stream.fetch(300):
            pass
    finally:
        await stream.close()


def _sync() -> None:
    with transaction.atomic():
        Blog.objects.select_for_update().first()
        list(Blog.objects.iterator(chunk_size=7))


KINDS = [
    lambda number: db.query("select pg_sleep(0.002)"),
    lambda number: db.query("insert into app_blog (name) values (%s)", [f"one {number}"]),
    _pair,
    _read,
    lambda number: green.run(_sync),
    lambda number: db.fetch(Blog.objects.all()[:100]),
]


async def _cancelled(number: int) -> bool:
    async def work() -> None:
        await KINDS[number % len(KINDS)](number)

    task = asyncio.create_task(work())
    await asyncio.sleep(random.random() * 0.02)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return True
    return False


@pytest.mark.gen_test(timeout=600)
async def test_cancellations_at_random_moments_leave_nothing_behind(
    database: None, watcher: Watcher
) -> None:
    async def worker(numbers: Iterator[int]) -> None:
        nonlocal cancelled
        while cancelled < CANCELLATIONS:
            cancelled += await _cancelled(next(numbers))

    cancelled = 0
    numbers = iter(range(10**9))
    async with opened(POOL_SIZE=5):
        await asyncio.gather(*(worker(numbers) for _ in range(20)))
        await whole(5, watcher)
        assert not watcher.rows(
            "select pid, query from pg_stat_activity where datname = 'tornjango' and pid <> pg_backend_pid() "
            "and state <> 'idle'"
        )
        odd = (
            "select name from app_blog where name like 'pair%%' group by name having count(*) <> 2"
        )
        assert await db.query(odd) == []
    assert cancelled >= CANCELLATIONS


@pytest.mark.gen_test
async def test_after_a_cancelled_statement_a_transaction_goes_on_from_its_savepoint(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=1):
        lease = await pools.get("default").begin()
        await lease.execute("insert into app_blog (name) values ('before')")
        await lease.execute("savepoint here")
        task = running(lease, SLEEP)
        await until(lambda: watcher.running(SLEEP))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await lease.execute("rollback to savepoint here")
        assert not watcher.running(SLEEP)
        await lease.execute("insert into app_blog (name) values ('after')")
        await lease.commit()
        assert await names() == ["after", "before"]


@pytest.mark.gen_test
async def test_a_cancelled_task_rolls_its_transaction_back(
    database: None, watcher: Watcher
) -> None:
    async def work() -> None:
        async with db.atomic():
            await Blog.objects.acreate(name="never")
            await db.query(SLEEP)

    async with opened(POOL_SIZE=2):
        task = asyncio.create_task(work())
        await until(lambda: watcher.running(SLEEP))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pools.status()["default"]["in_use"] == 0
        assert await names() == []
        await whole(2, watcher)


@pytest.mark.gen_test
async def test_a_statement_that_cannot_be_cancelled_costs_the_transaction(
    own_postgres: Postgres, own_watcher: Watcher, impatient: None
) -> None:
    async with opened(POOL_SIZE=1):
        lease = await pools.get("own").begin()
        own_postgres.freeze()
        task = running(lease, "select 1")
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(OperationalError, match="'own' was lost in a transaction"):
            await lease.execute("select 2")
        with pytest.raises(OperationalError, match="Begin again"):
            await lease.commit()
        await lease.rollback()
        own_postgres.thaw()
        await whole(1, own_watcher, "own")


# A commit that is cancelled, or whose answer is lost


@pytest.mark.gen_test
async def test_a_cancelled_commit_is_carried_to_its_end(
    slow_commit: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=2):
        lease = await pools.get("default").begin()
        await lease.execute("insert into app_tag (slug) values ('0.2')")
        task = asyncio.create_task(lease.commit())
        await until(lambda: watcher.running("COMMIT"))
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert watcher.rows("select slug from app_tag") == [("0.2",)]
        await lease.commit()
        await whole(2, watcher)


@pytest.mark.gen_test
async def test_a_cancelled_commit_does_not_wait_for_ever(
    slow_commit: None, watcher: Watcher, impatient: None
) -> None:
    async with opened(POOL_SIZE=2):
        lease = await pools.get("default").begin()
        await lease.execute("insert into app_tag (slug) values ('60')")
        task = asyncio.create_task(lease.commit())
        await until(lambda: watcher.running("COMMIT"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pools.status()["default"]["in_use"] == 0
        for left in watcher.running("COMMIT"):
            watcher.terminate(left)
        await whole(2, watcher)


@pytest.mark.gen_test
async def test_a_commit_during_which_the_connection_is_lost_is_reported_as_unknown(
    slow_commit: None, watcher: Watcher
) -> None:
    async def work() -> None:
        async with db.atomic():
            await db.query("insert into app_tag (slug) values ('60')")

    async with opened(POOL_SIZE=1):
        task = asyncio.create_task(work())
        await until(lambda: watcher.running("COMMIT"))
        watcher.terminate(watcher.running("COMMIT")[0])
        with pytest.raises(OperationalError, match=r"lost during COMMIT: whether .* is unknown"):
            await task
        assert watcher.rows("select slug from app_tag") == []
        await whole(1, watcher)


@pytest.mark.gen_test
async def test_a_constraint_that_the_commit_breaks_is_reported(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=1):
        with pytest.raises(IntegrityError):
            async with db.atomic():
                await db.query("insert into app_entry_authors (entry_id, author_id) values (7, 7)")
        await whole(1, watcher)


@asynccontextmanager
async def _behind_a_proxy(
    server: Postgres, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> AsyncIterator[Proxy]:
    async with Proxy(server.port) as proxy:
        monkeypatch.setitem(connections.settings["own"], "PORT", str(proxy.port))
        monkeypatch.setitem(connections.settings["own"], "HOST", "127.0.0.1")
        async with opened(**options):
            yield proxy


@pytest.fixture
def no_blogs(own_postgres: Postgres) -> None:
    own_postgres.psql("truncate app_blog cascade", "tornjango")


@pytest.mark.gen_test
async def test_a_write_whose_answer_was_lost_is_reported_and_not_sent_again(
    own_postgres: Postgres, no_blogs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _behind_a_proxy(own_postgres, monkeypatch, POOL_SIZE=2) as proxy:
        await pid("own")
        proxy.lose_answer_to(b"answer lost")
        with pytest.raises(OperationalError):
            await db.query("insert into app_blog (name) values ('answer lost')", using="own")
        assert await names("own") == ["answer lost"]


@pytest.mark.gen_test
async def test_a_commit_whose_answer_was_lost_is_reported_and_not_sent_again(
    own_postgres: Postgres, no_blogs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _behind_a_proxy(own_postgres, monkeypatch, POOL_SIZE=2) as proxy:

        @db.atomic("own")
        async def work() -> None:
            await Blog.objects.using("own").acreate(name="once")
            proxy.lose_answer_to(b"COMMIT")

        with pytest.raises(OperationalError, match="unknown"):
            await work()
        assert await names("own") == ["once"]
        assert pools.status()["own"]["in_use"] == 0


# A connection that is lost


@pytest.mark.gen_test
async def test_a_connection_that_ended_while_idle_is_replaced_unnoticed(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=3):
        pids = await backends(watcher, 3)
        for one in pids:
            watcher.terminate(one)
        assert not {await pid() for _ in range(5)} & pids


@pytest.mark.gen_test
async def test_when_all_connections_have_ended_callers_side_by_side_get_new_ones(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=3):
        pids = await backends(watcher, 3)
        for one in pids:
            watcher.terminate(one)
        assert not await backends(watcher, 3) & pids


@pytest.mark.gen_test
async def test_a_connection_that_ends_under_a_statement_fails_it_and_is_replaced(
    database: None, watcher: Watcher, engine: str | None
) -> None:
    async with opened(POOL_SIZE=1):
        task = start("select pg_sleep(60)")
        await until(lambda: watcher.running("pg_sleep(60)"))
        watcher.terminate(watcher.running("pg_sleep(60)")[0])
        with pytest.raises(
            OperationalError, match=last_words(engine, "terminating connection")
        ) as caught:
            await task
        assert type(caught.value.__cause__).__module__.startswith("psycopg")
        assert await db.query("select 1") == [(1,)]


@pytest.mark.gen_test
async def test_a_transaction_whose_connection_is_lost_writes_nothing_and_says_so(
    database: None, watcher: Watcher, engine: str | None
) -> None:
    @db.atomic()
    async def work(names: list[str]) -> None:
        first, *others = names
        await Blog.objects.acreate(name=first)
        watcher.terminate(await pid())
        for name in others:
            await Blog.objects.acreate(name=name)

    async with opened(POOL_SIZE=2):
        with pytest.raises(OperationalError, match=last_words(engine, "terminating connection")):
            await work(["never", "never, too"])
        with pytest.raises(OperationalError, match=r"unknown|lost in a transaction"):
            await work(["never"])
        assert await names() == []
        await whole(2, watcher)


@pytest.mark.gen_test
async def test_a_transaction_killed_in_mid_query_is_over(
    database: None, watcher: Watcher, engine: str | None
) -> None:
    async with opened(POOL_SIZE=1):
        lease = await pools.get("default").begin()
        await lease.execute("insert into app_blog (name) values ('never')")
        task = running(lease, SLEEP)
        await until(lambda: watcher.running(SLEEP))
        watcher.terminate(watcher.running(SLEEP)[0])
        with pytest.raises(OperationalError, match=last_words(engine, "terminating connection")):
            await task
        with pytest.raises(OperationalError, match="Begin again"):
            await lease.execute("select 1")
        await lease.rollback()
        assert await names() == []
        await whole(1, watcher)


@pytest.mark.gen_test
async def test_rolling_back_a_lost_connection_raises_nothing(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=1):
        for end in ("rollback", "abandon"):
            lease = await pools.get("default").begin()
            [(backend,)] = (await lease.execute("select pg_backend_pid()")).rows
            watcher.terminate(backend)
            result = getattr(lease, end)()
            if result is not None:
                await result
            assert await pid() != backend
        await whole(1, watcher)


@pytest.mark.gen_test
async def test_a_stream_whose_connection_is_lost_fails_and_comes_back(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=1):
        stream = await pools.get("default").stream(
            "select pg_backend_pid() from generate_series(1, 9)"
        )
        [(backend,), _] = await stream.fetch(2)
        watcher.terminate(backend)
        with pytest.raises(OperationalError):
            await stream.fetch(2)
        await stream.close()
        await whole(1, watcher)


@pytest.mark.gen_test
async def test_a_session_that_the_server_ends_for_idling_in_a_transaction_says_so(
    database: None, watcher: Watcher, engine: str | None
) -> None:
    async with opened(POOL_SIZE=1):
        lease = await pools.get("default").begin()
        await lease.execute("set local idle_in_transaction_session_timeout = '10ms'")
        await until(
            lambda: not watcher.rows("select 1 from pg_stat_activity where state like 'idle in%'")
        )
        # psycopg 3 has a class of error for it, which is no OperationalError.
        with pytest.raises(DatabaseError, match=last_words(engine, "idle-in-transaction")):
            await lease.execute("select 1")
        with pytest.raises(OperationalError, match="Begin again"):
            await lease.execute("select 1")
        await lease.rollback()
        await whole(1, watcher)


# Transactions and their connections


@pytest.mark.gen_test
async def test_a_transaction_counts_as_a_connection_in_use(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=1, POOL_TIMEOUT=0.5):
        lease = await pools.get("default").begin()
        assert pools.status()["default"]["in_use"] == 1
        with pytest.raises(Overloaded, match="POOL_TIMEOUT"):
            await db.query("select 1")
        with pytest.raises(Overloaded, match="POOL_TIMEOUT"):
            await pools.get("default").begin()
        await lease.rollback()
        await whole(1, watcher)


@pytest.mark.gen_test
async def test_an_abandoned_transaction_is_rolled_back_in_the_background(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=1):
        lease = await pools.get("default").begin()
        await lease.execute("insert into app_blog (name) values ('never')")
        task = running(lease, SLEEP)
        await until(lambda: watcher.running(SLEEP))
        lease.abandon()
        lease.abandon()
        with pytest.raises(OperationalError, match="cancel"):
            await task
        assert await names() == []
        with pytest.raises(InterfaceError, match="has ended"):
            await lease.execute("select 1")
        await lease.rollback()
        await whole(1, watcher)


@pytest.mark.gen_test
async def test_a_transaction_that_is_forgotten_is_warned_of_and_rolled_back(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=1):
        lease = await pools.get("default").begin()
        await lease.execute("insert into app_blog (name) values ('never')")
        forgotten = [lease]
        del lease
        with pytest.warns(ResourceWarning, match="'default' was never ended"):
            forgotten.clear()
        assert await names() == []
        await whole(1, watcher)


@pytest.mark.gen_test
async def test_a_stream_that_is_forgotten_holds_no_connection(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=1):
        stream = await pools.get("default").stream("select generate_series(1, 9)")
        await stream.fetch(2)
        stream.abandon()
        await whole(1, watcher)


@pytest.mark.gen_test
async def test_a_statement_that_ends_the_transaction_is_followed_by_another_one(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=1):
        lease = await pools.get("default").begin()
        await lease.execute("insert into app_blog (name) values ('committed')")
        await lease.execute("commit")
        await lease.execute("insert into app_blog (name) values ('never')")
        await lease.rollback()
        assert await names() == ["committed"]
        await whole(1, watcher)


@pytest.mark.gen_test
async def test_errors_do_not_cost_a_transaction_its_connection(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=1):
        lease = await pools.get("default").begin()
        with pytest.raises(ProgrammingError):
            await lease.execute("select %s", [object()])
        assert (await lease.execute("select 1")).rows == [(1,)]
        with pytest.raises(ProgrammingError):
            await lease.execute("nonsense")
        with pytest.raises(DatabaseError, match="current transaction is aborted"):
            await lease.execute("select 1")
        await lease.rollback()
        with pytest.raises(ProgrammingError):
            await pools.get("default").stream("nonsense")
        await whole(1, watcher)


@pytest.mark.gen_test
async def test_transactions_have_the_isolation_level_of_the_settings(
    own_postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    from django.db.backends.postgresql.psycopg_any import IsolationLevel

    level = IsolationLevel.REPEATABLE_READ
    monkeypatch.setitem(connections.settings["own"], "OPTIONS", {"isolation_level": level})
    shown = "show transaction_isolation"
    async with opened():
        async with pools.get("own").leased() as lease:
            assert (await lease.execute(shown)).rows == [("repeatable read",)]
        assert await db.query(shown, using="own") == [("read committed",)]


@pytest.mark.gen_test
async def test_a_statement_that_opens_a_transaction_is_refused(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=1):
        with pytest.raises(TransactionManagementError, match="'begin'"):
            await db.query("begin")
        with pytest.raises(ProgrammingError):
            await db.query("begin; select nothing")
        assert await db.query("select now() = statement_timestamp()") == [(True,)]
        assert not watcher.rows("select 1 from pg_stat_activity where state like 'idle in%'")


# What the server refuses, or gives up


@pytest.mark.gen_test
async def test_a_statement_past_the_servers_time_out_fails_and_leaves_the_connection(
    own_postgres: Postgres, own_watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"options": "-c statement_timeout=50"}
    monkeypatch.setitem(connections.settings["own"], "OPTIONS", options)
    async with opened(POOL_SIZE=1):
        before = await pid("own")
        with pytest.raises(OperationalError, match="statement timeout"):
            await db.query(SLEEP, using="own")
        with pytest.raises(OperationalError, match="statement timeout"):
            async with db.atomic("own"):
                await db.query(SLEEP, using="own")
        assert await pid("own") == before


@pytest.mark.gen_test
async def test_a_serialization_failure_can_be_tried_again(database: None, watcher: Watcher) -> None:
    update = "update app_blog set name = name || 'x'"
    async with opened(POOL_SIZE=2):
        await db.query("insert into app_blog (name) values ('a')")
        one, two = [await pools.get("default").begin() for _ in range(2)]
        for lease in (one, two):
            await lease.execute("set transaction isolation level serializable")
            await lease.execute("select * from app_blog")
        await one.execute(update)
        await one.commit()
        with pytest.raises(OperationalError, match="could not serialize") as caught:
            await two.execute(update)
        assert type(caught.value.__cause__).__name__ == "SerializationFailure"
        await two.rollback()
        async with db.atomic():
            await db.query(update)
        assert await names() == ["axx"]
        await whole(2, watcher)


@pytest.mark.gen_test
async def test_a_deadlock_fails_one_of_its_transactions(database: None, watcher: Watcher) -> None:
    update = "update app_blog set name = name || %s where id = %s"
    async with opened(POOL_SIZE=2):
        await db.query("insert into app_blog (id, name) values (1, 'a'), (2, 'b')")
        one, two = [await pools.get("default").begin() for _ in range(2)]
        for lease in (one, two):
            await lease.execute("set local deadlock_timeout = '10ms'")
        await one.execute(update, ["1", 1])
        await two.execute(update, ["2", 2])
        results = await asyncio.gather(
            one.execute(update, ["1", 2]), two.execute(update, ["2", 1]), return_exceptions=True
        )
        [error] = [it for it in results if isinstance(it, BaseException)]
        assert isinstance(error, OperationalError)
        assert type(error.__cause__).__name__ == "DeadlockDetected"
        failed, other = (one, two) if results[0] is error else (two, one)
        await failed.rollback()
        await other.commit()
        assert await names() in (["a1", "b1"], ["a2", "b2"])
        await whole(2, watcher)


# Too many callers


@pytest.mark.gen_test
async def test_a_hundred_callers_share_one_connection_in_the_order_they_came(
    database: None,
) -> None:
    order: list[int] = []

    async def ask(number: int) -> None:
        await db.query("select %s", [number])
        order.append(number)

    async with opened(POOL_SIZE=1):
        await asyncio.gather(*(ask(number) for number in range(100)))
        assert order == list(range(100))
        assert pools.status()["default"]["free"] == 1


@pytest.mark.gen_test
async def test_callers_past_the_queue_and_past_the_time_are_told_to_come_back(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=1, POOL_QUEUE=2, POOL_TIMEOUT=0.5):
        await pid()
        long = start("select pg_sleep(60)")
        await until(lambda: watcher.running("pg_sleep(60)"))
        waiting = [start("select 1") for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="POOL_QUEUE"):
            await db.query("select 2")
        for error in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(error, Overloaded)
            assert "POOL_TIMEOUT" in str(error)
        assert pools.status()["default"]["waiting"] == 0
        long.cancel()
        assert await db.query("select 3") == [(3,)]


async def sleeps(request: HttpRequest) -> HttpResponse:
    await db.query(SLEEP)
    return HttpResponse()


def sleeps_deferred(request: HttpRequest, response: DeferredResponse) -> None:
    db.query(SLEEP).add_callback(lambda rows: response.text("slept"))


async def sleeps_in_transaction(request: HttpRequest) -> HttpResponse:
    async with db.atomic():
        await Blog.objects.acreate(name="never")
        await db.query(SLEEP)
    return HttpResponse()


async def sleeps_in_the_orm(request: HttpRequest) -> HttpResponse:
    await Blog.objects.extra(where=["pg_sleep(60) is not null"]).afirst()
    return HttpResponse()


@as_green
def sleeps_in_green_code(request: HttpRequest) -> HttpResponse:
    with transaction.atomic():
        Blog.objects.create(name="never")
        Blog.objects.extra(where=["pg_sleep(60) is not null"]).first()
    return HttpResponse()


urlpatterns = [
    path("green/", sleeps_in_green_code),
    path("async/", sleeps),
    path("deferred/", sleeps_deferred),
    path("transaction/", sleeps_in_transaction),
    path("orm/", sleeps_in_the_orm),
]
TARGETS = [f"/{pattern.pattern}" for pattern in urlpatterns]
SERVED = {"ROOT_URLCONF": "tests.test_db_faults", "MIDDLEWARE": []}


@pytest.mark.gen_test
async def test_a_request_without_a_connection_in_time_is_answered_503_and_when_to_come_back(
    database: None, watcher: Watcher, error_log: list[Any]
) -> None:
    options = {"POOL_SIZE": 1, "POOL_TIMEOUT": 0.5, **engines()}
    async with serving(**SERVED, TORNJANGO=options) as site, await site.connect() as first:
        await first.send(b"GET /async/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await until(lambda: watcher.running(SLEEP))
        for answer in await asyncio.gather(*map(site.request, TARGETS)):
            assert answer.status == 503
            assert int(answer.header("Retry-After") or "") > 0
            assert "POOL_TIMEOUT" in error_log.pop().getMessage()


@pytest.mark.gen_test
@pytest.mark.parametrize("target", TARGETS)
async def test_a_client_that_leaves_in_mid_query_ends_it_within_a_second(
    database: None, watcher: Watcher, target: str
) -> None:
    watcher.rows("insert into app_blog (name) values ('there')")
    async with serving(**SERVED, TORNJANGO={"POOL_SIZE": 2, **engines()}) as site:
        client = await RawClient.connect(site.port)
        await client.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await until(lambda: watcher.running("pg_sleep(60)"))
        left = time.monotonic()
        client.abort()
        await until(lambda: not watcher.running("pg_sleep(60)"))
        assert time.monotonic() - left < 1
        assert await names() == ["there"]
        await whole(2, watcher)


# A pool's end


@pytest.mark.gen_test
async def test_closing_ends_what_runs_and_what_waits(database: None, watcher: Watcher) -> None:
    async with opened(POOL_SIZE=1):
        engine = pools.get("default")
        running, waiting = start("select pg_sleep(60)"), start("select 1")
        await until(lambda: watcher.running("pg_sleep(60)"))
        await engine.close()
        with pytest.raises(OperationalError) as caught:
            await running
        assert type(caught.value.__cause__).__name__ == "QueryCanceled"
        for late in (waiting, start("select 2")):
            with pytest.raises(InterfaceError, match="closed"):
                await late
        await engine.close()
    assert not watcher.running("pg_sleep(60)")


@pytest.mark.gen_test
async def test_closing_while_connecting_leaves_nothing(database: None) -> None:
    async with opened():
        tasks = [start("select 1") for _ in range(5)]
        await asyncio.sleep(0)
    for error in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(error, InterfaceError)


@pytest.mark.gen_test
async def test_closing_does_not_wait_for_a_server_that_is_frozen(
    own_postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CANCEL_TIMEOUT", 0.05)
    async with opened():
        await pid("own")
        own_postgres.freeze()
        tasks = [start("select 1", alias="own") for _ in range(3)]
        await asyncio.sleep(0)
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert sorted(type(error).__name__ for error in errors) == [
        *("InterfaceError", "InterfaceError"),
        "OperationalError",
    ]


def test_a_pool_of_another_loop_says_so(database: None, io_loop: IOLoop) -> None:
    io_loop.run_sync(_open_and_ask)
    with ThreadPoolExecutor() as thread, pytest.raises(RuntimeError, match="another event loop"):
        thread.submit(lambda: asyncio.run(pid())).result()
    io_loop.run_sync(pools.close)


async def _open_and_ask() -> None:
    pools.open(Config.from_dict(engines()))
    await pid()


@pytest.mark.gen_test
async def test_closing_ends_open_transactions_and_their_owners_are_told(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=3):
        engine = pools.get("default")
        idle, busy, streaming = [await engine.begin() for _ in range(3)]
        await idle.execute("insert into app_blog (name) values ('never')")
        stream = await streaming.stream("select generate_series(1, 9)")
        task = running(busy, SLEEP)
        await until(lambda: watcher.running(SLEEP))
        await engine.close()
        with pytest.raises(OperationalError):
            await task
        for call in (idle.commit, busy.commit, streaming.commit, lambda: stream.fetch(1)):
            with pytest.raises(OperationalError, match="was closed in a transaction"):
                await call()
        for lease in (idle, busy, streaming):
            await lease.rollback()
    assert watcher.rows("select * from app_blog") == []
    assert not watcher.running(SLEEP)


@pytest.mark.gen_test
async def test_closing_gives_up_a_transaction_of_a_frozen_server(
    own_postgres: Postgres, impatient: None
) -> None:
    async with opened(POOL_SIZE=2):
        idle, busy = [await pools.get("own").begin() for _ in range(2)]
        own_postgres.freeze()
        task = running(busy, "select 1")
        await asyncio.sleep(0)
        started = time.monotonic()
        await pools.get("own").close()
        assert time.monotonic() - started < 2
        with pytest.raises(OperationalError):
            await task
        await idle.rollback()


# A server that comes and goes


async def _write(number: int) -> None:
    await db.query("insert into numbers values (%s)", [number], using="own")


@db.atomic("own")
async def _write_twice(number: int) -> None:
    await _write(number)
    await _write(-number)


async def _insert(
    done: set[int], failed: set[int], numbers: Iterator[int], stop: asyncio.Event
) -> None:
    while not stop.is_set():
        number = next(numbers)
        try:
            if number % 2:
                await _write(number)
            else:
                await _write_twice(number)
        except OperationalError:
            failed.add(number)
        else:
            done.add(number)


@pytest.mark.slow
@pytest.mark.gen_test(timeout=30)
@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_restart_under_load_loses_no_connection_and_repeats_no_statement(
    own_postgres: Postgres, mode: Any
) -> None:
    own_postgres.psql("alter database tornjango set synchronous_commit = on")
    own_postgres.psql(
        "drop table if exists numbers; create table numbers (number int)", "tornjango"
    )
    done: set[int] = set()
    failed: set[int] = set()
    stop = asyncio.Event()
    async with opened(POOL_SIZE=4):
        numbers = iter(range(1, 10**9))
        workers = [asyncio.create_task(_insert(done, failed, numbers, stop)) for _ in range(20)]
        await until(lambda: len(done) > 200)
        await asyncio.to_thread(own_postgres.restart, mode)
        before = len(done)
        await until(lambda: len(done) > before + 200)
        stop.set()
        await asyncio.gather(*workers)
        stored = [number for (number,) in await db.query("select number from numbers", using="own")]
        assert len(stored) == len(set(stored))
        first = {number for number in stored if number > 0}
        assert {-number for number in stored if number < 0} == {it for it in first if not it % 2}
        assert done <= first <= done | failed
        assert len(failed) <= 20
        assert pools.status()["own"]["in_use"] == 0
        watcher = Watcher(own_postgres.dsn("tornjango"))
        assert len(await backends(watcher, 4, "own")) == 4
        watcher.close()


@pytest.mark.gen_test(timeout=15)
async def test_callers_of_a_frozen_server_get_their_time_out(
    own_postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CANCEL_TIMEOUT", 0.1)
    async with opened(POOL_SIZE=2, POOL_TIMEOUT=1):
        await pid("own")
        own_postgres.freeze()
        stuck = start("select 1", alias="own")
        connecting, waiting = start("select 2", alias="own"), start("select 3", alias="own")
        with pytest.raises(OperationalError):
            await connecting
        stuck.cancel()
        results = await asyncio.gather(waiting, return_exceptions=True)
        assert isinstance(results[0], (OperationalError, Overloaded))
        own_postgres.thaw()
        await until(lambda: pools.status()["own"]["in_use"] == 0)
        assert await db.query("select 4", using="own") == [(4,)]


@pytest.mark.gen_test
async def test_connecting_to_a_frozen_server_ends_in_time(
    own_postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CONNECT_TIMEOUT", 0.1)
    own_postgres.freeze()
    async with opened():
        with pytest.raises(OperationalError, match=r"'own': The server did not answer in 0.1 s"):
            await db.query("select 1", using="own")


@pytest.mark.gen_test
async def test_cancelled_while_it_connects_a_query_leaves_a_connection_for_others(
    own_postgres: Postgres,
) -> None:
    own_postgres.freeze()
    async with opened(POOL_SIZE=1):
        task = start("select 1", alias="own")
        await until(lambda: pools.status()["own"]["connecting"])
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pools.status()["own"]["in_use"] == 0
        own_postgres.thaw()
        await until(lambda: pools.status()["own"]["free"] == 1)
        assert await db.query("select 2", using="own") == [(2,)]


@pytest.mark.gen_test
async def test_a_server_that_never_answered_is_reported_at_once(own_postgres: Postgres) -> None:
    own_postgres.stop()
    async with opened():
        with pytest.raises(OperationalError, match="refused") as caught:
            await db.query("select 1", using="own")
        assert type(caught.value.__cause__).__module__.startswith("psycopg")
        with pytest.raises(OperationalError, match="refused"):
            await pools.get("own").open()
        await asyncio.to_thread(own_postgres.start)
        await pools.get("own").open()
        assert await db.query("select 1", using="own") == [(1,)]


@pytest.mark.gen_test
async def test_a_server_that_is_away_is_waited_for_in_time(own_postgres: Postgres) -> None:
    async with opened(POOL_TIMEOUT=1):
        await pid("own")
        await asyncio.to_thread(own_postgres.stop)
        with pytest.raises(OperationalError, match="refused"):
            await db.query("select 1", using="own")
        status = pools.status()["own"]
        assert (status["in_use"], status["waiting"]) == (0, 0)


@pytest.mark.gen_test
async def test_a_transaction_of_a_server_that_freezes_can_be_left_in_time(
    own_postgres: Postgres, own_watcher: Watcher, impatient: None
) -> None:
    own_watcher.rows("truncate app_blog cascade")

    async def work() -> None:
        async with db.atomic("own"):
            await Blog.objects.using("own").acreate(name="never")
            own_postgres.freeze()
            await db.query("select 1", using="own")

    async with opened(POOL_SIZE=2):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await work()
        assert pools.status()["own"]["in_use"] == 0
        own_postgres.thaw()
        assert await names("own") == []
        await whole(2, own_watcher, "own")


@pytest.mark.gen_test
async def test_a_server_that_freezes_for_a_while_is_waited_for(
    own_postgres: Postgres, own_watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=2):
        lease = await pools.get("own").begin()
        own_postgres.freeze()
        task = running(lease, "select 1")
        await asyncio.sleep(0.1)
        own_postgres.thaw()
        assert (await task).rows == [(1,)]
        await lease.commit()
        await whole(2, own_watcher, "own")
