"""What every engine promises: see tornjango/db/engines/base.py."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar

import pytest
from django.db import connections
from django.db.backends.postgresql.psycopg_any import is_psycopg3
from django.db.transaction import TransactionManagementError
from django.db.utils import (
    DatabaseError,
    DataError,
    Error,
    IntegrityError,
    InterfaceError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
)

from tests.app.models import Everything
from tests.database import fill_everything, opened, picture, until
from tornjango import conf
from tornjango.db import pools
from tornjango.db.engines.base import Engine, Lease, Stream
from tornjango.db.engines.plain import PlainEngine
from tornjango.exceptions import Overloaded

T = TypeVar("T")

#: Rows by a statement that every database understands.
SERIES = (
    "with recursive t(i) as (select 1 union all select i + 1 from t where i < {}) "
    "select i, 'row ' || i as name from t"
)
COUNT = "select count(*) from contract"
INSERT = "insert into contract (id, name) values (%s, %s)"


class Case(NamedTuple):
    engine: str
    alias: str

    @property
    def postgres(self) -> bool:
        return self.alias == "default"

    @property
    def slow(self) -> str:
        if self.postgres:
            return "select pg_sleep(60)"
        return "select * from (with recursive t(i) as (select 1 union all select i from t) select count(*) from t)"

    @asynccontextmanager
    async def opened(self, **options: Any) -> AsyncIterator[Engine]:
        if self.engine == "plain":
            yield PlainEngine(self.alias)
            return
        async with opened(ENGINES={self.alias: self.engine}, **options):
            engine = pools.get(self.alias)
            assert engine.name == self.engine
            yield engine


POOLED = [Case("threads", "default"), Case("threads", "sqlite")]
POOLED += [
    Case(name, "default")
    for name in conf.ENGINES
    if name == ("psycopg" if is_psycopg3 else "momoko")
]
ALL = [*POOLED, Case("plain", "default"), Case("plain", "sqlite")]


def _id(case: Case) -> str:
    return f"{case.engine}-{case.alias}"


@pytest.fixture(params=ALL, ids=_id)
def case(request: pytest.FixtureRequest, database: None) -> Iterator[Case]:
    yield from _with_table(request.param)


@pytest.fixture(params=POOLED, ids=_id)
def pooled(request: pytest.FixtureRequest, database: None) -> Iterator[Case]:
    """Engines with connections of their own."""
    yield from _with_table(request.param)


def _with_table(case: Case) -> Iterator[Case]:
    with connections[case.alias].cursor() as cursor:
        cursor.execute("drop table if exists contract")
        cursor.execute("create table contract (id integer primary key, name varchar(20) unique)")
        yield case
        if case.postgres:
            cursor.execute("set lock_timeout = '5s'")
        cursor.execute("drop table contract")


async def count(engine: Engine | Lease) -> int:
    number: int = (await engine.execute(COUNT)).rows[0][0]
    return number


async def in_thread(fn: Callable[[], T]) -> T:
    """With a connection of Django's own, which is closed at the end."""

    def call() -> T:
        try:
            return fn()
        finally:
            connections.close_all()

    return await asyncio.to_thread(call)


async def directly(case: Case, sql: str, params: Any = None) -> tuple[list[Any], list[str]]:
    """The rows and columns that Django's own cursor gives."""

    def execute() -> tuple[list[Any], list[str]]:
        with connections[case.alias].cursor() as cursor:
            cursor.execute(sql, params)
            return cursor.fetchall(), [column[0] for column in cursor.description]

    return await in_thread(execute)


async def free(engine: Engine) -> None:
    """Returns when all connections are back; in a process that tornjango does not serve, at once."""
    await until(lambda: engine.status().get("in_use", 0) == 0)


# What comes back


@pytest.mark.gen_test
async def test_rows_are_those_of_djangos_own_cursor(case: Case) -> None:
    expressions = ["1", "1.5", "'ž 100%%'", "null", "%s", "%s", "%s", "%s"]
    params = [2**40, "'quoted' \\ %s", b"\0\xff", 0.25]
    if case.postgres:
        expressions += ["array[1, 2]", "now() - now()", "'{}'::json", "true", "12.50::numeric"]
    sql = f"select {', '.join(expressions)}"
    expected, names = await directly(case, sql, params)
    async with case.opened() as engine:
        result = await engine.execute(sql, params)
        assert picture(result.rows) == picture(expected)
        assert (result.columns, len(result.description or ())) == (names, len(names))


@pytest.mark.gen_test
async def test_every_type_of_field_comes_back_as_from_djangos_own_cursor(case: Case) -> None:
    if not case.postgres:
        pytest.skip("its table has types of PostgreSQL")
    await in_thread(fill_everything)
    sql = f"select * from {Everything._meta.db_table} order by id"
    expected, _ = await directly(case, sql)
    async with case.opened() as engine:
        assert picture((await engine.execute(sql)).rows) == picture(expected)
        async with engine.leased() as lease:
            stream = await lease.stream(sql)
            assert picture(await stream.fetch(100)) == picture(expected)


@pytest.mark.gen_test
async def test_percent_signs_are_only_escapes_where_there_are_parameters(case: Case) -> None:
    async with case.opened() as engine:
        assert (await engine.execute("select 'a%%b'")).rows == [("a%%b",)]
        assert (await engine.execute("select 'a%%b'", [])).rows == [("a%b",)]
        assert (await engine.execute("select 'a%%b'", {})).rows == [("a%b",)]
        assert (await engine.execute("select 'a%%b' || %s", ["%"])).rows == [("a%b%",)]
        assert (await engine.execute("select '%%' || %(x)s", {"x": "y"})).rows == [("%y",)]


@pytest.mark.gen_test
async def test_a_query_without_rows_has_columns_and_a_statement_has_none(case: Case) -> None:
    async with case.opened() as engine:
        nothing = await engine.execute("select id, name from contract")
        assert (nothing.rows, nothing.columns) == ([], ["id", "name"])
        inserted = await engine.execute("insert into contract values (1, 'a'), (2, 'b')")
        assert (inserted.rows, inserted.description, inserted.rowcount) == ([], None, 2)
        updated = await engine.execute("update contract set name = name || '!' returning id, name")
        assert sorted(updated.rows) == [(1, "a!"), (2, "b!")]
        assert (updated.columns, updated.rowcount) == (["id", "name"], 2)
        nobody = await engine.execute("delete from contract where id = 99")
        assert (nobody.rows, nobody.columns, nobody.rowcount) == ([], [], 0)


@pytest.mark.gen_test
async def test_a_hundred_thousand_rows(case: Case) -> None:
    async with case.opened() as engine:
        rows = (await engine.execute(SERIES.format(100_000))).rows
        assert (len(rows), rows[0], rows[-1]) == (100_000, (1, "row 1"), (100_000, "row 100000"))


@pytest.mark.gen_test
async def test_errors_are_djangos_with_the_drivers_as_cause(case: Case) -> None:
    driver: Any = connections[case.alias]
    wrong_syntax = ProgrammingError if case.postgres else OperationalError
    too_much = "select 1 / 0" if case.postgres else "select zeroblob(2147483647)"
    async with case.opened() as engine:
        await engine.execute(INSERT, [1, "a"])
        wrong: list[tuple[type[Error], str, Any]] = [
            (IntegrityError, INSERT, [1, "b"]),
            (IntegrityError, INSERT, [2, "a"]),
            (wrong_syntax, "selekt", None),
            (wrong_syntax, "select nothing from contract", None),
            (DataError, too_much, None),
        ]
        for expected, sql, params in wrong:
            with pytest.raises(expected) as raised:
                await engine.execute(sql, params)
            assert isinstance(raised.value.__cause__, driver.Database.Error)
        assert await count(engine) == 1


@pytest.mark.gen_test
async def test_parameters_that_do_not_fit_the_statement(case: Case) -> None:
    async with case.opened() as engine:
        for params in ([1], [1, 2, 3]):
            with pytest.raises((DatabaseError, TypeError, IndexError)):
                await engine.execute("select %s, %s", params)
        assert await count(engine) == 0


@pytest.mark.gen_test
async def test_mogrify_puts_parameters_in_or_says_that_the_driver_cannot(case: Case) -> None:
    async with case.opened() as engine, engine.leased() as lease:
        for who in (lease,) if case.engine == "plain" else (engine, lease):
            if case.postgres:
                assert await who.mogrify("select %s, '%%'", ["it's"]) == b"select 'it''s', '%'"
            else:
                with pytest.raises(NotSupportedError, match="SQLite"):
                    await who.mogrify("select %s", ["it's"])


# Transactions


@pytest.mark.gen_test
async def test_a_transaction_is_committed_rolled_back_or_abandoned(case: Case) -> None:
    async with case.opened() as engine:
        lease = await engine.begin()
        await lease.execute(INSERT, [1, "a"])
        assert await count(lease) == 1
        await lease.commit()
        assert await count(engine) == 1
        lease = await engine.begin()
        await lease.execute(INSERT, [2, "b"])
        await lease.rollback()
        assert await count(engine) == 1
        lease = await engine.begin()
        await lease.execute(INSERT, [3, "c"])
        lease.abandon()
        await free(engine)
        assert await count(engine) == 1


@pytest.mark.gen_test
async def test_a_transaction_ends_once_and_is_of_no_use_then(case: Case) -> None:
    async with case.opened() as engine:
        lease = await engine.begin()
        await lease.execute(INSERT, [1, "a"])
        await lease.commit()
        await lease.rollback()
        await lease.commit()
        lease.abandon()
        with pytest.raises(InterfaceError, match="has ended"):
            await lease.execute("select 1")
        with pytest.raises(InterfaceError, match="has ended"):
            await lease.stream("select 1")
        await free(engine)
        assert await count(engine) == 1


@pytest.mark.gen_test
async def test_an_error_in_a_transaction_leaves_it_to_its_owner(case: Case) -> None:
    async with case.opened() as engine:
        async with engine.leased() as lease:
            await lease.execute(INSERT, [1, "a"])
            await lease.execute("savepoint one")
            with pytest.raises(IntegrityError):
                await lease.execute(INSERT, [1, "a"])
            await lease.execute("rollback to savepoint one")
            await lease.execute(INSERT, [2, "b"])
            await lease.commit()
        assert await count(engine) == 2


@pytest.mark.gen_test
async def test_what_is_not_committed_when_a_block_is_left_is_rolled_back(case: Case) -> None:
    async with case.opened() as engine:
        with pytest.raises(ZeroDivisionError):
            await _fail_in_a_transaction(engine)
        assert await count(engine) == 0


async def _fail_in_a_transaction(engine: Engine) -> None:
    async with engine.leased() as lease:
        await lease.execute(INSERT, [1, "a"])
        raise ZeroDivisionError


@pytest.mark.gen_test
async def test_transactions_at_one_time_do_not_see_each_other(pooled: Case) -> None:
    async with pooled.opened(POOL_SIZE=3) as engine:
        async with engine.leased() as one, engine.leased() as other:
            await one.execute(INSERT, [1, "a"])
            assert (await count(one), await count(other), await count(engine)) == (1, 0, 0)
            await other.rollback()
            await one.commit()
        assert await count(engine) == 1
        assert engine.status()["in_use"] == 0


@pytest.mark.gen_test
async def test_a_transaction_left_open_by_a_statement_is_refused(case: Case) -> None:
    async with case.opened() as engine:
        with pytest.raises(TransactionManagementError, match="left a transaction open"):
            await engine.execute("begin")
        await engine.execute(INSERT, [1, "a"])
        await free(engine)
    assert (await directly(case, COUNT))[0] == [(1,)]


@pytest.mark.gen_test
async def test_a_constraint_that_is_deferred_fails_the_commit(case: Case) -> None:
    async with case.opened() as engine:
        await engine.execute(
            "create table contract_of (id integer references contract (id) deferrable initially deferred)"
        )
        try:
            lease = await engine.begin()
            await lease.execute("insert into contract_of values (99)")
            with pytest.raises(IntegrityError):
                await lease.commit()
            await free(engine)
            assert (await engine.execute("select * from contract_of")).rows == []
        finally:
            await engine.execute("drop table contract_of")


@pytest.mark.gen_test
async def test_a_lost_transaction_is_rolled_back_with_a_warning(pooled: Case) -> None:
    async with pooled.opened(POOL_SIZE=1) as engine:
        lease = await engine.begin()
        await lease.execute(INSERT, [1, "a"])
        with pytest.warns(ResourceWarning, match="never ended"):  # noqa: PT031
            del lease
            gc.collect()
        assert await count(engine) == 0


# Cancellation


@pytest.mark.gen_test
async def test_cancellation_in_the_queue(pooled: Case) -> None:
    async with pooled.opened(POOL_SIZE=1) as engine:
        async with engine.leased():
            waiting = [asyncio.create_task(engine.execute("select 1")) for _ in range(3)]
            await until(lambda: engine.status()["waiting"] == 3)
            waiting[1].cancel()
            await until(lambda: engine.status()["waiting"] == 2)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(results[1], asyncio.CancelledError)
        assert [result.rows for result in results if not isinstance(result, BaseException)] == [
            [(1,)],
            [(1,)],
        ]
        await free(engine)


@pytest.mark.gen_test
async def test_cancellation_in_a_statement(pooled: Case) -> None:
    async with pooled.opened(POOL_SIZE=2) as engine:
        for _ in range(3):
            tasks = [asyncio.create_task(engine.execute(pooled.slow)) for _ in range(2)]
            await until(lambda: engine.status()["in_use"] == 2)
            await asyncio.sleep(0.02)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=0.5)
            assert all(task.cancelled() for task in tasks)
            await free(engine)
        assert await count(engine) == 0


@pytest.mark.gen_test
async def test_cancellation_as_soon_as_it_began(pooled: Case) -> None:
    async with pooled.opened(POOL_SIZE=2) as engine:
        for turns in range(12):
            task = asyncio.create_task(engine.execute(pooled.slow))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await free(engine)
        assert await count(engine) == 0


@pytest.mark.gen_test
async def test_cancellation_in_a_transaction_leaves_it_good_for_a_savepoint(pooled: Case) -> None:
    async with pooled.opened(POOL_SIZE=1) as engine:
        async with engine.leased() as lease:
            await lease.execute(INSERT, [1, "a"])
            await lease.execute("savepoint one")
            task = asyncio.create_task(lease.execute(pooled.slow))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await lease.execute("rollback to savepoint one")
            await lease.execute(INSERT, [2, "b"])
            await lease.commit()
        assert await count(engine) == 2


@pytest.mark.gen_test
async def test_a_cancelled_beginning_leaves_no_transaction(pooled: Case) -> None:
    async with pooled.opened(POOL_SIZE=1) as engine:
        for turns in range(8):
            task = asyncio.create_task(engine.begin())
            for _ in range(turns):
                await asyncio.sleep(0)
            if task.cancel():
                await asyncio.wait({task})
            if not task.cancelled():
                await task.result().rollback()
            await free(engine)
        assert await count(engine) == 0


@pytest.mark.gen_test
async def test_a_cancelled_commit_is_carried_to_its_end(pooled: Case) -> None:
    async with pooled.opened(POOL_SIZE=1) as engine:
        lease = await engine.begin()
        await lease.execute(INSERT, [1, "a"])
        task = asyncio.create_task(lease.commit())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await count(engine) == 1


# Streams


async def rows_of(stream: Stream, size: int) -> AsyncIterator[Any]:
    while rows := await stream.fetch(size):
        assert len(rows) <= size
        for row in rows:
            yield row


@pytest.mark.gen_test
async def test_a_stream_gives_all_rows(case: Case) -> None:
    async with case.opened(POOL_SIZE=1) as engine:
        stream = await engine.stream(SERIES.format(2500) + " where i > %s", [0])
        assert [row[0] async for row in rows_of(stream, 1000)] == list(range(1, 2501))
        assert [column[0] for column in stream.description or ()] == ["i", "name"]
        assert await stream.fetch(10) == []
        await stream.close()
        await stream.close()
        assert await count(engine) == 0
        empty = await engine.stream("select id from contract")
        assert await empty.fetch(10) == []
        await empty.close()


@pytest.mark.gen_test
async def test_a_stream_holds_few_rows_in_memory(case: Case) -> None:
    async with case.opened() as engine:
        await count(engine)
        stream = await engine.stream(SERIES.format(100_000))
        tracemalloc.start()
        try:
            number = 0
            while rows := await stream.fetch(1000):
                number += len(rows)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        await stream.close()
    assert number == 100_000
    # Together they would take some 12 MB.
    assert peak < 2_000_000


@pytest.mark.gen_test
async def test_a_stream_closed_early_or_abandoned_gives_its_connection_back(pooled: Case) -> None:
    async with pooled.opened(POOL_SIZE=1) as engine:
        for how in ("closed", "abandoned", "never read"):
            stream = await engine.stream(SERIES.format(100_000))
            if how != "never read":
                assert len(await stream.fetch(3)) == 3
            if how == "abandoned":
                stream.abandon()
            else:
                await stream.close()
            await free(engine)
        assert await count(engine) == 0


@pytest.mark.gen_test
async def test_a_stream_that_is_collected_gives_its_connection_back(pooled: Case) -> None:
    async with pooled.opened(POOL_SIZE=1) as engine:
        stream = await engine.stream(SERIES.format(100_000))
        await stream.fetch(3)
        with pytest.warns(ResourceWarning):  # noqa: PT031
            del stream
            gc.collect()
        assert await count(engine) == 0


@pytest.mark.gen_test
async def test_a_cancelled_stream_gives_its_connection_back(pooled: Case) -> None:
    slow = "select pg_sleep(60)" if pooled.postgres else pooled.slow
    async with pooled.opened(POOL_SIZE=1) as engine:
        task = asyncio.create_task(_read(engine, slow))
        await until(lambda: engine.status()["in_use"] == 1)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await free(engine)
        assert await count(engine) == 0


async def _read(engine: Engine, sql: str) -> None:
    stream = await engine.stream(sql)
    try:
        await stream.fetch(10)
    finally:
        await stream.close()


@pytest.mark.gen_test
async def test_statements_may_come_between_the_rows_of_a_transactions_stream(case: Case) -> None:
    async with case.opened(POOL_SIZE=1) as engine:
        async with engine.leased() as lease:
            await lease.execute("insert into contract values (1, 'a'), (2, 'b'), (3, 'c')")
            stream = await lease.stream("select id from contract order by id")
            async for (number,) in rows_of(stream, 1):
                await lease.execute(INSERT, [100 + number, f"new {number}"])
                if number == 3:
                    break
            await stream.close()
            left_open = await lease.stream("select id from contract")
            await left_open.fetch(1)
            assert await count(lease) == 6
            await lease.commit()
            left_open.abandon()
        assert await count(engine) == 6


@pytest.mark.gen_test
async def test_a_stream_of_a_wrong_query_raises_and_costs_no_connection(case: Case) -> None:
    async with case.opened(POOL_SIZE=1) as engine:
        with pytest.raises(DatabaseError):
            await _read(engine, "select nothing from contract")
        await free(engine)
        assert await count(engine) == 0


# The pool


@pytest.mark.gen_test
async def test_an_exhausted_pool_answers_within_its_timeout(pooled: Case) -> None:
    async with pooled.opened(POOL_SIZE=1, POOL_QUEUE=1, POOL_TIMEOUT=0.1) as engine:
        async with engine.leased():
            first = asyncio.create_task(engine.execute("select 1"))
            await until(lambda: engine.status()["waiting"] == 1)
            with pytest.raises(Overloaded, match="POOL_QUEUE"):
                await engine.begin()
            with pytest.raises(Overloaded, match="POOL_TIMEOUT"):
                await first
        assert await count(engine) == 0


@pytest.mark.gen_test
async def test_many_statements_at_once_share_few_connections(pooled: Case) -> None:
    async with pooled.opened(POOL_SIZE=3) as engine:
        results = await asyncio.gather(*(engine.execute("select %s", [n]) for n in range(200)))
        assert [int(result.rows[0][0]) for result in results] == list(range(200))
        status = engine.status()
        assert (status["in_use"], status["waiting"], status["size"]) == (0, 0, 3)
        assert 1 <= status["free"] <= 3


@pytest.mark.gen_test
async def test_closing_ends_what_is_under_way(pooled: Case) -> None:
    async with pooled.opened(POOL_SIZE=2) as engine:
        lease = await engine.begin()
        await lease.execute(INSERT, [1, "a"])
        running = asyncio.create_task(engine.execute(pooled.slow))
        await until(lambda: engine.status()["in_use"] == 2)
        waiting = asyncio.create_task(engine.execute("select 1"))
        await until(lambda: engine.status()["waiting"] == 1)
        await engine.close()  # and not when the statement has ended by itself
        for task in (running, waiting):
            with pytest.raises(Error):
                await task
        with pytest.raises(OperationalError):
            await lease.execute("select 1")
        with pytest.raises(OperationalError):
            await lease.commit()
        await lease.rollback()
        with pytest.raises(InterfaceError, match="closed"):
            await engine.execute("select 1")
        await engine.close()
    assert (await directly(pooled, COUNT))[0] == [(0,)]


def test_a_pool_of_another_event_loop_is_refused(pooled: Case) -> None:
    loop = asyncio.new_event_loop()
    try:
        context = pooled.opened()
        engine = loop.run_until_complete(context.__aenter__())
        loop.run_until_complete(engine.execute("select 1"))
        with pytest.raises(RuntimeError, match="another event loop"):
            asyncio.run(engine.execute("select 1"))
        loop.run_until_complete(context.__aexit__(None, None, None))
    finally:
        loop.close()
