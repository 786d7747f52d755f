from __future__ import annotations

import asyncio

import pytest
from django.db.utils import InterfaceError, OperationalError

from tests.database import until
from tornjango.db.engines import backoff
from tornjango.db.engines.gate import Gate
from tornjango.db.engines.pool import Pool
from tornjango.exceptions import Overloaded


class Connection:
    alive = True
    idle = True
    discarded = False

    def is_alive(self) -> bool:
        return self.alive

    def is_idle(self) -> bool:
        return self.idle

    def discard(self) -> None:
        self.discarded = True


class Server:
    """Takes connections, or fails, when it is told to."""

    def __init__(self) -> None:
        self.attempts: list[asyncio.Future[Connection]] = []

    def connect(self) -> asyncio.Future[Connection]:
        self.attempts.append(asyncio.get_running_loop().create_future())
        return self.attempts[-1]

    def take(self) -> Connection:
        connection = Connection()
        self.attempts.pop(0).set_result(connection)
        return connection

    def refuse(self) -> None:
        self.attempts.pop(0).set_exception(OSError("refused"))

    async def tried(self, times: int = 1) -> None:
        await until(lambda: len(self.attempts) == times)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next attempt to connect comes at once."""
    monkeypatch.setattr(backoff, "FIRST", 0)


def make(server: Server, size: int = 2, timeout: float = 5) -> Pool[Connection]:
    return Pool(Gate("database 'x'", size=size, queue=10, timeout=timeout), server.connect)


def acquire(pool: Pool[Connection]) -> asyncio.Task[Connection]:
    return asyncio.create_task(pool.acquire())


async def one(pool: Pool[Connection], server: Server) -> Connection:
    task = acquire(pool)
    await server.tried()
    server.take()
    return await task


@pytest.mark.gen_test
async def test_a_connection_is_opened_when_it_is_needed_and_kept() -> None:
    server = Server()
    pool = make(server)
    assert (pool.counts(), server.attempts) == ({"free": 0, "connecting": 0}, [])
    first = await one(pool, server)
    assert pool.busy == [first]
    pool.release(first)
    assert pool.counts() == {"free": 1, "connecting": 0}
    assert await pool.acquire() is first
    assert server.attempts == []


@pytest.mark.gen_test
async def test_who_waits_takes_what_another_gives_back_and_the_attempt_is_kept() -> None:
    server = Server()
    pool = make(server)
    first = await one(pool, server)
    task = acquire(pool)
    await server.tried()
    pool.release(first)
    assert await task is first
    second = server.take()
    await until(lambda: pool.counts()["free"])
    assert await pool.acquire() is second


@pytest.mark.gen_test
async def test_an_attempt_that_nobody_waits_for_is_used_by_the_next() -> None:
    server = Server()
    pool = make(server, size=1)
    task = acquire(pool)
    await server.tried()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    task = acquire(pool)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(server.attempts) == 1
    connection = server.take()
    assert await task is connection
    assert pool.busy == [connection]


@pytest.mark.gen_test
async def test_cancelled_with_a_connection_in_hand_it_goes_to_the_next() -> None:
    server = Server()
    pool = make(server, size=1)
    task = acquire(pool)
    await server.tried()
    connection = server.take()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await pool.acquire() is connection


@pytest.mark.gen_test
async def test_one_that_died_idle_or_is_in_a_transaction_is_replaced() -> None:
    server = Server()
    pool = make(server)
    first = await one(pool, server)
    pool.release(first)
    first.alive = False
    second = await one(pool, server)
    assert first.discarded
    second.idle = False
    pool.release(second)
    assert second.discarded
    assert pool.counts()["free"] == 0


@pytest.mark.gen_test
async def test_failures_are_told_at_once_by_a_pool_that_never_connected() -> None:
    server = Server()
    pool = make(server)
    tasks = [acquire(pool), acquire(pool)]
    await server.tried(2)
    server.refuse()
    server.refuse()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(error) for error in errors] == ["refused"] * 2
    assert errors[0] is not errors[1]
    await one(pool, server)


@pytest.mark.gen_test
async def test_a_pool_that_was_connected_tries_until_the_time_is_up() -> None:
    server = Server()
    pool = make(server, timeout=0.1)
    (await one(pool, server)).idle = False
    pool.release(pool.busy[0])
    task = acquire(pool)
    for _ in range(2):
        await server.tried()
        server.refuse()
    await server.tried()
    with pytest.raises(OSError, match="refused"):
        await task
    server.take()
    await until(lambda: pool.counts()["free"])
    assert await pool.acquire()


@pytest.mark.gen_test
async def test_a_server_that_says_nothing_is_given_up_in_time() -> None:
    server = Server()
    pool = make(server, size=1, timeout=0.05)
    with pytest.raises(OperationalError, match=r"'x' took no connection within 0\.05 s"):
        await pool.acquire()
    connection = server.take()
    await until(lambda: pool.counts()["free"])
    assert await pool.acquire() is connection
    with pytest.raises(Overloaded):
        await pool.acquire()


@pytest.mark.gen_test
async def test_a_closed_pool_closes_what_it_has_and_gets() -> None:
    server = Server()
    pool = make(server, size=3)
    free, used = await one(pool, server), await one(pool, server)
    pool.release(free)
    assert await pool.acquire() is free
    waiting = acquire(pool)
    await server.tried()
    await pool.close(InterfaceError)
    with pytest.raises(InterfaceError, match="database 'x' is closed"):
        await waiting
    assert (server.attempts[0].cancelled(), pool.counts()["connecting"]) == (True, 0)
    assert not used.discarded
    for connection in (free, used):
        pool.release(connection)
        assert connection.discarded
    with pytest.raises(InterfaceError, match="database 'x' is closed"):
        await pool.acquire()


class Odd(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("odd")


@pytest.mark.gen_test
async def test_an_error_that_cannot_be_copied_is_told_all_the_same() -> None:
    server = Server()
    pool = make(server)
    caller = asyncio.create_task(pool.acquire())
    await server.tried()
    server.attempts.pop(0).set_exception(Odd(1, 2))
    with pytest.raises(Odd, match="odd"):
        await caller
