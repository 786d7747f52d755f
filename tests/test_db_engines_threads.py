from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.management import call_command
from django.db import connections
from django.db.backends.signals import connection_created
from django.db.backends.sqlite3.base import DatabaseWrapper as SqliteWrapper
from django.db.models import Count
from django.db.utils import DatabaseError, IntegrityError, OperationalError
from django.test import override_settings

from tests.app.models import Blog, Entry
from tests.database import Watcher, differences, fill, opened, picture, until
from tests.postgres import Postgres
from tornjango import db
from tornjango.conf import Config
from tornjango.db import pools
from tornjango.db.compiler import unevaluated
from tornjango.db.engines import base
from tornjango.db.engines.threads import ThreadsEngine
from tornjango.workers import Workers

INSERT = "insert into app_blog (name) values (%s)"


@pytest.fixture
def sqlite(database: None) -> Iterator[None]:
    call_command("migrate", database="sqlite", run_syncdb=True, verbosity=0, interactive=False)
    blog = Blog.objects.using("sqlite").create(name="sqlite")
    Entry.objects.using("sqlite").create(blog=blog, title="one 100%")
    yield
    Blog.objects.using("sqlite").all().delete()
    connections["sqlite"].close()


@pytest.fixture
def watcher(postgres: Postgres) -> Iterator[Watcher]:
    watcher = Watcher(postgres.dsn("tornjango"))
    yield watcher
    watcher.close()


class Blocker(threading.Event):
    def __init__(self) -> None:
        super().__init__()
        self.began = threading.Event()

    def block(self) -> int:
        self.began.set()
        return int(self.wait(10))


@pytest.fixture
def blocker() -> Iterator[Blocker]:
    """SQL's ``block()`` of SQLite returns when it is set: no interruption ends it before."""
    event = Blocker()

    def receive(connection: Any, **kwargs: Any) -> None:
        if connection.vendor == "sqlite":
            connection.connection.create_function("block", 0, event.block)

    connection_created.connect(receive)
    yield event
    event.set()
    connection_created.disconnect(receive)


def threads_of(alias: str) -> set[threading.Thread]:
    return {it for it in threading.enumerate() if it.name == f"tornjango-db-{alias}"}


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


# What comes back


@pytest.mark.gen_test
async def test_sqlite_gives_what_iterating_would_give(sqlite: None) -> None:
    async with opened():
        assert pools.status()["sqlite"]["engine"] == "threads"
        for queryset in QUERYSETS:
            fetched = await db.fetch(queryset)
            assert queryset._result_cache is None
            expected = await asyncio.to_thread(_list, unevaluated(queryset, "sqlite"))
            assert picture(fetched) == picture(expected)


def _list(queryset: Any) -> list[Any]:
    try:
        return list(queryset)
    finally:
        connections.close_all()


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


def test_postgresql_through_threads_gives_the_same(database: None) -> None:
    fill()

    def fetch(queryset: Any) -> list[Any]:
        async def run() -> list[Any]:
            async with opened(ENGINES={"default": "threads"}):
                assert pools.status()["default"]["engine"] == "threads"
                return await db.fetch(queryset)

        return asyncio.run(run())

    assert differences(fetch) == {}


@pytest.mark.gen_test
async def test_the_row_that_was_inserted_last_is_told(sqlite: None) -> None:
    async with opened():
        result = await pools.get("sqlite").execute(INSERT, ["new"])
        [(number,)] = await db.using("sqlite").query("select max(id) from app_blog")
        assert result.lastrowid == number


# Connections and their threads


@pytest.mark.gen_test
async def test_each_connection_has_a_thread_which_ends_with_it(sqlite: None) -> None:
    async with opened(POOL_SIZE=3):
        engine = pools.get("sqlite")
        assert threads_of("sqlite") == set()
        leases = [await engine.begin() for _ in range(3)]
        threads = threads_of("sqlite")
        assert len(threads) == 3
        for lease in leases:
            await lease.rollback()
        await asyncio.gather(*(engine.execute("select 1") for _ in range(20)))
        assert threads_of("sqlite") == threads
    for thread in threads:
        thread.join(5)
    assert threads_of("sqlite") == set()


@pytest.mark.gen_test
async def test_receivers_see_a_new_connection_in_its_thread_as_djangos(sqlite: None) -> None:
    seen: list[Any] = []

    def receive(sender: Any, connection: Any, **kwargs: Any) -> None:
        with connections["sqlite"].cursor() as cursor:
            cursor.execute("create temporary table seen (number)")
        seen.append((sender, connection is connections["sqlite"], threading.current_thread()))

    connection_created.connect(receive, sender=SqliteWrapper)
    try:
        async with opened(POOL_SIZE=1):
            rows = await db.using("sqlite").query("select count(*) from seen")
            assert rows == [(0,)]
    finally:
        connection_created.disconnect(receive, sender=SqliteWrapper)
    [(sender, own, thread)] = seen
    assert (sender, own, thread.name) == (SqliteWrapper, True, "tornjango-db-sqlite")


@pytest.mark.gen_test
async def test_an_aged_connection_is_replaced_when_it_is_taken(database: None) -> None:
    aged = {**connections.settings["default"], "CONN_MAX_AGE": 0.05}
    with _settings("default", aged):
        async with opened(ENGINES={"default": "threads"}, POOL_SIZE=1):
            before = await _pid()
            assert await _pid() == before
            await asyncio.sleep(0.06)
            assert await _pid() != before


@pytest.mark.gen_test
async def test_connections_stay_though_django_would_close_them_with_the_request(
    database: None,
) -> None:
    async with opened(ENGINES={"default": "threads"}, POOL_SIZE=1):
        assert connections.settings["default"]["CONN_MAX_AGE"] == 0
        assert await _pid() == await _pid()


@pytest.mark.gen_test
async def test_a_connection_that_died_idle_is_replaced(database: None, watcher: Watcher) -> None:
    async with opened(ENGINES={"default": "threads"}, POOL_SIZE=1):
        before = await _pid()
        await asyncio.to_thread(watcher.terminate, before)
        assert await _pid() != before
        before = await _pid()
        await asyncio.to_thread(watcher.terminate, before)
        async with pools.get("default").leased() as lease:
            await lease.execute(INSERT, ["after"])
            await lease.commit()
        assert await db.query("select name from app_blog") == [("after",)]


@pytest.mark.gen_test
async def test_a_connection_lost_in_a_statement_is_an_error_and_then_replaced(
    database: None, watcher: Watcher
) -> None:
    async with opened(ENGINES={"default": "threads"}, POOL_SIZE=1):
        running = asyncio.create_task(pools.get("default").execute("select pg_sleep(60)"))
        await until(lambda: watcher.running("pg_sleep(60)"))
        watcher.terminate(watcher.running("pg_sleep(60)")[0])
        with pytest.raises(OperationalError):
            await running
        assert await db.query("select 1") == [(1,)]


@pytest.mark.gen_test
async def test_a_connection_lost_in_a_transaction_takes_it_along(
    database: None, watcher: Watcher
) -> None:
    async with opened(ENGINES={"default": "threads"}, POOL_SIZE=1):
        lease = await pools.get("default").begin()
        await lease.execute(INSERT, ["lost"])
        [(pid,)] = (await lease.execute("select pg_backend_pid()")).rows
        await asyncio.to_thread(watcher.terminate, pid)
        for _ in range(2):
            with pytest.raises(OperationalError):
                await lease.execute("select 1")
        with pytest.raises(OperationalError, match="lost in a transaction"):
            await lease.commit()
        await lease.rollback()
        assert await db.query("select count(*) from app_blog") == [(0,)]


@pytest.mark.gen_test
async def test_a_commit_whose_answer_is_lost_says_that_it_is_unknown(
    database: None, watcher: Watcher
) -> None:
    async with opened(ENGINES={"default": "threads"}, POOL_SIZE=1):
        lease = await pools.get("default").begin()
        await lease.execute(INSERT, ["unknown"])
        [(pid,)] = (await lease.execute("select pg_backend_pid()")).rows
        await asyncio.to_thread(watcher.terminate, pid)
        with pytest.raises(OperationalError, match="unknown"):
            await lease.commit()
        assert await db.query("select 1") == [(1,)]


@pytest.mark.gen_test
async def test_a_server_that_comes_back_is_waited_for(own_postgres: Postgres) -> None:
    async with opened(ENGINES={"own": "threads"}, POOL_SIZE=2):
        own = db.using("own")
        await own.query("select 1")
        await asyncio.to_thread(own_postgres.stop)
        waiting = [asyncio.ensure_future(own.query("select 1")) for _ in range(3)]
        await until(lambda: pools.status()["own"]["connecting"])
        await asyncio.to_thread(own_postgres.start)
        assert await asyncio.gather(*waiting) == [[(1,)]] * 3
        assert pools.status()["own"]["in_use"] == 0


@pytest.mark.gen_test
async def test_a_connection_that_the_server_does_not_answer_for_is_replaced_where_it_is_asked(
    database: None,
) -> None:
    with _settings("default", {**connections.settings["default"], "CONN_HEALTH_CHECKS": True}):
        async with opened(ENGINES={"default": "threads"}, POOL_SIZE=1):
            before = await _pid()
            assert await _pid() == before
            [connection] = [cast("Any", it) for it in pools.get("default")._made]  # type: ignore[attr-defined]
            connection.wrapper.is_usable = lambda: False
            assert await _pid() != before
            assert pools.status()["default"]["free"] == 1


async def _pid() -> int:
    rows = await db.query("select pg_backend_pid()")
    return int(rows[0][0])


@contextmanager
def _settings(alias: str, settings: dict[str, Any]) -> Iterator[None]:
    """A database's settings, for connections that are made inside."""
    before = connections.settings[alias]
    connections.settings[alias] = settings
    try:
        yield
    finally:
        connections.settings[alias] = before


# Workers


@pytest.mark.gen_test
async def test_workers_that_all_wait_for_statements_get_them(sqlite: None) -> None:
    workers = Workers(threads=2, queue=2)
    workers.install(asyncio.get_running_loop())
    workers.enter()
    count = sync_to_async(async_to_sync(partial(_count, "sqlite")))
    try:
        async with opened(POOL_SIZE=1):
            assert await asyncio.gather(*(count() for _ in range(4))) == [1] * 4
    finally:
        workers.close()


async def _count(alias: str) -> int:
    rows = await db.using(alias).query("select count(*) from app_blog")
    return int(rows[0][0])


# Cancellation


@pytest.mark.gen_test
async def test_a_statement_is_cancelled_on_the_server(database: None, watcher: Watcher) -> None:
    async with opened(ENGINES={"default": "threads"}, POOL_SIZE=1):
        engine = pools.get("default")
        running = asyncio.create_task(engine.execute("select pg_sleep(60)"))
        await until(lambda: watcher.running("pg_sleep(60)"))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await until(lambda: not watcher.running("pg_sleep(60)"))
        await until(lambda: engine.status()["in_use"] == 0)
        assert await db.query("select 1") == [(1,)]


@pytest.mark.gen_test
async def test_what_cannot_be_cancelled_holds_its_connection_until_it_ends(
    sqlite: None, blocker: Blocker
) -> None:
    async with opened(POOL_SIZE=1, POOL_TIMEOUT=5):
        engine = pools.get("sqlite")
        running = asyncio.create_task(engine.execute("select block()"))
        await until(blocker.began.is_set)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        waiting = asyncio.create_task(engine.execute("select 1"))
        await until(lambda: engine.status()["waiting"] == 1)
        assert engine.status()["in_use"] == 1
        blocker.set()
        assert (await waiting).rows == [(1,)]


@pytest.mark.gen_test
async def test_a_statement_cancelled_while_it_connects_is_not_sent(
    sqlite: None, blocker: Blocker
) -> None:
    entered = threading.Event()

    def receive(connection: Any, **kwargs: Any) -> None:
        entered.set()
        blocker.wait(10)

    connection_created.connect(receive)
    try:
        async with opened(POOL_SIZE=1):
            engine = pools.get("sqlite")
            running = asyncio.create_task(engine.execute(INSERT, ["never"]))
            await until(entered.is_set)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            blocker.set()
            assert await _count("sqlite") == 1
    finally:
        connection_created.disconnect(receive)


@pytest.mark.gen_test
async def test_a_write_is_not_interrupted_in_a_transaction_of_sqlites(
    sqlite: None, blocker: Blocker
) -> None:
    async with opened(POOL_SIZE=1):
        async with pools.get("sqlite").leased() as lease:
            await lease.execute(INSERT, ["first"])
            await lease.execute("savepoint one")
            running = asyncio.create_task(
                lease.execute("insert into app_blog (name) select 'x' where block()")
            )
            await until(blocker.began.is_set)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            next_one = asyncio.create_task(lease.execute("rollback to savepoint one"))
            await asyncio.sleep(0.05)
            assert not next_one.done()
            blocker.set()
            await next_one
            await lease.commit()
        rows = await db.using("sqlite").query("select name from app_blog order by id")
        assert rows == [("sqlite",), ("first",)]


@pytest.mark.gen_test
async def test_a_transaction_whose_cancelled_statement_does_not_end_is_given_up(
    sqlite: None, blocker: Blocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CANCEL_TIMEOUT", 0.1)
    async with opened(POOL_SIZE=1):
        engine = pools.get("sqlite")
        lease = await engine.begin()
        await lease.execute(INSERT, ["never"])
        running = asyncio.create_task(lease.execute("select block()"))
        await until(blocker.began.is_set)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        for _ in range(2):
            with pytest.raises(OperationalError, match="did not end"):
                await lease.execute("select 1")
        with pytest.raises(OperationalError, match="did not end"):
            await lease.commit()
        await lease.rollback()
        assert engine.status()["in_use"] == 1
        blocker.set()
        assert await _count("sqlite") == 1


@pytest.mark.gen_test
async def test_closing_does_not_wait_for_what_does_not_end(
    sqlite: None, blocker: Blocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CANCEL_TIMEOUT", 0.1)
    async with opened(POOL_SIZE=1):
        engine = pools.get("sqlite")
        running = asyncio.create_task(engine.execute("select block()"))
        await until(blocker.began.is_set)
        threads = threads_of("sqlite")
        await engine.close()
        with pytest.raises(OperationalError, match="given up"):
            await running
    blocker.set()
    for thread in threads:
        await asyncio.to_thread(thread.join, 5)
    assert threads_of("sqlite") == set()


@pytest.mark.gen_test
async def test_a_database_in_memory_outlives_what_does_not_end(
    database: None, blocker: Blocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CANCEL_TIMEOUT", 0.1)
    with _settings("sqlite", {**connections.settings["sqlite"], "NAME": ":memory:"}):
        async with opened():
            engine = pools.get("sqlite")
            await engine.execute("create table one (id integer)")
            lease = await engine.begin()
            await lease.execute("insert into one values (1)")
            running = asyncio.create_task(lease.execute("select block()"))
            await until(blocker.began.is_set)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            with pytest.raises(OperationalError, match="did not end"):
                await lease.execute("select 1")
            await lease.rollback()
            blocker.set()
            assert (await engine.execute("select count(*) from one")).rows == [(0,)]


@pytest.mark.gen_test
async def test_a_commit_that_sqlite_refuses_leaves_the_connection(sqlite: None) -> None:
    async with opened(POOL_SIZE=1):
        engine = pools.get("sqlite")
        lease = await engine.begin()
        await lease.execute("insert into app_entry_authors (entry_id, author_id) values (99, 99)")
        with pytest.raises(IntegrityError):
            await lease.commit()
        assert engine.status()["free"] == 1
        rows = await engine.execute("select count(*) from app_entry_authors")
        assert rows.rows == [(0,)]


# SQLite


@pytest.mark.gen_test
async def test_a_transaction_that_sqlite_rolled_back_by_itself_is_lost(sqlite: None) -> None:
    async with opened(POOL_SIZE=1):
        lease = await pools.get("sqlite").begin()
        await lease.execute(INSERT, ["never"])
        with pytest.raises(IntegrityError):
            await lease.execute("insert or rollback into app_blog (id, name) values (1, null)")
        with pytest.raises(OperationalError, match="has ended"):
            await lease.execute(INSERT, ["in autocommit"])
        with pytest.raises(OperationalError, match="has ended"):
            await lease.commit()
        assert await _count("sqlite") == 1


@pytest.mark.gen_test
async def test_writers_wait_for_each_other(sqlite: None) -> None:
    async def write(number: int) -> None:
        async with pools.get("sqlite").leased() as lease:
            await lease.execute(INSERT, [str(number)])
            await lease.execute(INSERT, [f"{number} again"])
            await lease.commit()

    async with opened(POOL_SIZE=4):
        await asyncio.gather(*(write(number) for number in range(20)))
        assert await _count("sqlite") == 41


@pytest.mark.gen_test
async def test_the_transaction_mode_and_timeout_of_the_settings_hold(sqlite: None) -> None:
    options = {"transaction_mode": "IMMEDIATE", "timeout": 0.1}
    with _settings("sqlite", {**connections.settings["sqlite"], "OPTIONS": options}):
        async with opened(POOL_SIZE=2):
            engine = pools.get("sqlite")
            async with engine.leased():
                with pytest.raises(OperationalError, match="locked"):
                    await engine.begin()
                assert await _count("sqlite") == 1
                stream = await engine.stream("select 1")
                await stream.close()
            assert engine.status()["in_use"] == 0


@pytest.mark.gen_test
async def test_a_stream_locks_nobody_out_when_it_is_closed(sqlite: None) -> None:
    options = {"timeout": 0.1}
    with _settings("sqlite", {**connections.settings["sqlite"], "OPTIONS": options}):
        async with opened(POOL_SIZE=2):
            engine = pools.get("sqlite")
            await engine.execute("insert into app_blog (name) select 'x' from app_blog")
            stream = await engine.stream("select id from app_blog")
            await stream.fetch(1)
            await stream.close()
            await engine.execute(INSERT, ["x"])
            async with engine.leased() as lease:
                stream = await lease.stream("select id from app_blog")
                await stream.fetch(1)
                await lease.commit()
            await engine.execute(INSERT, ["x"])
            assert await _count("sqlite") == 4


@pytest.mark.parametrize("name", [":memory:", "file:threads?mode=memory&cache=shared"])
@pytest.mark.gen_test
async def test_a_database_in_memory_has_one_connection(database: None, name: str) -> None:
    with _settings("sqlite", {**connections.settings["sqlite"], "NAME": name}):
        async with opened(POOL_SIZE=5):
            engine = pools.get("sqlite")
            await engine.execute("create table one (id integer)")
            await asyncio.gather(
                *(engine.execute("insert into one values (%s)", [n]) for n in range(10))
            )
            assert (await engine.execute("select count(*) from one")).rows == [(10,)]
            assert (engine.status()["size"], engine.status()["free"]) == (1, 1)
        async with opened():
            with pytest.raises(OperationalError, match="no such table"):
                await pools.get("sqlite").execute("select count(*) from one")


@pytest.mark.gen_test
async def test_a_shared_database_in_memory_is_that_of_django(database: None) -> None:
    name = "file:shared?mode=memory&cache=shared"
    other = sqlite3.connect(name, uri=True)
    other.execute("create table one (id integer)")
    with _settings("sqlite", {**connections.settings["sqlite"], "NAME": name}):
        async with opened():
            await db.using("sqlite").query("insert into one values (1)")
    assert other.execute("select * from one").fetchall() == [(1,)]
    other.close()


# Settings


@pytest.mark.gen_test
async def test_a_pool_in_djangos_options_is_not_put_under_this_one(database: None) -> None:
    settings = {**connections.settings["default"], "OPTIONS": {"pool": True}, "AUTOCOMMIT": False}
    with _settings("default", settings):
        engine = ThreadsEngine("default", Config())
    try:
        await engine.execute(INSERT, ["committed"])
    finally:
        await engine.close()
    async with opened():
        assert await _count("default") == 1


@pytest.mark.gen_test
async def test_statements_are_logged_by_those_who_send_them(sqlite: None) -> None:
    with override_settings(DEBUG=True):
        async with opened(POOL_SIZE=1):
            engine = pools.get("sqlite")
            async with engine.leased() as lease:
                await lease.execute("select 1")
                await lease.commit()
            assert list(engine.wrapper.queries_log) == []


@pytest.mark.gen_test
async def test_the_statement_as_it_was_sent_is_told_where_the_driver_does(database: None) -> None:
    async with opened(ENGINES={"default": "threads"}):
        result = await pools.get("default").execute("select %s", ["it's"])
        assert result.sent in (b"select 'it''s'", None)
        assert (result.sent is None) == (
            connections["default"].Database.__name__ != "psycopg2"  # type: ignore[attr-defined]
        )


def test_a_collected_transaction_of_a_loop_that_is_gone_is_left_alone(sqlite: None) -> None:
    engine = ThreadsEngine("sqlite", Config(POOL_SIZE=1))

    async def begin() -> Any:
        return await engine.begin()

    lease: Any = asyncio.run(begin())
    lease.abandon()
    [connection] = [cast("Any", it) for it in engine._made]
    done = threading.Event()
    connection._thread._calls.put(_then(connection.wrapper.connection.close, done))
    assert done.wait(5)
    connection._thread.end()


def _then(fn: Callable[[], None], done: threading.Event) -> Callable[[], None]:
    def call() -> None:
        fn()
        done.set()

    return call


@pytest.mark.gen_test
async def test_an_error_that_is_not_the_databases_leaves_the_pool_whole(sqlite: None) -> None:
    async with opened(POOL_SIZE=1):
        engine = pools.get("sqlite")
        for wrong in ([object()], ["\ud800"], [2**80]):
            with pytest.raises((DatabaseError, OverflowError, UnicodeEncodeError, TypeError)):
                await engine.execute("select %s", wrong)
        with pytest.raises(TypeError):
            await engine.execute(None)  # type: ignore[arg-type]
        assert (await engine.execute("select 1")).rows == [(1,)]


@pytest.mark.gen_test
async def test_a_connection_that_goes_before_its_statement_keeps_no_place(
    database: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire = ThreadsEngine._acquire

    async def acquire_lost(self: ThreadsEngine) -> Any:
        connection = await acquire(self)
        connection.discard()
        return connection

    async with opened(ENGINES={"default": "threads"}, POOL_SIZE=1):
        await db.query("select 1")
        with monkeypatch.context() as patched:
            patched.setattr(ThreadsEngine, "_acquire", acquire_lost)
            with pytest.raises(OperationalError, match="given up"):
                await db.query("select 1")
        assert pools.status()["default"]["in_use"] == 0
        assert await db.query("select 1") == [(1,)]
