from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from django.core.exceptions import SynchronousOnlyOperation
from django.db import DatabaseError, connection, connections, transaction
from django.db.backends.postgresql.psycopg_any import IsolationLevel
from django.db.models import Count
from django.db.transaction import TransactionManagementError
from django.db.utils import (
    IntegrityError,
    InterfaceError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
)
from django.test import TestCase, override_settings
from django.test.utils import CaptureQueriesContext

from tests.app.models import Blog, Entry, Tag
from tests.database import Watcher, opened, until
from tests.postgres import Postgres
from tornjango import db, green
from tornjango.db import pools
from tornjango.db.cursors import PoolConnection

pytestmark = pytest.mark.usefixtures("database")


@pytest.fixture
def watcher(postgres: Postgres) -> Iterator[Watcher]:
    watcher = Watcher(postgres.dsn("tornjango"))
    yield watcher
    watcher.close()


def names() -> list[str]:
    return list(Blog.objects.order_by("pk").values_list("name", flat=True))


def add(name: str) -> Blog:
    return Blog.objects.create(name=name)


def pid(alias: str = "default") -> int:
    with connections[alias].cursor() as cursor:
        cursor.execute("select pg_backend_pid()")
        return int(cursor.fetchone()[0])


def fail() -> None:
    raise ZeroDivisionError


@contextmanager
def fails(**options: Any) -> Iterator[None]:
    """An atomic block with an error at its end."""
    try:
        with transaction.atomic(**options):
            yield
            fail()
    except ZeroDivisionError:
        return
    raise AssertionError("The error was lost.")


async def in_pool(fn: Callable[[], Any], **options: Any) -> Any:
    """What green code gives over pools that are open for it."""
    async with opened(**options):
        result = await green.run(fn)
        assert pools.status()["default"]["in_use"] == 0
        return result


# Transactions


@pytest.mark.gen_test
async def test_a_block_commits_or_rolls_back() -> None:
    def code() -> list[str]:
        with transaction.atomic():
            add("kept")
            assert connection.in_atomic_block
        with fails():
            add("lost")
        return names()

    assert await in_pool(code) == ["kept"]


@pytest.mark.gen_test
async def test_a_block_has_one_connection_and_autocommit_any() -> None:
    def code() -> None:
        with transaction.atomic():
            own = pid()
            with transaction.atomic():
                assert [pid() for _ in range(5)] == [own] * 5
            green.wait(asyncio.sleep(0))
            assert pid() == own

    async with opened(POOL_SIZE=3):
        await asyncio.gather(*(green.run(code) for _ in range(9)))


@pytest.mark.gen_test
async def test_nothing_is_held_before_the_first_statement_of_a_block() -> None:
    def code() -> list[int]:
        held = []
        with transaction.atomic():
            held.append(pools.status()["default"]["in_use"])
            names()
            held.append(pools.status()["default"]["in_use"])
        return [*held, pools.status()["default"]["in_use"]]

    assert await in_pool(code) == [0, 1, 0]


@pytest.mark.gen_test
async def test_savepoints_roll_back_what_is_in_them() -> None:
    def code() -> list[str]:
        with transaction.atomic():
            add("outer")
            with pytest.raises(IntegrityError), transaction.atomic():
                Tag.objects.bulk_create([Tag(slug="x"), Tag(slug="x")])
            with fails():
                add("middle")
                with transaction.atomic():
                    add("inner")
            with transaction.atomic():
                with fails():
                    add("inner")
                add("middle")
            assert not Tag.objects.exists()
        return names()

    assert await in_pool(code) == ["outer", "middle"]


@pytest.mark.gen_test
async def test_savepoints_by_hand() -> None:
    def code() -> list[str]:
        with transaction.atomic():
            first = connection.savepoint()
            add("a")
            connection.savepoint_commit(first)
            second = connection.savepoint()
            add("b")
            connection.savepoint_rollback(second)
        return names()

    assert await in_pool(code) == ["a"]


@pytest.mark.gen_test
async def test_without_a_savepoint_an_error_inside_marks_the_block_outside() -> None:
    def code() -> list[str]:
        with transaction.atomic():
            add("lost")
            with fails(savepoint=False):
                pass
            assert transaction.get_rollback()
            with pytest.raises(TransactionManagementError, match="until the end of the 'atomic'"):
                names()
        return names()

    assert await in_pool(code) == []


@pytest.mark.gen_test
async def test_a_durable_block_is_outermost() -> None:
    def code() -> list[str]:
        with transaction.atomic(durable=True):
            add("durable")
        with transaction.atomic(), pytest.raises(RuntimeError, match="durable"):
            transaction.atomic(durable=True).__enter__()
        return names()

    assert await in_pool(code) == ["durable"]


@pytest.mark.gen_test
async def test_set_rollback_rolls_back_at_the_end() -> None:
    def code() -> list[str]:
        with transaction.atomic():
            add("lost")
            transaction.set_rollback(True)
        return names()

    assert await in_pool(code) == []


@pytest.mark.gen_test
async def test_a_decorated_function_is_a_block() -> None:
    @transaction.atomic
    def code() -> None:
        add("lost")
        assert connection.in_atomic_block
        fail()

    async with opened():
        with pytest.raises(ZeroDivisionError):
            await green.run(code)
        assert await green.run(names) == []


@pytest.mark.gen_test
async def test_transactions_by_hand() -> None:
    def code() -> list[str]:
        transaction.set_autocommit(False)
        add("kept")
        transaction.commit()
        add("lost")
        transaction.rollback()
        with transaction.atomic():
            add("kept, too")
        transaction.commit()
        transaction.set_autocommit(True)
        assert transaction.get_autocommit()
        return names()

    assert await in_pool(code) == ["kept", "kept, too"]


@pytest.mark.gen_test
async def test_autocommit_cannot_be_set_in_the_middle_of_a_transaction() -> None:
    def code() -> None:
        transaction.set_autocommit(False)
        names()
        with pytest.raises(ProgrammingError, match="autocommit"):
            transaction.set_autocommit(True)
        transaction.rollback()
        transaction.set_autocommit(True)

    await in_pool(code)


@pytest.mark.gen_test
async def test_a_transaction_that_is_left_open_is_rolled_back_and_logged(
    error_log: list[logging.LogRecord],
) -> None:
    def code() -> None:
        transaction.set_autocommit(False)
        add("lost")

    async with opened(POOL_SIZE=1):
        await green.run(code)
        assert "left a transaction open on database 'default'" in error_log.pop().getMessage()
        assert await green.run(names) == []
        assert await green.run(transaction.get_autocommit)


@pytest.mark.gen_test
async def test_an_atomic_block_that_is_left_open_is_rolled_back_and_logged(
    error_log: list[logging.LogRecord],
) -> None:
    def code() -> None:
        transaction.atomic().__enter__()
        add("lost")

    async with opened(POOL_SIZE=1):
        await green.run(code)
        assert "left a transaction open" in error_log.pop().getMessage()
        assert await green.run(names) == []
        assert not await green.run(lambda: connection.in_atomic_block)


@pytest.mark.gen_test
async def test_two_at_once_never_share_a_transaction() -> None:
    both = asyncio.Barrier(2)

    def code(name: str) -> tuple[list[str], int]:
        with transaction.atomic():
            add(name)
            green.wait(both.wait())
            seen = names()
            green.wait(both.wait())
            return seen, pid()

    async with opened():
        first, second = await asyncio.gather(green.run(code, "a"), green.run(code, "b"))
        assert (first[0], second[0]) == (["a"], ["b"])
        assert first[1] != second[1]


@pytest.mark.gen_test
async def test_fifty_transactions_some_rolled_back() -> None:
    def code(number: int) -> None:
        with transaction.atomic():
            add(f"{number} outer")
            green.wait(asyncio.sleep(0))
            try:
                with transaction.atomic():
                    add(f"{number} inner")
                    if number % 3 == 0:
                        fail()
            except ZeroDivisionError:
                pass
            if number % 5 == 0:
                fail()

    async with opened(POOL_SIZE=4):
        results = await asyncio.gather(
            *(green.run(code, number) for number in range(50)), return_exceptions=True
        )
        assert [type(it) for it in results] == [
            ZeroDivisionError if number % 5 == 0 else type(None) for number in range(50)
        ]
        expected = {f"{n} outer" for n in range(50) if n % 5}
        expected |= {f"{n} inner" for n in range(50) if n % 5 and n % 3}
        assert set(await green.run(names)) == expected
        assert pools.status()["default"]["in_use"] == 0


@pytest.mark.gen_test
async def test_several_databases_in_one_block(own_postgres: Postgres) -> None:
    own_postgres.psql("truncate app_blog cascade", "tornjango")

    def code() -> list[Any]:
        with transaction.atomic(), transaction.atomic(using="own"):
            add("default")
            Blog.objects.using("own").create(name="own")
            assert pid() != pid("own")
        with fails(), transaction.atomic(using="own"):
            add("lost")
            Blog.objects.using("own").create(name="committed before the error")
        return names() + [it.name for it in Blog.objects.using("own")]

    assert await in_pool(code) == ["default", "own", "committed before the error"]


class ToOwn:
    def db_for_read(self, model: Any, **hints: Any) -> str | None:
        return "own" if model is Tag else None

    db_for_write = db_for_read


@pytest.mark.gen_test
async def test_routers_are_asked(own_postgres: Postgres) -> None:
    own_postgres.psql("truncate app_tag cascade", "tornjango")

    def code() -> tuple[int, int]:
        Tag.objects.create(slug="there")
        return Tag.objects.count(), Tag.objects.using("default").count()

    with override_settings(DATABASE_ROUTERS=["tests.test_db_connection.ToOwn"]):
        assert await in_pool(code) == (1, 0)


@pytest.mark.gen_test
async def test_an_isolation_level_is_the_transactions() -> None:
    def level() -> str:
        with connection.cursor() as cursor:
            cursor.execute("show transaction_isolation")
            return str(cursor.fetchone()[0])

    def code() -> tuple[str, str]:
        with transaction.atomic():
            return level(), pid() and level()

    settings = connections.settings["default"]
    before = settings["OPTIONS"]
    settings["OPTIONS"] = {**before, "isolation_level": IsolationLevel.SERIALIZABLE}
    try:
        async with opened():
            assert await green.run(code) == ("serializable", "serializable")
            assert await green.run(level) == "read committed"
    finally:
        settings["OPTIONS"] = before


# Hooks on commit


@pytest.mark.gen_test
async def test_hooks_run_after_the_commit_in_their_order() -> None:
    order: list[Any] = []

    async def later() -> None:
        await asyncio.sleep(0)
        order.append(("async", await Blog.objects.acount()))

    def code() -> None:
        with transaction.atomic():
            transaction.on_commit(lambda: order.append("first"))
            with transaction.atomic():
                transaction.on_commit(later)
                add("x")
            with fails():
                transaction.on_commit(lambda: order.append("never"))
            transaction.on_commit(lambda: order.append(pools.status()["default"]["in_use"]))
            order.append("committing")
        order.append("left")

    await in_pool(code)
    assert order == ["committing", "first", ("async", 1), 0, "left"]


@pytest.mark.gen_test
async def test_hooks_of_what_is_rolled_back_never_run() -> None:
    def code() -> None:
        with fails():
            transaction.on_commit(fail)
        with transaction.atomic():
            transaction.on_commit(fail)
            transaction.set_rollback(True)
        with transaction.atomic():
            names()

    await in_pool(code)


@pytest.mark.gen_test
async def test_a_hook_that_fails_keeps_later_ones_from_running_unless_it_is_robust(
    error_log: list[logging.LogRecord],
) -> None:
    seen: list[str] = []

    async def fail_later() -> None:
        await asyncio.sleep(0)
        fail()

    def code(hook: Callable[[], Any], robust: bool) -> None:
        with transaction.atomic():
            add("kept")
            transaction.on_commit(hook, robust=robust)
            transaction.on_commit(lambda: seen.append("after"))

    async with opened():
        for hook in (fail, fail_later):
            with pytest.raises(ZeroDivisionError):
                await green.run(code, hook, False)
            assert seen == []
            await green.run(code, hook, True)
            assert hook.__qualname__ in error_log.pop().getMessage()
            assert seen.pop() == "after"
        assert await green.run(names) == ["kept"] * 4


@pytest.mark.gen_test
async def test_a_hook_may_begin_a_transaction_with_hooks_of_its_own() -> None:
    seen: list[str] = []

    def hook() -> None:
        with transaction.atomic():
            add("by the hook")
            transaction.on_commit(lambda: seen.append("inner"))

    def code() -> list[str]:
        with transaction.atomic():
            transaction.on_commit(hook)
            transaction.on_commit(lambda: seen.append("outer"))
        return names()

    assert await in_pool(code) == ["by the hook"]
    assert seen == ["inner", "outer"]


@pytest.mark.gen_test
async def test_outside_of_transactions_a_hook_runs_at_once() -> None:
    seen: list[str] = []

    async def hook() -> None:
        await asyncio.sleep(0)
        seen.append("async")

    def code() -> list[str]:
        transaction.on_commit(lambda: seen.append("sync"))
        transaction.on_commit(hook)
        return list(seen)

    assert await in_pool(code) == ["sync", "async"]
    async with opened():
        # On the loop, where nothing waits.
        transaction.on_commit(lambda: seen.append("sync on the loop"))
        transaction.on_commit(hook)
        assert seen[2:] == ["sync on the loop"]
        await until(lambda: seen[3:] == ["async"])


@pytest.mark.gen_test
async def test_by_hand_there_are_no_hooks() -> None:
    def code() -> None:
        transaction.set_autocommit(False)
        with pytest.raises(TransactionManagementError, match="manual"):
            transaction.on_commit(fail)
        transaction.set_autocommit(True)

    await in_pool(code)


# Locks and cursors


@pytest.mark.gen_test
async def test_rows_are_locked_in_a_transaction_and_only_there(watcher: Watcher) -> None:
    unlocked = "select name from app_blog for update skip locked"

    def code() -> None:
        with pytest.raises(TransactionManagementError, match="outside of a transaction"):
            list(Blog.objects.select_for_update())
        with transaction.atomic():
            assert Blog.objects.select_for_update().get().name == "x"
            assert watcher.rows(unlocked) == []
        assert watcher.rows(unlocked) == [("x",)]

    async with opened():
        await green.run(add, "x")
        await green.run(code)


@pytest.mark.gen_test
async def test_iterator_fetches_by_a_cursor_inside_and_outside_of_a_transaction() -> None:
    def iterate() -> tuple[int, int]:
        held = set()
        numbers = []
        for row in Blog.objects.order_by("pk").iterator(chunk_size=10):
            held.add(pools.status()["default"]["in_use"])
            numbers.append(int(row.name))
            if row.name == "5":
                add("later")
        assert numbers == list(range(35))
        [in_use] = held
        return in_use, pools.status()["default"]["in_use"]

    def in_block() -> tuple[int, int]:
        with transaction.atomic():
            result = iterate()
            Blog.objects.filter(name="later").delete()
        return result

    async with opened():
        await Blog.objects.abulk_create(Blog(name=str(number)) for number in range(35))
        assert await green.run(in_block) == (1, 1)
        assert await green.run(iterate) == (1, 0)


@pytest.mark.gen_test
async def test_an_iterator_that_is_left_gives_its_connection_back() -> None:
    def leave() -> None:
        for _ in Blog.objects.iterator(chunk_size=1):
            break

    def break_off() -> None:
        for _ in Blog.objects.iterator(chunk_size=1):
            fail()

    async with opened(POOL_SIZE=1):
        await Blog.objects.abulk_create(Blog(name=str(number)) for number in range(5))
        await green.run(leave)
        with pytest.raises(ZeroDivisionError):
            await green.run(break_off)
        await until(lambda: not pools.status()["default"]["in_use"])
        assert await green.run(Blog.objects.count) == 5


@pytest.mark.gen_test
async def test_a_cursor_gives_rows_as_djangos_does() -> None:
    def code() -> None:
        with connection.cursor() as cursor:
            cursor.execute("select n, n * %s as twice from generate_series(1, 7) n", [2])
            assert cursor.rowcount == 7
            assert [column[0] for column in cursor.description] == ["n", "twice"]
            assert cursor.fetchone() == (1, 2)
            assert cursor.fetchmany(2) == [(2, 4), (3, 6)]
            assert cursor.fetchmany() == [(4, 8)]
            assert next(iter(cursor)) == (5, 10)
            assert cursor.fetchall() == [(6, 12), (7, 14)]
            assert (cursor.fetchone(), cursor.fetchmany(3), cursor.fetchall()) == (None, [], [])
            cursor.execute("select 1")
            assert list(cursor) == [(1,)]

    await in_pool(code)


@pytest.mark.gen_test
async def test_a_cursor_of_a_statement_without_rows() -> None:
    def code() -> None:
        with connection.cursor() as cursor:
            with pytest.raises(ProgrammingError, match="no results"):
                cursor.fetchone()
            cursor.execute("insert into app_blog (name) values ('a'), ('b')")
            assert (cursor.description, cursor.rowcount) == (None, 2)
            with pytest.raises(ProgrammingError, match="no results"):
                cursor.fetchall()
            with pytest.raises(ProgrammingError):
                cursor.execute("select * from nowhere")
            with pytest.raises(ProgrammingError, match="no results"):
                cursor.fetchall()
        with pytest.raises(InterfaceError, match="closed"):
            cursor.execute("select 1")

    await in_pool(code)


@pytest.mark.gen_test
async def test_a_cursors_other_ways_to_execute() -> None:
    def code() -> None:
        with connection.cursor() as cursor:
            cursor.executemany("insert into app_blog (name) values (%s)", [["a"], ["b"], ["c"]])
            assert cursor.rowcount == 3
            cursor.callproc("generate_series", [1, 3])
            assert cursor.fetchall() == [(1,), (2,), (3,)]
            cursor.callproc("pg_backend_pid")
            assert len(cursor.fetchall()) == 1
            cursor.execute("select '100%%', %(x)s", {"x": 1})
            assert cursor.fetchone() == ("100%", 1)
            cursor.execute("select '100%'")
            assert cursor.fetchone() == ("100%",)
            assert cursor.mogrify("select %s", ["it's"]) == b"select 'it''s'"
            cursor.execute("select %s", ["it's"])
            assert cursor.query == b"select 'it''s'"
        assert names() == ["a", "b", "c"]

    await in_pool(code)


@pytest.mark.gen_test
async def test_a_server_side_cursor_as_iterator_uses_it() -> None:
    def code() -> None:
        with connection.chunked_cursor() as cursor:
            with pytest.raises(ProgrammingError, match="no results"):
                cursor.fetchone()
            cursor.execute("select * from generate_series(1, 10)")
            assert cursor.fetchone() == (1,)
            assert cursor.fetchmany(2) == [(2,), (3,)]
            assert cursor.fetchall() == [(number,) for number in range(4, 11)]
            assert cursor.fetchone() is None
            with pytest.raises(NotSupportedError):
                cursor.executemany("select 1", [])
        cursor.close()

    await in_pool(code)


@pytest.mark.gen_test
async def test_what_only_the_driver_has_is_refused_by_name() -> None:
    def code() -> None:
        connection.ensure_connection()
        with pytest.raises(AttributeError, match=r"'lobject'.*one of many of a pool"):
            connection.connection.lobject()

    await in_pool(code)


# Watching


@pytest.mark.gen_test
async def test_execute_wrappers_see_every_statement_of_their_block() -> None:
    seen: list[str] = []

    def note(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        seen.append(sql.split()[0])
        return execute(sql, params, many, context)

    def code() -> None:
        with connection.execute_wrapper(note), transaction.atomic():
            add("x")
            list(Blog.objects.iterator())
            green.wait(db.fetch(Blog.objects.all()))
        names()

    await in_pool(code)
    assert seen == ["INSERT", "SELECT", "SELECT"]


@pytest.mark.gen_test
async def test_queries_are_counted_in_green_code() -> None:
    case = TestCase()

    def code() -> list[str]:
        with case.assertNumQueries(2):
            add("x")
            names()
        with pytest.raises(AssertionError), case.assertNumQueries(2):
            names()
        with CaptureQueriesContext(connection) as captured, transaction.atomic():
            add("it's")
            with transaction.atomic():
                green.wait(db.fetch(Blog.objects.filter(name="y")))
        assert not connection.force_debug_cursor
        return [it["sql"] for it in captured]

    statements = await in_pool(code)
    words = [it.split()[0] for it in statements]
    assert words == ["BEGIN", "INSERT", "SAVEPOINT", "SELECT", "RELEASE", "COMMIT"]
    assert "'it''s'" in statements[1]
    assert "'y'" in statements[3]


@pytest.mark.gen_test
async def test_under_debug_every_query_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="django.db.backends")
    with override_settings(DEBUG=True):
        async with opened():
            await green.run(add, "green")
            await db.fetch(Blog.objects.filter(name="fetched"))
            await db.query("select %s", ["raw"])
            with pytest.raises(ProgrammingError):
                await db.query("select wrong")
            async with db.atomic():
                await db.fetch(Blog.objects.filter(name="in a block"))
            async for _ in db.stream(Blog.objects.filter(name="streamed")):
                pass
            logged = [it["sql"] for it in connection.queries]
    parts = ["'green'", "'fetched'", "'raw'", "wrong", "BEGIN", "'in a block'", "COMMIT"]
    for part, sql in zip(parts, logged, strict=False):
        assert part in sql
    messages = [record.getMessage() for record in caplog.records]
    for part in [*parts, "'streamed'"]:
        assert [it for it in messages if part in it], part


@pytest.mark.gen_test
async def test_without_debug_nothing_is_kept_of_queries() -> None:
    async with opened():
        await green.run(names)
        await db.query("select 1")
        assert connection.queries == []


# A wrapper's life


@pytest.mark.gen_test
async def test_a_connection_that_is_closed_is_opened_anew() -> None:
    def code() -> list[str]:
        add("before")
        connection.close()
        connection.close()
        assert names() == ["before"]
        connections.close_all()
        return names()

    assert await in_pool(code) == ["before"]


@pytest.mark.gen_test
async def test_closed_in_a_block_the_block_is_rolled_back() -> None:
    def code() -> list[str]:
        with transaction.atomic():
            add("lost")
            connection.close()
            with pytest.raises((InterfaceError, TransactionManagementError)):
                names()
        return names()

    async with opened(POOL_SIZE=1):
        assert await green.run(code) == []
        assert await green.run(names) == []


@pytest.mark.gen_test
async def test_a_connection_that_is_lost_takes_its_transaction_along(watcher: Watcher) -> None:
    def code() -> None:
        with transaction.atomic():
            add("lost")
            watcher.terminate(pid())
            with pytest.raises(OperationalError):
                names()
            names()

    def commits() -> None:
        with transaction.atomic():
            add("lost")
            watcher.terminate(pid())

    async with opened(POOL_SIZE=1):
        with pytest.raises(DatabaseError):
            await green.run(code)
        with pytest.raises(OperationalError, match=r"lost|COMMIT"):
            await green.run(commits)
        assert await green.run(names) == []
        assert not await green.run(lambda: connection.in_atomic_block)


def _meddle() -> None:
    wrapper: Any = connection
    wrapper.force_debug_cursor = True
    wrapper.execute_wrappers.append(lambda *args: fail())


def _mark() -> None:
    with fails():
        connection.tenant = "a"  # type: ignore[attr-defined]


def _break() -> None:
    with pytest.raises(ProgrammingError), transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("nonsense")


def _leave_a_hook() -> None:
    wrapper: Any = connection
    wrapper.ensure_connection()
    wrapper.run_on_commit.append((set(), fail, False))


def _set_rollback() -> None:
    wrapper: Any = connection
    wrapper.ensure_connection()
    wrapper.needs_rollback = True


def _change_time_zone() -> None:
    wrapper: Any = connection
    wrapper.timezone_name = "Asia/Tokyo"


@pytest.mark.gen_test
@pytest.mark.parametrize(
    "meddle", [_meddle, _mark, _break, _leave_a_hook, _set_rollback, _change_time_zone]
)
async def test_nothing_is_carried_over_to_the_next_call(meddle: Callable[[], None]) -> None:
    def code() -> None:
        wrapper: Any = connection
        assert (wrapper.force_debug_cursor, wrapper.execute_wrappers) == (False, [])
        assert (wrapper.run_on_commit, wrapper.needs_rollback) == ([], False)
        assert (wrapper.in_atomic_block, wrapper.get_autocommit()) == (False, True)
        assert (wrapper.savepoint_ids, wrapper.atomic_blocks) == ([], [])
        assert not hasattr(wrapper, "tenant")
        assert wrapper.timezone_name == "UTC"
        assert len(wrapper.queries_log) == 0
        with transaction.atomic():
            add("x")

    async with opened():
        await green.run(names)
        await green.run(meddle)
        for _ in range(3):
            await green.run(code)


@pytest.mark.gen_test
async def test_a_wrapper_is_used_again() -> None:
    async with opened():
        seen = {await green.run(lambda: (add("x"), id(connections["default"]))[1])}
        for _ in range(20):
            seen.add(await green.run(lambda: (names(), id(connections["default"]))[1]))
        assert len(seen) == 1


@pytest.mark.gen_test
async def test_nothing_is_left_of_a_thousand_calls() -> None:
    def code() -> list[str]:
        with transaction.atomic():
            return names()

    async def calls(number: int) -> None:
        for _ in range(number):
            await green.run(code)
            await Blog.objects.acount()
            await db.fetch(Blog.objects.all())
            async with db.atomic():
                await Blog.objects.filter(pk=1).aexists()

    async with opened():
        await calls(10)
        gc.collect()
        gc.disable()
        try:
            before = len(gc.get_objects())
            await calls(250)
            grown = len(gc.get_objects()) - before
        finally:
            gc.enable()
        # Without a collection: no call leaves a cycle.
        assert grown < 500


@pytest.mark.gen_test
async def test_in_threads_connections_are_djangos_own() -> None:
    async with opened():
        assert isinstance(await green.run(_raw_connection), PoolConnection)
        assert not isinstance(await asyncio.to_thread(_raw_connection), PoolConnection)


def _raw_connection() -> Any:
    names()
    raw = connection.connection
    if threading.current_thread() is not threading.main_thread():
        connection.close()
    return raw


@pytest.mark.gen_test
async def test_on_the_loop_outside_of_green_code_queries_are_refused() -> None:
    async with opened():
        for refused in (names, connection.cursor, lambda: transaction.set_autocommit(False)):
            with pytest.raises(SynchronousOnlyOperation):
                refused()
        with pytest.raises(SynchronousOnlyOperation):
            transaction.atomic().__enter__()
        assert str(Blog.objects.filter(name="x").query)


# Other backends built on PostgreSQL's


@asynccontextmanager
async def gis() -> AsyncIterator[None]:
    """A database more, of a backend that subclasses PostgreSQL's."""
    settings = connections.settings
    settings["gis"] = {**settings["default"], "ENGINE": "tests.backends.gis"}
    try:
        async with opened():
            yield
    finally:
        del settings["gis"]


@pytest.mark.gen_test
async def test_a_backend_that_subclasses_postgresqls_has_its_own_features_and_operations() -> None:
    def code() -> tuple[Any, ...]:
        wrapper: Any = connections["gis"]
        with transaction.atomic(using="gis"):
            Blog.objects.using("gis").create(name="x")
            rows = Blog.objects.using("gis").annotate(n=Count("entries")).values_list("name", "n")
            return (
                list(rows),
                wrapper.features.has_places,
                wrapper.ops.quote_name("place_of_x"),
                wrapper.visit("Brno"),
                wrapper.places,
                type(wrapper).__name__,
            )

    async with gis():
        assert pools.status()["gis"]["engine"] == pools.status()["default"]["engine"]
        expected = ([("x", 0)], True, '"x"', 4, ["Brno"], "DatabaseWrapper")
        assert await green.run(code) == expected
        [blog] = await db.using("gis").fetch(Blog.objects.all())
        assert (await Blog.objects.using("gis").aget()) == blog


# Django's a-methods under load


@pytest.mark.gen_test
async def test_two_hundred_at_once_over_five_connections() -> None:
    async def work(number: int) -> None:
        tag, _ = await Tag.objects.aget_or_create(slug=f"tag-{number % 10}")
        blog = await Blog.objects.acreate(name=str(number))
        entry, _ = await Entry.objects.aupdate_or_create(blog=blog, defaults={"title": "t"})
        await entry.tag.aadd(tag)
        blog.name += "!"
        await blog.asave()
        await blog.arefresh_from_db()
        assert blog.name == f"{number}!"
        assert await Blog.objects.filter(name=blog.name).aexists()
        assert [it.slug async for it in entry.tag.all()] == [tag.slug]
        assert (await blog.entries.afirst()) == entry
        assert await Blog.objects.filter(pk=blog.pk).aupdate(name=f"{number}?") == 1
        assert (await Entry.objects.filter(blog=blog).aaggregate(n=Count("pk")))["n"] == 1
        assert list(await Blog.objects.ain_bulk([blog.pk])) == [blog.pk]
        if number % 2:
            await blog.adelete()

    async with opened(POOL_SIZE=5):
        before = threading.active_count()
        await asyncio.gather(*(work(number) for number in range(200)))
        assert threading.active_count() == before
        assert await Tag.objects.acount() == 10
        assert await Blog.objects.acount() == await Entry.objects.acount() == 100
        status = pools.status()["default"]
        assert (status["in_use"], status["free"]) == (0, 5)


@pytest.mark.gen_test
async def test_an_engine_that_is_closed_is_not_kept_by_what_ends_after_it(database: None) -> None:
    gate = asyncio.Event()

    def code() -> None:
        Blog.objects.count()
        green.wait(gate.wait())

    async with opened():
        engine = weakref.ref(pools.get("default"))
        late = asyncio.ensure_future(green.run(code))
        await until(lambda: pools.status()["default"]["free"] == 1)
    gate.set()
    await late
    del late
    gc.collect()
    assert engine() is None
