from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection, connections, transaction
from django.db.backends.postgresql.psycopg_any import is_psycopg3
from django.db.utils import ConnectionDoesNotExist
from tornado.ioloop import IOLoop

from tests.app.models import Blog
from tests.database import opened
from tornjango import db
from tornjango.conf import Config
from tornjango.db import pools
from tornjango.exceptions import ConfigurationError

FITTING, OTHER = ("psycopg", "momoko") if is_psycopg3 else ("momoko", "psycopg")


def test_every_database_has_the_engine_that_fits_it(database: None, io_loop: IOLoop) -> None:
    async def engines() -> dict[str, str]:
        async with opened():
            return {alias: status["engine"] for alias, status in pools.status().items()}

    expected = {"default": FITTING, "own": FITTING, "sqlite": "threads"}
    assert io_loop.run_sync(engines) == expected
    assert pools.status() == {}


@pytest.mark.gen_test
async def test_opening_twice_is_refused_and_closing_twice_is_harmless(database: None) -> None:
    async with opened():
        assert pools.is_open()
        with pytest.raises(RuntimeError, match="close"):
            pools.open()
        assert await db.query("select 1") == [(1,)]
    await pools.close()
    assert not pools.is_open()


@pytest.mark.gen_test
async def test_tasks_outside_of_green_code_have_one_wrapper_of_djangos(database: None) -> None:
    async def wrapper() -> Any:
        return connections["default"]

    async with opened():
        first, second = await asyncio.gather(wrapper(), wrapper())
        assert first is second
        await db.fetch(Blog.objects.all())
        assert first.pg_version >= 150000


def test_an_open_transaction_of_the_callers_is_not_seen_by_the_pool(
    database: None, io_loop: IOLoop
) -> None:
    with transaction.atomic():
        Blog.objects.create(name="not committed")
        pools.open()
        assert io_loop.run_sync(lambda: db.fetch(Blog.objects.all())) == []
        io_loop.run_sync(pools.close)
        assert connection.in_atomic_block
        transaction.set_rollback(True)


@pytest.mark.gen_test
async def test_pools_open_again_after_they_were_closed(database: None) -> None:
    for _ in range(2):
        async with opened():
            await pools.get("default").open()
            assert pools.status()["default"]["free"] == 1


@pytest.mark.gen_test
async def test_the_status_has_the_same_keys_before_and_after_connecting(database: None) -> None:
    async with opened():
        before = pools.status()["default"]
        await pools.get("default").open()
        after = pools.status()["default"]
    assert list(before) == list(after)
    assert {"engine", "size", "in_use", "waiting", "free", "connecting"} <= set(before)
    assert (before["free"], after["free"]) == (0, 1)


@pytest.mark.gen_test
async def test_connecting_eagerly_opens_one_connection_of_each(
    database: None, own_postgres: Any
) -> None:
    async with opened():
        await pools.connect()
        assert [pools.status()[alias]["free"] for alias in ("default", "own")] == [1, 1]


def test_an_engine_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"\['sqlite'\].*SQLite, not PostgreSQL"):
        pools.open(Config(ENGINES={"sqlite": "momoko"}))
    with pytest.raises(ConfigurationError, match="'nowhere', which DATABASES has not"):
        pools.open(Config(ENGINES={"nowhere": "threads"}))
    assert not pools.is_open()


@pytest.fixture
def default_engine(io_loop: IOLoop) -> Callable[[], str]:
    """Opens pools and tells what the engine of database "default" is."""

    async def engine() -> str:
        async with opened():
            return str(pools.status()["default"]["engine"])

    return lambda: io_loop.run_sync(engine)


def test_an_engine_for_another_driver_than_djangos_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=f"and {OTHER} needs"):
        pools.open(Config(ENGINES={"default": OTHER}))
    assert not pools.is_open()


@pytest.mark.skipif(is_psycopg3, reason="momoko needs psycopg2")
def test_without_momoko_threads_are_used(
    monkeypatch: pytest.MonkeyPatch, default_engine: Callable[[], str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "momoko" else find(name)
    )
    assert default_engine() == "threads"
    with pytest.raises(ConfigurationError, match=r"pip install --no-deps momoko"):
        pools.open(Config(ENGINES={"default": "momoko"}))


def test_with_a_psycopg_too_old_threads_are_used(
    monkeypatch: pytest.MonkeyPatch, default_engine: Callable[[], str]
) -> None:
    class Driver:
        __name__ = "psycopg"
        __version__ = "3.1.20"

    monkeypatch.setattr(type(connections["default"]), "Database", Driver())
    assert default_engine() == "threads"
    with pytest.raises(ConfigurationError, match=r"3\.1\.20 is too old"):
        pools.open(Config(ENGINES={"default": "psycopg"}))


@pytest.mark.skipif(not is_psycopg3, reason="PostGIS does so with psycopg 3 only")
def test_a_backend_that_registers_types_with_its_connections_is_left_to_threads(
    monkeypatch: pytest.MonkeyPatch, default_engine: Callable[[], str]
) -> None:
    monkeypatch.setattr(
        type(connections["default"]), "register_geometry_adapters", print, raising=False
    )
    assert default_engine() == "threads"
    with pytest.raises(ConfigurationError, match="PostGIS"):
        pools.open(Config(ENGINES={"default": "psycopg"}))


def test_a_database_that_is_not_there_is_named(database: None) -> None:
    with pytest.raises(ConnectionDoesNotExist, match="nowhere"):
        pools.get("nowhere")
