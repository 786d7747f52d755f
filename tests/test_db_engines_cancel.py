from __future__ import annotations

import threading

import psycopg2
import pytest

from tests.database import Watcher
from tests.postgres import Postgres
from tornjango.db.engines import cancel


def test_other_threads_run_while_a_frozen_server_is_told(own_postgres: Postgres) -> None:
    connection = psycopg2.connect(own_postgres.dsn("tornjango"))
    tell = cancel.prepare(connection)
    own_postgres.freeze()
    thread = threading.Thread(target=tell, daemon=True)
    # It would not return before the server thaws, if the interpreter's lock were kept.
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    own_postgres.thaw()
    thread.join(5)
    assert not thread.is_alive()
    connection.close()


def test_a_server_that_is_away_cannot_be_told(own_postgres: Postgres) -> None:
    connection = psycopg2.connect(own_postgres.dsn("tornjango"))
    tell = cancel.prepare(connection)
    own_postgres.stop()
    with pytest.raises(psycopg2.OperationalError):
        tell()
    connection.close()


def test_a_running_statement_ends(postgres: Postgres) -> None:
    watcher = Watcher(postgres.dsn("tornjango"))
    connection = psycopg2.connect(postgres.dsn("tornjango"))
    errors: list[Exception] = []

    def run() -> None:
        try:
            connection.cursor().execute("select pg_sleep(60)")
        except psycopg2.errors.QueryCanceled as exc:
            errors.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    while not watcher.running("pg_sleep(60)"):
        thread.join(0.005)
    cancel.prepare(connection)()
    thread.join()
    assert len(errors) == 1
    connection.close()
    watcher.close()


def test_a_closed_connection_has_nothing_to_cancel(postgres: Postgres) -> None:
    connection = psycopg2.connect(postgres.dsn("tornjango"))
    connection.close()
    with pytest.raises(psycopg2.InterfaceError):
        cancel.prepare(connection)
