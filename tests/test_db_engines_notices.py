from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from django.db.utils import InterfaceError, NotSupportedError, OperationalError

from tests.database import Watcher, opened, until
from tests.postgres import Postgres
from tornjango import db
from tornjango.db import pools
from tornjango.db.engines import notices
from tornjango.db.engines.notices import Listener, Notice

#: The backends that listen, each with the last statement it ran.
LISTENING = "select pid, query from pg_stat_activity where query ~ '^(UN)?LISTEN'"


def listen(*channels: str, alias: str = "default") -> Listener:
    return pools.get(alias).listen(*channels)


def seen(notice: Notice) -> tuple[str, str | None]:
    return notice.channel, notice.payload


async def some(listener: Listener, number: int) -> list[tuple[str, str | None]]:
    async with asyncio.timeout(10):
        return [seen(await anext(listener)) for _ in range(number)]


@pytest.mark.gen_test
async def test_notices_come_in_the_order_they_were_sent(database: None, watcher: Watcher) -> None:
    [(pid,)] = watcher.rows("select pg_backend_pid()")
    async with opened(), listen("a", 'We "ird', "ü") as listener:
        watcher.rows("notify a, '1'; notify b, 'not for us'")
        watcher.rows("""notify "We ""ird", '2'; notify "ü"; notify a, '3'""")
        assert await anext(listener) == Notice("a", "1", pid)
        assert await some(listener, 3) == [('We "ird', "2"), ("ü", ""), ("a", "3")]


@pytest.mark.gen_test
async def test_iterating_opens_a_listener_and_closing_ends_it(
    database: None, watcher: Watcher
) -> None:
    got: list[Any] = []

    async def follow(listener: Listener) -> None:
        async for notice in listener:
            got.append(seen(notice))

    async with opened():
        listener = listen("a")
        task = asyncio.create_task(follow(listener))
        await until(lambda: watcher.rows(LISTENING))
        watcher.rows("notify a, '1'")
        await until(lambda: got)
        await listener.aclose()
        await listener.aclose()
        await task
        assert got == [("a", "1")]
        with pytest.raises(StopAsyncIteration):
            await anext(listener)
        with pytest.raises(InterfaceError, match="closed"):
            await listener.open()
        await until(lambda: not watcher.rows(LISTENING))


@pytest.mark.gen_test
async def test_a_notice_of_a_transaction_comes_when_it_is_committed(database: None) -> None:
    async with opened(), listen("a") as listener:
        async with db.atomic():
            await db.query("select pg_notify('a', 'committed')")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(listener), 0.05)
        lease = await pools.get("default").begin()
        await lease.execute("notify a, 'rolled back'")
        await lease.rollback()
        await db.query("notify a, 'later'")
        assert await some(listener, 2) == [("a", "committed"), ("a", "later")]


@pytest.mark.gen_test
async def test_all_share_one_connection_outside_the_pool(database: None, watcher: Watcher) -> None:
    async with opened(POOL_SIZE=1):
        async with listen("a") as first, listen("b", "a") as second:
            assert len(watcher.rows(LISTENING)) == 1
            status = pools.status()["default"]
            assert (status["in_use"], status["listening"]) == (0, 2)
            watcher.rows("notify a, '1'; notify b, '2'")
            assert await some(first, 1) == [("a", "1")]
            assert await some(second, 2) == [("a", "1"), ("b", "2")]
            await second.aclose()
            await until(lambda: watcher.rows(LISTENING)[0][1] == 'UNLISTEN "b"')
            async with listen("b") as third:
                watcher.rows("notify b, '3'; notify a, '4'")
                assert await some(third, 1) == [("b", "3")]
            assert await some(first, 1) == [("a", "4")]
        await until(lambda: not watcher.rows(LISTENING))
        async with listen("a") as again:
            watcher.rows("notify a, '5'")
            assert await some(again, 1) == [("a", "5")]


@pytest.mark.gen_test
async def test_a_cancellation_loses_nothing(database: None, watcher: Watcher) -> None:
    async with opened(), listen("a") as listener:
        got: list[str | None] = []
        for number in range(20):
            watcher.rows("select pg_notify('a', %s)", [str(number)])
            task = asyncio.ensure_future(anext(listener))
            await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                got.append(task.result().payload)
        got += [payload for _, payload in await some(listener, 20 - len(got))]
        assert got == [str(number) for number in range(20)]


@pytest.mark.gen_test
async def test_cancelled_while_it_opens_a_listener_can_be_opened_again(
    database: None, watcher: Watcher
) -> None:
    async with opened():
        for turns in range(20):
            listener = listen("a")
            task = asyncio.create_task(listener.open())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
            async with listener:
                watcher.rows("notify a, '1'")
                assert await some(listener, 1) == [("a", "1")]
        await until(lambda: not watcher.rows(LISTENING))


@pytest.mark.gen_test
async def test_a_listener_that_nobody_has_any_more_is_closed(
    database: None, watcher: Watcher
) -> None:
    async with opened():
        listener = listen("a")
        await listener.open()
        watcher.rows("notify a, '1'; notify a, '2'")
        async for _ in listener:
            break
        assert watcher.rows(LISTENING)
        del listener
        await until(lambda: not watcher.rows(LISTENING))
        assert pools.status()["default"]["listening"] == 0


# What may be missed is told


@pytest.mark.gen_test
async def test_a_lost_connection_is_made_anew_and_the_gap_is_told(
    database: None, watcher: Watcher, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(), listen("a", "b") as listener, listen("a") as other:
        watcher.rows("notify a, 'before'")
        assert await some(listener, 1) == [("a", "before")]
        watcher.terminate(watcher.rows(LISTENING)[0][0])
        watcher.rows("notify a, 'lost'")
        assert sorted(await some(listener, 2)) == [("a", None), ("b", None)]
        watcher.rows("notify b, 'after'")
        assert await some(listener, 1) == [("b", "after")]
        assert await some(other, 2) == [("a", "before"), ("a", None)]
    assert "'default' are interrupted" in caplog.text


@pytest.mark.gen_test
async def test_a_server_that_is_away_is_waited_for(own_postgres: Postgres) -> None:
    async with opened(), listen("a", alias="own") as listener:
        await asyncio.to_thread(own_postgres.stop)
        late = listen("a", alias="own")
        with pytest.raises(OperationalError, match=r"Cannot listen to database 'own'.*refused"):
            await late.open()
        task = asyncio.create_task(some(listener, 1))
        await asyncio.to_thread(own_postgres.start)
        assert await task == [("a", None)]
        await late.open()
        own_postgres.psql("notify a, 'back'", "tornjango")
        assert await some(listener, 1) == await some(late, 1) == [("a", "back")]


@pytest.mark.gen_test
async def test_a_server_that_is_frozen_is_noticed(
    own_postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "SILENCE", 0.05)
    monkeypatch.setattr(notices, "ANSWER", 0.2)
    async with opened(), listen("a", alias="own") as listener:
        own_postgres.psql("select pg_sleep(0.2); notify a, 'alive'", "tornjango")
        assert await some(listener, 1) == [("a", "alive")]
        own_postgres.freeze()
        await asyncio.sleep(0.4)
        own_postgres.thaw()
        assert await some(listener, 1) == [("a", None)]
        own_postgres.psql("notify a, 'again'", "tornjango")
        assert await some(listener, 1) == [("a", "again")]


@pytest.mark.gen_test
async def test_a_slow_listener_has_bounds_and_is_told_of_the_gap(
    database: None, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "QUEUE", 3)
    async with opened(), listen("a", "b") as slow, listen("a") as quick:
        for number in range(10):
            watcher.rows("select pg_notify('a', %s)", [str(number)])
            assert await some(quick, 1) == [("a", str(number))]
        watcher.rows("notify b, 'left out, too'; notify a, 'end'")
        assert await some(quick, 1) == [("a", "end")]
        kept = [("a", "0"), ("a", "1"), ("a", "2"), ("a", None), ("b", None)]
        assert await some(slow, 5) == kept
        watcher.rows("notify b, 'after'")
        assert await some(slow, 1) == [("b", "after")]


# What is refused


@pytest.mark.gen_test
async def test_a_server_that_cannot_be_reached_is_reported(own_postgres: Postgres) -> None:
    own_postgres.stop()
    async with opened():
        listener = listen("a", alias="own")
        for _ in range(2):
            with pytest.raises(OperationalError, match=r"Cannot listen to database 'own'.*refused"):
                await anext(listener)
        await asyncio.to_thread(own_postgres.start)
        await listener.open()


@pytest.mark.gen_test
async def test_closing_the_pool_ends_its_listeners(database: None, watcher: Watcher) -> None:
    async with opened():
        listener, unopened = listen("a"), listen("a")
        await listener.open()
        task = asyncio.create_task(anext(listener))
        opening = asyncio.create_task(unopened.open())
        await asyncio.sleep(0)
        await pools.get("default").close()
        for ended in (task, opening):
            with pytest.raises(InterfaceError, match="closed"):
                await ended
        with pytest.raises(InterfaceError, match="closed"):
            await listen("a").open()
    await until(lambda: not watcher.rows(LISTENING))


@pytest.mark.gen_test
async def test_names_that_are_none_of_postgresqls_are_refused(database: None) -> None:
    async with opened():
        for name in ("", "x" * 64, "ü" * 32, "a\0b"):
            with pytest.raises(ValueError, match="no channel of PostgreSQL's"):
                listen(name)
        with pytest.raises(ValueError, match="the name of a channel"):
            listen()
        async with listen("x" * 63) as listener:
            await db.query("select pg_notify(%s, 'long')", ["x" * 63])
            assert await some(listener, 1) == [("x" * 63, "long")]


@pytest.mark.gen_test
async def test_other_databases_have_no_channels(database: None) -> None:
    with pytest.raises(
        NotSupportedError, match=r"'default': its engine is 'plain'.*pools.open\(\)"
    ):
        listen("a")
    async with opened():
        with pytest.raises(NotSupportedError, match="'sqlite': its engine is 'threads'"):
            listen("a", alias="sqlite")


@pytest.mark.gen_test
async def test_what_nobody_expected_is_logged_and_listening_goes_on(
    database: None,
    watcher: Watcher,
    monkeypatch: pytest.MonkeyPatch,
    error_log: list[logging.LogRecord],
) -> None:
    deliver = notices.Notices._deliver

    def fail(self: Any, found: list[Notice]) -> None:
        if found:
            monkeypatch.setattr(notices.Notices, "_deliver", deliver)
            raise ZeroDivisionError

    async with opened(), listen("a") as listener:
        monkeypatch.setattr(notices.Notices, "_deliver", fail)
        watcher.rows("notify a, '1'")
        assert await some(listener, 1) == [("a", None)]
    assert "Listening to database 'default' failed" in error_log.pop().getMessage()
