from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import SyncToAsync
from django.db import connections
from django.db.backends.postgresql.base import Database
from django.db.backends.postgresql.psycopg_any import errors, is_psycopg3
from django.db.utils import (
    DataError,
    IntegrityError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
)
from django.test import override_settings
from tornado.ioloop import IOLoop

from tests.app.models import Blog, CuriousBlog, Entry
from tests.database import QUERYSETS, Watcher, differences, fill, opened, outcome, pid, start, until
from tests.postgres import Postgres
from tornjango import db
from tornjango.db import pools
from tornjango.db.engines import base
from tornjango.db.fetching import SLICE

Fetch = Callable[[Any], list[Any]]


@pytest.fixture
def fetch(database: None, io_loop: IOLoop) -> Iterator[Fetch]:
    """`db.fetch` on an open pool, for tests that are not coroutines; the tables are filled."""
    fill()
    pool = opened()
    io_loop.run_sync(pool.__aenter__)
    yield lambda queryset: io_loop.run_sync(lambda: db.fetch(queryset))
    io_loop.run_sync(lambda: pool.__aexit__(None, None, None))


# What comes back


def test_querysets_come_back_as_when_iterated(fetch: Fetch) -> None:
    assert differences(fetch) == {}
    assert pools.status()["default"]["engine"] == ("psycopg" if is_psycopg3 else "momoko")


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
    assert (logged[1], logged[3]) == ("select nothing", "select pg_backend_pid()")
    assert [record.alias for record in caplog.records] == ["default"] * 4  # type: ignore[attr-defined]


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
            ("nonsense", None, ProgrammingError, errors.SyntaxError),
            ("select 1 / %s", [0], DataError, errors.DivisionByZero),
            (
                "insert into app_blog (id) values (1)",
                (),
                IntegrityError,
                errors.NotNullViolation,
            ),
            ("select %s", [object()], ProgrammingError, Database.ProgrammingError),
            ("copy app_blog to stdout", None, ProgrammingError, Database.ProgrammingError),
        ]:
            if error is None:
                assert await db.query(sql, params) == [()]
                continue
            with pytest.raises(error) as caught:
                await db.query(sql, params)
            assert type(caught.value.__cause__) is cause
        with pytest.raises(ProgrammingError if is_psycopg3 else IndexError):
            await db.query("select %s, %s", [1])
        assert await db.query("select 1") == [(1,)]
        assert pools.status()["default"]["in_use"] == 0


def _keep_from_cancelling(monkeypatch: pytest.MonkeyPatch) -> None:
    if is_psycopg3:
        from tornjango.db.engines.libpq import Link

        monkeypatch.setattr(Link, "_tell_to_cancel", lambda self: asyncio.sleep(0))
    else:
        from tornjango.db.engines import cancel

        monkeypatch.setattr(cancel, "prepare", lambda connection: lambda: None)


@pytest.mark.gen_test
async def test_a_connection_whose_statement_cannot_be_cancelled_is_given_up(
    database: None, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CANCEL_TIMEOUT", 0.05)
    _keep_from_cancelling(monkeypatch)
    async with opened(POOL_SIZE=1):
        before = await pid()
        task = start("select pg_sleep(60)")
        await until(lambda: watcher.running("pg_sleep(60)"))
        task.cancel()
        assert await pid() != before
    for left in watcher.running("pg_sleep(60)"):
        watcher.terminate(left)


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
