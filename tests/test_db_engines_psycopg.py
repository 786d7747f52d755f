"""What is psycopg's own; what it has in common with momoko is tested in test_db_engines_postgres.py and its likes."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import connection, connections
from django.db.utils import DataError, IntegrityError, OperationalError, ProgrammingError
from django.test import override_settings
from tornado.ioloop import IOLoop

from tests.app.models import Blog, Everything
from tests.database import Watcher, differences, fill, opened, pid, until
from tornjango import db, green
from tornjango.db import pools

psycopg = pytest.importorskip("psycopg")

from psycopg import sql  # noqa: E402
from psycopg.types.json import Jsonb  # noqa: E402
from psycopg.types.numeric import Int4  # noqa: E402
from psycopg.types.range import Range  # noqa: E402

from tornjango.db.engines.psycopg_prepared import KEPT  # noqa: E402

PREPARED = "select name, statement from pg_prepared_statements order by prepare_time"


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """``OPTIONS`` of database "default", to be filled; Django's own connection has them too."""
    options: dict[str, Any] = {}
    connections["default"].close()
    monkeypatch.setitem(connections.settings["default"], "OPTIONS", options)
    monkeypatch.setitem(connections["default"].settings_dict, "OPTIONS", options)
    yield options
    connections["default"].close()


def on_own(fn: Callable[[Any], Any]) -> Any:
    """``fn(cursor)`` with a cursor of a connection that Django opens, in a thread."""
    try:
        with connection.cursor() as cursor:
            return fn(cursor)
    finally:
        connection.close()


# Parameters


@pytest.mark.gen_test
@pytest.mark.parametrize("server_side", [False, True])
async def test_parameters_of_psycopgs_own_types(
    database: None, options: dict[str, Any], server_side: bool
) -> None:
    options["server_side_binding"] = server_side
    statement = "select %s, %s, %s, %s::text, %s::timestamptz, pg_typeof(%s)::text"
    moment = dt.datetime(2024, 3, 31, 1, 30, tzinfo=dt.UTC)
    params = [Jsonb({"a": [1]}), Range(1, 5), Int4(7), "it's \\ 100%", moment, Int4(7)]
    async with opened():
        ours = await db.query(statement, params)

    def run(cursor: Any) -> Any:
        cursor.execute(statement, params)
        return cursor.fetchall()

    assert ours == await asyncio.to_thread(on_own, run)
    assert ours[0][-1] == "integer"


@pytest.mark.gen_test
async def test_statements_that_are_composed(database: None) -> None:
    statement = sql.SQL("select {} as {}, %s").format(
        sql.Literal("it's"), sql.Identifier('a "name"')
    )
    async with opened():
        rows = await db.query(statement, [1])  # type: ignore[arg-type]
        assert (rows, rows.columns) == ([("it's", 1)], ['a "name"', "?column?"])


@pytest.mark.gen_test
async def test_of_several_statements_the_first_ones_rows_and_anyones_error(database: None) -> None:
    async with opened(POOL_SIZE=1):
        assert await db.query("select 1; select 2") == [(1,)]
        with pytest.raises(DataError):
            await db.query("select 1; select 1 / 0")
        assert await db.query("") == []


def test_server_side_binding_changes_no_result(
    database: None, options: dict[str, Any], io_loop: IOLoop
) -> None:
    options["server_side_binding"] = True
    fill()
    pool = opened()
    io_loop.run_sync(pool.__aenter__)
    assert differences(lambda queryset: io_loop.run_sync(lambda: db.fetch(queryset))) == {}
    io_loop.run_sync(lambda: pool.__aexit__(None, None, None))


@pytest.mark.gen_test
async def test_server_side_binding_sends_parameters_apart(
    database: None, options: dict[str, Any], watcher: Watcher
) -> None:
    options["server_side_binding"] = True
    async with opened():
        task = asyncio.create_task(pools.get("default").execute("select pg_sleep(%s)", [60]))
        await until(lambda: watcher.running("pg_sleep($1)"))
        task.cancel()
        await until(lambda: pools.status()["default"]["in_use"] == 0)
        with pytest.raises(ProgrammingError, match="multiple commands"):
            await db.query("select %s; select 2", [1])


@pytest.mark.gen_test
async def test_a_statement_as_large_as_any_is_sent_while_others_run(database: None) -> None:
    text = "x" * 3_000_000
    async with opened(POOL_SIZE=2):
        large = asyncio.create_task(
            pools.get("default").execute("select length(%s), %s", [text] * 2)
        )
        assert await db.query("select 1") == [(1,)]
        [row] = (await large).rows
    assert row == (len(text), text)


# Prepared on the server


@pytest.fixture
def preparing(options: dict[str, Any]) -> None:
    options |= {"server_side_binding": True, "prepare_threshold": 2}


@pytest.mark.gen_test
async def test_a_statement_is_prepared_when_it_has_run_often(
    database: None, preparing: None
) -> None:
    async with opened(POOL_SIZE=1):
        for number in range(4):
            assert await db.query("select %s + 1", [number]) == [(number + 1,)]
        assert [it for _, it in await db.query(PREPARED)] == ["select $1 + 1"]
        assert await db.query("select %s + 1", [7]) == [(8,)]


@pytest.mark.gen_test
async def test_a_statement_that_fails_is_prepared_once(database: None, preparing: None) -> None:
    async with opened(POOL_SIZE=1):
        for divisor in (1, 1, 0, 0, 0, 1):
            try:
                assert await db.query("select 1 / %s", [divisor]) == [(1,)]
            except DataError:
                assert divisor == 0
        assert len(await db.query(PREPARED)) == 1


@pytest.mark.gen_test
async def test_prepared_statements_are_bounded(database: None, preparing: None) -> None:
    async with opened(POOL_SIZE=1):
        for number in range(KEPT + 20):
            for _ in range(3):
                await db.query(f"select %s + {number}", [1])
        assert KEPT - 1 <= len(await db.query(PREPARED)) <= KEPT + 1


@pytest.mark.gen_test
async def test_prepared_statements_are_forgotten_when_tables_change(
    database: None, preparing: None
) -> None:
    async with opened(POOL_SIZE=1):
        await db.query("create temporary table changing (x integer)")
        for _ in range(3):
            assert await db.query("select * from changing where %s", [True]) == []
        await db.query("alter table changing add y integer")
        rows = await db.query("select * from changing where %s", [True])
        assert rows.columns == ["x", "y"]


@pytest.mark.gen_test
async def test_a_rollback_is_not_held_up_by_forgetting(database: None, preparing: None) -> None:
    async with opened(POOL_SIZE=1):
        for _ in range(3):
            await db.query("select %s", [1])
        async with pools.get("default").leased() as lease:
            await lease.execute("create temporary table changing ()")
            await lease.execute("alter table changing add x integer")
            await lease.execute("savepoint a")
            with pytest.raises(DataError):
                await lease.execute("select 1 / %s", [0])
            await lease.execute("rollback to savepoint a")
            assert (await lease.execute("select %s", [2])).rows == [(2,)]


# What is not a statement


@pytest.mark.gen_test
async def test_copy_is_refused_and_costs_no_more_than_a_connection(database: None) -> None:
    async with opened(POOL_SIZE=1):
        for statement in ("copy app_blog to stdout", "copy app_blog from stdin"):
            with pytest.raises(ProgrammingError, match="COPY cannot be used") as caught:
                await db.query(statement)
            assert type(caught.value.__cause__) is psycopg.ProgrammingError
            assert await db.query("select 1") == [(1,)]


@pytest.mark.gen_test
async def test_notifications_of_a_channel_that_somebody_listens_to_by_hand_go_nowhere(
    database: None,
) -> None:
    async with opened(POOL_SIZE=1):
        await db.query("listen hand")
        await db.query("select pg_notify('hand', repeat('x', 7000))")
        assert await db.query("select 1") == [(1,)]


@pytest.mark.gen_test
async def test_a_zone_that_a_transaction_sets_is_met_as_django_meets_it(database: None) -> None:
    statement = "select '2024-01-01 12:00+00'::timestamptz"

    def run(cursor: Any) -> Any:
        cursor.execute("set time zone 'Asia/Tokyo'")
        cursor.execute(statement)
        return cursor.fetchone()

    async with opened(POOL_SIZE=1):
        before = await db.query(statement)
        async with pools.get("default").leased() as lease:
            await lease.execute("set local time zone 'Asia/Tokyo'")
            inside = (await lease.execute(statement)).rows
        assert await db.query(statement) == before
    assert inside == [await asyncio.to_thread(on_own, run)]


# In green code


@pytest.mark.gen_test
async def test_djangos_functions_that_quote_by_the_driver(database: None) -> None:
    def in_green() -> tuple[Any, ...]:
        ops = connection.ops
        with connection.cursor() as cursor:
            composed = ops.compose_sql("select %s, %s", ["it's", [1, 2]])
            quoted = sql.quote("it's", connection.connection)
            cursor.execute("select %s as x", ["it's"])
            return composed, quoted, ops.last_executed_query(cursor, "", ()), cursor.description[0]

    async with opened():
        composed, quoted, last, column = await green.run(in_green)
    assert composed == "select 'it''s', '{1,2}'::int2[]"
    assert (quoted, last) == ("'it''s'", "select 'it''s' as x")
    assert (column.name, column.type_code, column[0]) == ("x", 25, "x")


@pytest.mark.gen_test
async def test_introspection_reads_what_describes_a_column(database: None) -> None:
    def tables() -> list[Any]:
        with connection.cursor() as cursor:
            return connection.introspection.get_table_description(cursor, Everything._meta.db_table)

    async with opened():
        ours = await green.run(tables)
    assert ours == await asyncio.to_thread(lambda: on_own(lambda cursor: tables()))


@pytest.mark.gen_test
async def test_under_debug_a_statement_with_parameters_apart_is_logged_with_them(
    database: None, options: dict[str, Any]
) -> None:
    options["server_side_binding"] = True
    with override_settings(DEBUG=True):
        async with opened():
            await db.fetch(Blog.objects.filter(name="it's"))
            logged = connections["default"].queries
    assert "'it''s'" in logged[-1]["sql"]


# Connections


@pytest.mark.gen_test
async def test_options_of_djangos_own_pool_and_cursors_are_left_out(
    database: None, options: dict[str, Any]
) -> None:
    options |= {"pool": {"max_size": 1}, "cursor_factory": psycopg.ClientCursor}
    async with opened():
        assert len(await asyncio.gather(*(pid() for _ in range(3)))) == 3


@pytest.mark.gen_test
async def test_a_server_that_ends_an_idle_connection_is_heard_without_a_query(
    database: None, watcher: Watcher
) -> None:
    async with opened(POOL_SIZE=1):
        lease = await pools.get("default").begin()
        [(number,)] = (await lease.execute("select pg_backend_pid()")).rows
        await asyncio.to_thread(watcher.terminate, number)
        await until(lambda: lease.aborted)  # type: ignore[attr-defined]
        with pytest.raises(OperationalError, match="terminating connection due to administrator"):
            await lease.execute("select 1")
        await lease.rollback()


@pytest.mark.gen_test
async def test_a_deferred_constraint_fails_the_commit_and_the_connection_stays(
    database: None,
) -> None:
    async with opened(POOL_SIZE=1):
        before = await pid()
        async with pools.get("default").leased() as lease:
            await lease.execute("insert into app_entry_tag (entry_id, tag_id) values (-1, -1)")
            with pytest.raises(IntegrityError):
                await lease.commit()
        assert await pid() == before


@pytest.mark.gen_test
async def test_a_lost_connection_is_an_operational_error_whatever_the_reason(
    database: None,
) -> None:
    async with opened(POOL_SIZE=1), pools.get("default").leased() as lease:
        await lease.execute("set idle_in_transaction_session_timeout = 20")
        # The loop does not get to hear of it before the next statement is sent.
        time.sleep(0.2)  # noqa: ASYNC251
        with pytest.raises(OperationalError, match="idle-in-transaction timeout"):
            await lease.execute("select 1")
