"""`db.listen`, as users meet it; what is behind it has tests of its own."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.utils import InterfaceError, NotSupportedError

from tests.app.models import Blog
from tests.database import Watcher, opened, until
from tests.postgres import Postgres
from tornjango import db, green
from tornjango.db import pools

pytestmark = pytest.mark.usefixtures("database")


@pytest.fixture
def watcher(postgres: Postgres) -> Iterator[Watcher]:
    watcher = Watcher(postgres.dsn("tornjango"))
    yield watcher
    watcher.close()


def listening(watcher: Watcher) -> list[int]:
    """The backends whose last statement was a LISTEN."""
    return [
        pid
        for (pid,) in watcher.rows("select pid from pg_stat_activity where query ilike 'listen %%'")
    ]


def status() -> int:
    return int(pools.status()["default"]["listening"])


async def payloads(number: int, notices: Any) -> list[str | None]:
    return [(await asyncio.wait_for(anext(notices), 10)).payload for _ in range(number)]


@pytest.mark.gen_test
async def test_notices_come_in_their_order(watcher: Watcher) -> None:
    async with opened(POOL_SIZE=1), db.listen("one", "two") as notices:
        watcher.rows("notify one, 'a'")
        watcher.rows("notify two, 'ž 100%%'", [])
        watcher.rows("notify three, 'nobody'")
        watcher.rows("notify one")
        seen = [await asyncio.wait_for(anext(notices), 5) for _ in range(3)]
        assert [it[:2] for it in seen] == [("one", "a"), ("two", "ž 100%"), ("one", "")]
        assert seen[0] == db.Notice("one", "a", seen[0].pid)
        # Nothing of the pool is held.
        assert await db.query("select 1") == [(1,)]
        assert pools.status()["default"]["in_use"] == 0


@pytest.mark.gen_test
async def test_what_a_transaction_notifies_comes_when_it_commits() -> None:
    def notify(payload: str) -> None:
        with connection.cursor() as cursor:
            cursor.execute("select pg_notify('one', %s)", [payload])

    async with opened(), db.listen("one") as notices:
        async with db.atomic():
            await green.run(notify, "lost")
            await Blog.objects.acreate(name="x")
            transaction.set_rollback(True)
        async with db.atomic():
            await green.run(notify, "committed")
        assert await payloads(1, notices) == ["committed"]


@pytest.mark.gen_test
async def test_a_consumer_that_stops_stops_listening(watcher: Watcher) -> None:
    async def breaks() -> None:
        async for _ in db.listen("one"):
            break

    async def waits() -> None:
        async for _ in db.listen("one"):
            pass

    async def sends() -> None:
        while True:
            watcher.rows("notify one, 'x'")
            await asyncio.sleep(0.02)

    async with opened():
        sending = asyncio.create_task(sends())
        await breaks()
        gc.collect()
        await until(lambda: status() == 0 and not listening(watcher))
        task = asyncio.create_task(waits())
        await until(lambda: status() == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        sending.cancel()
        del task
        await until(lambda: status() == 0 and not listening(watcher))
        async with aclosing(db.listen("one")) as notices:
            await notices.open()
            assert status() == 1
        await until(lambda: status() == 0 and not listening(watcher))


@pytest.mark.gen_test
async def test_a_lost_connection_is_made_anew_and_the_gap_told(
    watcher: Watcher, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(), db.listen("one") as notices:
        watcher.rows("notify one, 'before'")
        assert await payloads(1, notices) == ["before"]
        [pid] = listening(watcher)
        watcher.terminate(pid)
        assert await payloads(1, notices) == [None]
        watcher.rows("notify one, 'after'")
        assert await payloads(1, notices) == ["after"]
    assert [it.levelno for it in caplog.records if it.name == "tornjango.db"] == [logging.WARNING]


@pytest.mark.gen_test
async def test_a_server_that_is_restarted_is_waited_for(own_postgres: Postgres) -> None:
    async with opened(), db.using("own").listen("one") as notices:
        own_postgres.restart()
        assert await payloads(1, notices) == [None]
        own_postgres.psql("notify one, 'after'", "tornjango")
        assert await payloads(1, notices) == ["after"]


@pytest.mark.gen_test
async def test_many_listen_over_one_connection(watcher: Watcher) -> None:
    async def first(channel: str) -> str | None:
        async with db.listen(channel) as notices:
            return (await anext(notices)).payload

    async with opened(POOL_SIZE=1):
        channels = [f"channel {number % 10}" for number in range(100)]
        tasks = [asyncio.create_task(first(channel)) for channel in channels]
        await until(lambda: status() == 100)
        await until(lambda: len(listening(watcher)) == 1)
        async with db.listen(*channels):
            for channel in set(channels):
                watcher.rows("select pg_notify(%s, %s)", [channel, channel])
        assert await asyncio.wait_for(asyncio.gather(*tasks), 10) == channels


@pytest.mark.gen_test
async def test_closing_the_pools_ends_it_with_an_error() -> None:
    async with opened():
        notices = db.listen("one")
        await notices.open()
        task = asyncio.create_task(anext(notices))  # type: ignore[arg-type]
        await asyncio.sleep(0)
    with pytest.raises(InterfaceError, match="closed"):
        await task


@pytest.mark.gen_test
async def test_what_cannot_be_listened_to_is_refused_by_name() -> None:
    with pytest.raises(NotSupportedError, match="'default'"):
        db.listen("one")
    async with opened():
        with pytest.raises(NotSupportedError, match="'sqlite'"):
            db.listen("one", using="sqlite")
        for wrong in ((), ("",), ("x" * 64,)):
            with pytest.raises(ValueError, match="channel"):
                db.listen(*wrong)
