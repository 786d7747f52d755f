from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connections
from django.db.backends.signals import connection_created

from tests.database import opened
from tests.postgres import Postgres
from tornjango import db
from tornjango.db.engines.session import Session, with_addresses
from tornjango.exceptions import ConfigurationError


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hosts that have addresses."""
    known = {"one": ["10.0.0.1"], "two": ["10.0.0.2", "::2", "10.0.0.2"]}

    def look_up(host: str, port: object, **options: object) -> list[Any]:
        return [(0, 0, 0, "", (address, 0)) for address in known[host]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    for name in ("PGHOST", "PGHOSTADDR", "PGPORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("names")
def test_hosts_are_tried_in_order_with_all_their_addresses() -> None:
    params = {"host": "one,two,/run", "port": "1,2,3", "user": "us"}
    assert with_addresses(params) == {
        "host": "one,two,two,/run",
        "hostaddr": "10.0.0.1,10.0.0.2,::2,",
        "port": "1,2,2,3",
        "user": "us",
    }


@pytest.mark.usefixtures("names")
def test_one_port_is_that_of_all_hosts() -> None:
    found = with_addresses({"host": "one,127.0.0.1", "port": 5433})
    assert (found["hostaddr"], found["port"]) == ("10.0.0.1,127.0.0.1", "5433,5433")
    assert with_addresses({"host": "one"})["port"] == ""


@pytest.mark.usefixtures("names")
def test_the_environments_host_is_looked_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "one")
    assert with_addresses({})["hostaddr"] == "10.0.0.1"


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"host": "/run/postgresql"},
        {"host": "@abstract"},
        {"host": "unknown", "hostaddr": "10.0.0.9"},
        {"host": "unknown", "service": "ours"},
        {"host": "one,two", "port": "1,2,3"},
    ],
)
def test_what_needs_no_looking_up_is_left_alone(params: dict[str, str]) -> None:
    assert with_addresses(params) == params


def test_an_isolation_level_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = connections["own"]
    monkeypatch.setitem(wrapper.settings_dict["OPTIONS"], "isolation_level", 99)
    with pytest.raises(ConfigurationError, match="isolation_level"):
        Session(wrapper)


def test_receivers_that_the_pool_does_not_call_are_named(caplog: pytest.LogCaptureFixture) -> None:
    def receiver(**kwargs: object) -> None: ...

    Session(connections["default"])
    assert not caplog.records
    connection_created.connect(receiver)
    try:
        Session(connections["default"])
    finally:
        connection_created.disconnect(receiver)
    assert "receiver" in caplog.records[0].getMessage()
    assert caplog.records[0].levelno == logging.WARNING


@pytest.fixture
def extension_types(own_postgres: Postgres) -> Iterator[None]:
    """Types that look like those of the extensions, which not every PostgreSQL has: handlers go by name."""
    own_postgres.psql("""create type hstore as enum ('"a"=>"1", "b"=>NULL')""", "tornjango")
    own_postgres.psql("create type citext as enum ('A', 'b')", "tornjango")
    yield
    own_postgres.psql("drop type hstore; drop type citext", "tornjango")


@pytest.mark.gen_test
async def test_types_of_extensions_come_back_as_python_values(extension_types: None) -> None:
    value = """'"a"=>"1", "b"=>NULL'::hstore"""
    async with opened():
        sql = f"select {value}, array[{value}], '{{A,b}}'::citext[], 'A'::citext"
        [row] = await db.query(sql, using="own")
    assert row == ({"a": "1", "b": None}, [{"a": "1", "b": None}], ["A", "b"], "A")
