"""What is the PostgreSQL broker's own; what every broker promises is in test_comet_brokers.py."""

from __future__ import annotations

import logging
import secrets
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import StringIO
from typing import Any

import psycopg2
import pytest
from django.core.management import call_command
from django.db import connections
from django.test import override_settings

from tests import comet_processes as processes
from tests.comet_brokers import ROOM, Follower, append, draft, eventually, in_threads, insist
from tests.comet_postgres import PostgresServer
from tests.postgres import Postgres
from tests.serving import until
from tornjango.comet.brokers import postgres as module
from tornjango.comet.brokers import postgres_sql as sql
from tornjango.comet.brokers import postgres_trim
from tornjango.comet.brokers.postgres import PostgresBroker
from tornjango.comet.log import Channel, Limits, Position
from tornjango.exceptions import BrokerUnavailable, ConfigurationError

HALL = Channel("hall:1", Limits(history=2, ttl=600, max_bytes=10**6))
DAY = 24 * 3600


@pytest.fixture
def server(own_postgres: Postgres) -> Iterator[PostgresServer]:
    server = PostgresServer(own_postgres)
    yield server
    server.close()


@contextmanager
def following(server: PostgresServer) -> Iterator[Follower]:
    follower = Follower(server.broker())
    yield follower
    follower.stop()


# The tables


def _tables(alias: str) -> list[str]:
    with connections[alias].cursor() as cursor:
        names = connections[alias].introspection.table_names(cursor)
    return [name for name in names if name.startswith("tornjango")]


def _migrate(alias: str, *target: str) -> None:
    call_command("migrate", "tornjango", *target, database=alias, verbosity=0, interactive=False)


class NotHere:
    """A router that keeps COMET out of database "own"."""

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        return None if app_label != "tornjango" else db != "own"


def test_migration_makes_the_tables_and_removes_them(server: PostgresServer) -> None:
    assert len(_tables("own")) == 4
    try:
        _migrate("own", "zero")
        assert _tables("own") == []
        with override_settings(DATABASE_ROUTERS=[NotHere()]):
            _migrate("own")
        assert _tables("own") == []
        with override_settings(DATABASE_ROUTERS=[NotHere()]):
            _migrate("own", "zero")
    finally:
        _migrate("own")
    assert len(_tables("own")) == 4


def test_migration_does_nothing_to_another_database() -> None:
    _migrate("sqlite")
    assert _tables("sqlite") == []
    _migrate("sqlite", "zero")


def test_no_migration_is_missing() -> None:
    call_command("makemigrations", "tornjango", check=True, dry_run=True, stdout=StringIO())


def test_missing_tables_are_said_with_what_makes_them(server: PostgresServer) -> None:
    _migrate("own", "zero")
    try:
        broker = server.broker()
        for call in (partial(append, broker, draft(1)), broker.head, partial(broker.backlog, ROOM)):
            with pytest.raises(ConfigurationError, match=r"manage\.py migrate --database=own"):
                call()
    finally:
        _migrate("own")
    append(broker, draft(1))


# Its connections


def _connect_with(monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    monkeypatch.setitem(connections.settings["own"], "OPTIONS", options)


def test_it_works_whatever_the_default_isolation_is(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _connect_with(
        monkeypatch,
        isolation_level=3,
        options="-c default_transaction_isolation=serializable -c synchronous_commit=off",
        # Django's, which only psycopg has.
        pool=True,
    )
    with following(server) as follower:

        def publish() -> None:
            broker = server.broker()
            for n in range(20):
                append(broker, draft(n))

        in_threads(publish, publish, publish)
        follower.until(lambda: len(follower.messages) == 60)


def test_server_that_takes_no_writes_is_said_to_be_a_replica(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.broker().head()
    _connect_with(monkeypatch, options="-c default_transaction_read_only=on")
    with pytest.raises(BrokerUnavailable, match="needs the primary"):
        append(server.broker(), draft(1))


def test_error_names_the_server_and_what_it_said(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(connections.settings["own"], "NAME", "nowhere")
    with pytest.raises(BrokerUnavailable, match=r":\d+/nowhere .*'own'.* does not exist"):
        server.broker().head()


def test_connection_that_does_not_keep_listening_is_said(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As behind a PgBouncer in transaction mode.
    monkeypatch.setattr(sql, "LISTEN", "SELECT 1")
    monkeypatch.setattr(module, "SILENCE", 0.01)
    broker = server.broker()
    with pytest.raises(ConfigurationError, match="PgBouncer"):
        broker.tail(_Sink(broker.head()))


class _Sink:
    """One that is never stopped."""

    stopped = False

    def __init__(self, end: Position) -> None:
        self.end = end

    def begin(self, end: Position) -> None:
        self.end = end

    def deliver(self, messages: Any) -> None:
        self.end = Position(self.end.epoch, messages[-1].offset)

    def connected(self) -> None: ...


@contextmanager
def _head_locked(postgres: Postgres) -> Iterator[None]:
    connection = psycopg2.connect(postgres.dsn("tornjango"))
    try:
        connection.cursor().execute("update tornjango_comet_head set last = last")
        yield
        connection.rollback()
    finally:
        connection.close()


def test_append_that_waits_too_long_for_its_turn_fails_and_may_come_again(
    server: PostgresServer, own_postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PostgresBroker, "TIMEOUT", 0.3)
    broker = server.broker()
    before = broker.head()
    batch = secrets.token_bytes(16)
    with _head_locked(own_postgres), pytest.raises(BrokerUnavailable):
        broker.append(batch, [draft(1)], None)
    monkeypatch.undo()
    after = server.broker().append(batch, [draft(1)], None)
    assert after.offset == before.offset + 1


def test_closing_ends_what_is_under_way(server: PostgresServer, own_postgres: Postgres) -> None:
    broker = server.broker()
    append(broker, draft(1))
    failed: list[str] = []

    def fails() -> None:
        with pytest.raises(BrokerUnavailable) as caught:
            append(broker, draft(2))
        failed.append(str(caught.value))

    with _head_locked(own_postgres):
        thread = threading.Thread(target=fails)
        thread.start()
        waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
        eventually(lambda: server.sql(waiting).strip() != "0")
        broker.close()
        thread.join(20)
    assert failed
    with pytest.raises(BrokerUnavailable, match="closed"):
        broker.head()


def test_connections_are_few_and_closed_in_the_end(server: PostgresServer) -> None:
    broker = server.broker()
    in_threads(*[partial(broker.backlog, ROOM)] * 8)
    for _ in range(5):
        append(broker, draft(1))
    assert broker.status()["connections"] == module.IDLE
    broker.close()
    assert broker.status()["connections"] == 0


def test_status_tells_of_the_server_and_of_this_process(server: PostgresServer) -> None:
    broker = server.broker()
    append(broker, draft(1), draft(2))
    status = broker.status()
    assert (status["database"], status["appended"]) == ("own", 2)
    assert str(status["server"]).endswith("/tornjango")


def test_it_works_over_a_unix_socket(watcher: object) -> None:
    broker = PostgresBroker("default")
    follower = Follower(broker)
    append(broker, draft("here"))
    follower.until_data("here")
    follower.stop()
    broker.close()


# The log's identity


def test_log_that_was_restored_elsewhere_has_a_new_epoch(server: PostgresServer) -> None:
    before = append(server.broker(), draft(1))
    with following(server) as follower:
        # What a dump brings along, or a server that was promoted.
        server.sql("update tornjango_comet_head set home = 'another/00000002'")
        server.end_connections()
        follower.until(lambda: len(follower.begins) == 2)
        after = insist(server.broker(), draft(2))
        follower.until_data(2)
    assert after.epoch != before.epoch
    assert after.offset == before.offset + 1


def test_head_that_is_lost_begins_after_all_that_there_was(server: PostgresServer) -> None:
    broker = server.broker()
    before = append(broker, *(draft(n, HALL) for n in range(5)))
    server.forget()
    server.sql("delete from tornjango_comet_head; delete from tornjango_comet_message")
    after = append(broker, draft("new", HALL))
    assert after.epoch != before.epoch
    assert after.offset > before.offset - 2
    assert [message.data for message in broker.backlog(HALL).messages] == ["new"]


def test_head_that_was_put_back_is_put_right(server: PostgresServer) -> None:
    broker = server.broker()
    before = append(broker, *(draft(n) for n in range(5)))
    server.sql("update tornjango_comet_head set last = last - 2")
    after = insist(broker, draft("new"))
    assert after.epoch != before.epoch
    assert after.offset == before.offset + 1


# Trimming


def _count(server: PostgresServer, table: str = "message") -> int:
    return int(server.sql(f"select count(*) from tornjango_comet_{table}"))


def test_nothing_is_removed_that_a_process_may_be_about_to_read(server: PostgresServer) -> None:
    broker = server.broker()
    batch = secrets.token_bytes(16)
    end = broker.append(batch, [draft(n, HALL) for n in range(5)], None)
    assert broker.trim(0) == 0
    assert broker.append(batch, [draft(n, HALL) for n in range(5)], None) == end
    server.age(sql.GRACE + 1)
    assert broker.trim(0) == 3
    assert _count(server) == 2
    assert broker.trim(0) == 0


def test_what_is_beyond_the_limits_is_removed_by_small_steps(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_trim, "ROWS", 4)
    broker = server.broker()
    large = Channel("large:1", Limits(history=1000, ttl=600, max_bytes=200))
    drafts = [draft(n, channel) for n in range(30) for channel in (HALL, large, ROOM)]
    append(broker, *drafts)
    before = [broker.backlog(channel) for channel in (HALL, large, ROOM)]
    server.age(sql.GRACE + 1)
    removed = broker.trim(0)
    kept = [broker.backlog(channel) for channel in (HALL, large, ROOM)]
    assert [backlog.floor for backlog in kept] == [backlog.floor for backlog in before]
    assert _count(server) == sum(len(backlog.messages) for backlog in kept) == 90 - removed
    server.age(1000)
    assert broker.trim(0) == 90 - removed
    assert _count(server) == 0
    assert [broker.backlog(channel).messages for channel in (HALL, large, ROOM)] == [[]] * 3
    assert broker.backlog(ROOM).floor == 90


def test_one_process_trims_at_a_time(server: PostgresServer) -> None:
    one, other = server.broker(), server.broker()
    append(one, *(draft(n, HALL) for n in range(5)))
    server.age(sql.GRACE + 1)
    assert (one.trim(), other.trim()) == (3, 0)


def test_tail_has_old_messages_removed(server: PostgresServer) -> None:
    append(server.broker(), *(draft(n, HALL) for n in range(5)))
    server.age(sql.GRACE + 1)
    with following(server) as follower:
        eventually(lambda: follower.broker.status()["removed"] == 3)


def test_trimming_that_fails_is_a_warning(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sql, "TRIM", "SELECT 1/0")
    with following(server), caplog.at_level(logging.WARNING, "tornjango.comet"):
        eventually(lambda: any("not removed" in message for message in caplog.messages))


def test_floors_are_forgotten_after_a_day_but_not_those_of_what_is_left(
    server: PostgresServer,
) -> None:
    broker = server.broker()
    gone = Channel("gone:1", Limits(history=1, ttl=600, max_bytes=10**6))
    kept = Channel("kept:1", Limits(history=1, ttl=10 * DAY, max_bytes=10**6))
    untouched = Channel("untouched:1", Limits(history=10, ttl=10 * DAY, max_bytes=10**6))
    begin = broker.head().offset
    append(broker, draft(1, kept), draft(2, kept), draft(3, untouched), draft(4, gone))
    server.age(1000)
    assert broker.trim(0) == 2
    assert _count(server, "floor") == 2
    server.age(DAY + 1)
    broker.trim(0)
    assert _count(server, "floor") == 0
    assert broker.backlog(gone)[:2] == ([], begin + 4)
    assert broker.backlog(Channel("never:1", kept.limits))[:2] == ([], begin + 4)
    messages, floor, _ = broker.backlog(kept)
    assert ([message.data for message in messages], floor) == ([2], begin + 1)
    messages, floor, _ = broker.backlog(untouched)
    assert [message.data for message in messages] == [3]
    assert floor <= begin + 2


# Processes around it


@pytest.fixture
def name() -> str:
    return f"open:{uuid.uuid4()}"


@pytest.mark.gen_test
async def test_reader_gets_what_another_process_publishes(
    server: PostgresServer, name: str
) -> None:
    with processes.started(server.broker(), server.broker()) as (one, other):
        await one.ready()
        cursor = await processes.cursor_of(one, name)
        reader = await processes.reader_at(other, cursor, name)
        sent = one.send([processes.draft(name, n) for n in range(3)], 20)
        found: list[object] = []
        with reader.parked():
            while len(found) < 3:
                found += processes.data(await reader.next(20))
        assert found == [0, 1, 2]
        await until(sent.done)
        assert sent.result(0).offset == other.present().offset


class _Held(PostgresBroker):
    """Delivers nothing after the beginning, until it is let go."""

    def __init__(self, alias: str) -> None:
        super().__init__(alias)
        self.held = threading.Event()

    def _fetch(self, connection: Any, sink: Any) -> bool:
        if sink.end is not None:
            while not self.held.wait(0.01):
                if sink.stopped:
                    return False
        return super()._fetch(connection, sink)


@pytest.mark.gen_test
async def test_reader_that_is_ahead_of_a_process_waits_for_it(
    server: PostgresServer, name: str
) -> None:
    behind = _Held("own")
    with processes.started(server.broker()) as [one], processes.started(behind) as [other]:
        await one.ready()
        await other.ready()
        sent = one.send([processes.draft(name, "first")], 20)
        await until(lambda: sent.done() and one.present() == sent.result())
        cursor = await processes.cursor_of(one, name)
        reader = await processes.reader_at(other, cursor, name)
        with reader.parked():
            assert (await reader.next(0)).messages == []
            sent = one.send([processes.draft(name, "second")], 20)
            behind.held.set()
            answer = await reader.next(20)
        await until(sent.done)
        assert (processes.data(answer), answer.gaps) == (["second"], [])


@pytest.mark.gen_test
async def test_process_that_started_later_has_the_backlog_of_older_cursors(
    server: PostgresServer, name: str
) -> None:
    with processes.started(server.broker()) as [one]:
        await one.ready()
        cursor = await processes.cursor_of(one, name)
        sent = one.send([processes.draft(name, n) for n in range(3)], 20)
        await until(sent.done)
    with processes.started(server.broker()) as [later]:
        reader = await processes.reader_at(later, cursor, name)
        with reader.parked():
            answer = await reader.next(20)
        assert (processes.data(answer), answer.gaps) == ([0, 1, 2], [])
