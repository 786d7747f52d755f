from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg2
import psycopg2.errors
import pytest
from asgiref.sync import SyncToAsync
from django.db import connections
from django.db.transaction import TransactionManagementError
from django.db.utils import (
    DataError,
    IntegrityError,
    InterfaceError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
)
from django.test import override_settings
from tornado.ioloop import IOLoop

from tests.app.models import Blog, CuriousBlog, Entry
from tests.database import QUERYSETS, Watcher, differences, fill, opened, outcome, until
from tests.postgres import Postgres
from tornjango import db
from tornjango.db import pools
from tornjango.db.engines import base, cancel, session
from tornjango.db.fetching import SLICE
from tornjango.exceptions import Overloaded

Fetch = Callable[[Any], list[Any]]


@pytest.fixture
def fetch(database: None, io_loop: IOLoop) -> Iterator[Fetch]:
    """`db.fetch` on an open pool, for tests that are not coroutines; the tables are filled."""
    fill()
    pool = opened()
    io_loop.run_sync(pool.__aenter__)
    yield lambda queryset: io_loop.run_sync(lambda: db.fetch(queryset))
    io_loop.run_sync(lambda: pool.__aexit__(None, None, None))


@pytest.fixture
def watcher(postgres: Postgres) -> Iterator[Watcher]:
    watcher = Watcher(postgres.dsn("tornjango"))
    yield watcher
    watcher.close()


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


# What comes back


def test_querysets_come_back_as_when_iterated(fetch: Fetch) -> None:
    assert differences(fetch) == {}
    assert pools.status()["default"]["engine"] == "momoko"


def test_only_the_querysets_that_are_wrong_fail(fetch: Fetch) -> None:
    failing = {name for name, it in QUERYSETS.items() if isinstance(outcome(fetch, it)[0], type)}
    assert {name for name in failing if not name.startswith("a ")} == set()
    assert len(failing) == 5


@pytest.fixture
def naive() -> Iterator[None]:
    """Without time zones; the thread that prefetches has a connection that would not hear of it."""
    SyncToAsync.single_thread_executor.submit(_forget_connections).result()
    with override_settings(USE_TZ=False, TIME_ZONE="America/New_York"):
        yield
        SyncToAsync.single_thread_executor.submit(_forget_connections).result()


def _forget_connections() -> None:
    for connection in connections.all(initialized_only=True):
        connection.close()
        del connections[connection.alias]


def test_without_time_zones_datetimes_are_naive_and_local(naive: None, fetch: Fetch) -> None:
    assert differences(fetch) == {}


@pytest.mark.gen_test
async def test_a_statement_without_rows_tells_how_many_it_changed(database: None) -> None:
    async with opened():
        rows = await db.query("insert into app_blog (name) values ('a'), ('b')")
        assert (rows, rows.columns, rows.rowcount) == ([], [], 2)
        rows = await db.query("update app_blog set name = name returning id, name as title")
        assert (len(rows), rows.columns, rows.rowcount) == (2, ["id", "title"], 2)


@pytest.mark.gen_test
async def test_percent_signs_are_only_escapes_where_there_are_parameters(database: None) -> None:
    async with opened():
        assert await db.query("select 'a%%b'") == [("a%%b",)]
        assert await db.query("select 'a%%b'", []) == [("a%b",)]
        assert await db.query("select 'a%%b'", {}) == [("a%b",)]
        assert await db.query("select %s || '%%'", ["a"]) == [("a%",)]
        assert await db.query("select %(x)s || '%%'", {"x": "a"}) == [("a%",)]


@pytest.mark.gen_test
async def test_others_get_their_turn_while_many_rows_become_objects(database: None) -> None:
    sql = "select i as id, 'blog ' || i as name from generate_series(1, 20000) i order by i"
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with opened():
        counting = asyncio.create_task(count_turns())
        await pid()
        rows = await db.query(sql)
        turns = 0
        blogs = await db.fetch(Blog.objects.raw(sql))
        counting.cancel()
    assert len(rows) == len(blogs) == 20000
    assert (blogs[-1].pk, blogs[-1].name) == rows[-1] == (20000, "blog 20000")
    assert turns > 20


@pytest.mark.gen_test
@pytest.mark.parametrize("number", [2, SLICE + 1])
async def test_a_model_that_queries_while_it_is_made_is_made_in_a_thread(
    database: None, number: int
) -> None:
    async with opened():
        await db.query("insert into app_blog (name) values ('a')")
        sql = f"select i as id, 'x' as name from generate_series(1, {number}) i"
        blogs = await db.fetch(CuriousBlog.objects.raw(sql))
    assert [blog.pk for blog in blogs] == list(range(1, number + 1))
    assert {blog.neighbours for blog in blogs} == {1}


@pytest.mark.gen_test
async def test_under_debug_queries_are_logged_as_django_logs_them(
    database: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "django.db.backends")
    with override_settings(DEBUG=True):
        async with opened():
            await db.fetch(Blog.objects.filter(name="it's 100%"))
            with pytest.raises(ProgrammingError):
                await db.query("select nothing", using="default")
            with pytest.raises(ProgrammingError):
                await db.query("select %s", [object()])
            await pid()
            logged = [query["sql"] for query in connections["default"].queries]
    assert "it''s 100%'" in logged[0]
    assert logged[1:] == ["select nothing", "select pg_backend_pid()"]
    assert [record.alias for record in caplog.records] == ["default"] * 3  # type: ignore[attr-defined]


@pytest.mark.gen_test
async def test_a_server_version_that_compiling_asks_for_is_known(database: None) -> None:
    async with opened():
        await pools.get("default").open()
        await db.fetch(Blog.objects.all())
        assert connections["default"].pg_version >= 150000


# What goes wrong


@pytest.mark.gen_test
async def test_errors_are_djangos_with_the_drivers_as_their_cause(database: None) -> None:
    async with opened(POOL_SIZE=1):
        for sql, params, error, cause in [
            ("select", None, None, None),
            ("nonsense", None, ProgrammingError, psycopg2.errors.SyntaxError),
            ("select 1 / %s", [0], DataError, psycopg2.errors.DivisionByZero),
            (
                "insert into app_blog (id) values (1)",
                (),
                IntegrityError,
                psycopg2.errors.NotNullViolation,
            ),
            ("select %s", [object()], ProgrammingError, psycopg2.ProgrammingError),
            ("copy app_blog to stdout", None, ProgrammingError, psycopg2.ProgrammingError),
        ]:
            if error is None:
                assert await db.query(sql, params) == [()]
                continue
            with pytest.raises(error) as caught:
                await db.query(sql, params)
            assert type(caught.value.__cause__) is cause
        with pytest.raises(IndexError):
            await db.query("select %s, %s", [1])
        assert await db.query("select 1") == [(1,)]
        assert pools.status()["default"]["in_use"] == 0


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


@pytest.mark.gen_test
async def test_a_connection_whose_statement_cannot_be_cancelled_is_given_up(
    database: None, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CANCEL_TIMEOUT", 0.05)
    monkeypatch.setattr(cancel, "prepare", lambda connection: lambda: None)
    async with opened(POOL_SIZE=1):
        before = await pid()
        task = start("select pg_sleep(60)")
        await until(lambda: watcher.running("pg_sleep(60)"))
        task.cancel()
        assert await pid() != before
    for left in watcher.running("pg_sleep(60)"):
        watcher.terminate(left)


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
async def test_a_connection_that_ends_under_a_statement_fails_it_and_is_replaced(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=1):
        task = start("select pg_sleep(60)")
        await until(lambda: watcher.running("pg_sleep(60)"))
        watcher.terminate(watcher.running("pg_sleep(60)")[0])
        with pytest.raises(OperationalError, match="terminating connection") as caught:
            await task
        assert isinstance(caught.value.__cause__, psycopg2.OperationalError)
        assert await db.query("select 1") == [(1,)]


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
    async with opened(POOL_SIZE=1, POOL_QUEUE=2, POOL_TIMEOUT=0.1):
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
        assert isinstance(caught.value.__cause__, psycopg2.errors.QueryCanceled)
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
    pools.open()
    await pid()


# A server that comes and goes


async def _insert(
    done: set[int], failed: set[int], numbers: Iterator[int], stop: asyncio.Event
) -> None:
    while not stop.is_set():
        number = next(numbers)
        try:
            await db.query("insert into numbers values (%s)", [number], using="own")
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
        numbers = iter(range(10**9))
        workers = [asyncio.create_task(_insert(done, failed, numbers, stop)) for _ in range(20)]
        await until(lambda: len(done) > 200)
        await asyncio.to_thread(own_postgres.restart, mode)
        before = len(done)
        await until(lambda: len(done) > before + 200)
        stop.set()
        await asyncio.gather(*workers)
        stored = [number for (number,) in await db.query("select number from numbers", using="own")]
        assert len(stored) == len(set(stored))
        assert done <= set(stored) <= done | failed
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
    async with opened(POOL_SIZE=2, POOL_TIMEOUT=0.3):
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
    monkeypatch.setattr(session, "CONNECT_TIMEOUT", 0.1)
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
async def test_a_server_too_old_for_django_is_refused_as_django_does(
    database: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = type(connections["default"].features)
    monkeypatch.setattr(features, "minimum_database_version", (99,))
    async with opened():
        with pytest.raises(NotSupportedError, match="PostgreSQL 99 or later is required"):
            await db.query("select 1")


@pytest.mark.gen_test
async def test_a_server_that_never_answered_is_reported_at_once(own_postgres: Postgres) -> None:
    own_postgres.stop()
    async with opened():
        with pytest.raises(OperationalError, match="refused") as caught:
            await db.query("select 1", using="own")
        assert isinstance(caught.value.__cause__, psycopg2.OperationalError)
        with pytest.raises(OperationalError, match="refused"):
            await pools.get("own").open()
        await asyncio.to_thread(own_postgres.start)
        await pools.get("own").open()
        assert await db.query("select 1", using="own") == [(1,)]


@pytest.mark.gen_test
async def test_a_server_that_is_away_is_waited_for_in_time(own_postgres: Postgres) -> None:
    async with opened(POOL_TIMEOUT=0.2):
        await pid("own")
        await asyncio.to_thread(own_postgres.stop)
        with pytest.raises(OperationalError, match="refused"):
            await db.query("select 1", using="own")
        status = pools.status()["own"]
        assert (status["in_use"], status["waiting"]) == (0, 0)


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"PASSWORD": "wrong"}, "password authentication failed"),
        ({"NAME": "nothing"}, 'database "nothing" does not exist'),
        ({"HOST": "nowhere.invalid"}, "known|resolution|nodename|No address"),
        ({"HOST": "127.0.0.1", "PORT": "1"}, "refused"),
    ],
)
async def test_why_no_connection_can_be_made_is_told(
    own_postgres: Postgres, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], message: str
) -> None:
    for key, value in change.items():
        monkeypatch.setitem(connections.settings["own"], key, value)
    async with opened():
        with pytest.raises(OperationalError, match=message):
            await db.query("select 1", using="own")


@pytest.mark.gen_test
async def test_a_host_is_reached_by_whichever_of_its_addresses_answers(
    own_postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(connections.settings["own"], "HOST", "127.0.0.1,localhost,::1")
    ports = ",".join(["1", str(own_postgres.port), "1"])
    monkeypatch.setitem(connections.settings["own"], "PORT", ports)
    async with opened():
        assert await db.query("select 1", using="own") == [(1,)]


@pytest.mark.gen_test
async def test_a_connection_is_set_up_like_djangos_own(
    own_postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "assume_role": "pg_monitor",
        "options": "-c search_path=app,public -c statement_timeout=12345",
        "isolation_level": 3,
        "application_name": "it is us",
    }
    monkeypatch.setitem(connections.settings["own"], "OPTIONS", options)
    shown = "select name, setting from pg_settings where source not in ('default', 'configuration file') order by name"
    sql = (
        f"with shown as ({shown}) select name, setting from shown union select 'role', current_role"
    )

    def django() -> list[Any]:
        connection = connections["own"]
        with connection.cursor() as cursor:
            cursor.execute(sql)
            rows = cursor.fetchall()
        connection.close()
        return rows

    async with opened():
        ours = await db.query(sql, using="own")
    assert sorted(ours) == sorted(await asyncio.to_thread(django))
    assert ("role", "pg_monitor") in ours


@pytest.mark.gen_test
async def test_entries_of_another_database_stay_its_own(
    database: None, own_postgres: Postgres
) -> None:
    own_postgres.psql(
        "truncate app_blog cascade; insert into app_blog values (7, 'own')", "tornjango"
    )
    async with opened():
        [blog] = await db.fetch(Blog.objects.using("own"))
        assert (blog.name, blog._state.db) == ("own", "own")
        [blog] = await db.fetch(Blog.objects.all(), using="own")
        assert (blog.name, blog._state.db) == ("own", "own")
        [blog] = await db.fetch(Blog.objects.raw("select * from app_blog"), using="own")
        assert (blog.name, blog._state.db) == ("own", "own")
        assert await db.fetch(Entry.objects.all()) == []
