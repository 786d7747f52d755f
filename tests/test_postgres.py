"""The PostgreSQL that bin/demo and the tests start for themselves."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.postgres import Postgres, PostgresError, wait_until_ended

ROOT = Path(__file__).parent.parent
# Starts a server, tells its number, and waits to be killed.
ABANDON = """
import sys, tests.postgres as postgres
from pathlib import Path
server = postgres.Postgres(Path(sys.argv[1]))
if len(sys.argv) > 2:
    postgres.WATCH = "cat >/dev/null"
server.start()
print(server.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def server(folder: Path) -> Iterator[Postgres]:
    with Postgres(folder / "data") as server:
        yield server


def abandoned(folder: Path, *arguments: str) -> psutil.Process:
    """The server of a process that was killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", ABANDON, folder / "data", *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout
    server = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.communicate()
    return server


def test_a_server_answers_on_its_socket_and_its_port_and_keeps_its_data(folder: Path) -> None:
    with Postgres(folder / "data") as server:
        server.create_database("music")
        server.create_database("music")
        server.psql("create table song (name text)", "music")
        with socket.create_connection((server.host, server.port)):
            pass
    with Postgres(folder / "data") as again:
        assert again.password == server.password
        assert again.psql("select count(*) from song", "music") == "0\n"


def test_without_tcp_there_is_only_the_socket(folder: Path) -> None:
    with Postgres(folder / "data", tcp=False) as server:
        assert server.psql("show listen_addresses") == "\n"


def test_words_are_lowered_beyond_ascii(server: Postgres) -> None:
    assert server.psql("select lower('ÄÖÉ')") == "äöé\n"


def test_restarting_gives_a_new_process_and_the_same_address(server: Postgres) -> None:
    before = server.pid, server.dsn(tcp=True)
    server.restart("immediate")
    assert server.pid not in {None, before[0]}
    assert server.dsn(tcp=True) == before[1]


def test_starting_and_closing_twice_are_harmless(folder: Path) -> None:
    server = Postgres(folder / "data")
    server.start()
    pid = server.pid
    server.start()
    assert server.pid == pid
    server.close()
    server.close()
    assert server.pid is None
    assert not server.socket.exists()


def test_a_frozen_server_is_closed_like_any_other(folder: Path) -> None:
    server = Postgres(folder / "data")
    server.start()
    server.freeze()
    server.close()
    assert server.pid is None


def test_wrong_sql_is_an_error_that_says_what_postgresql_said(server: Postgres) -> None:
    with pytest.raises(PostgresError, match='relation "nowhere" does not exist'):
        server.psql("select * from nowhere")


def test_a_server_ends_when_the_process_that_started_it_is_killed(folder: Path) -> None:
    wait_until_ended(abandoned(folder))
    assert Postgres(folder / "data").pid is None


def test_a_server_that_was_left_behind_is_replaced(folder: Path) -> None:
    left = abandoned(folder, "unwatched")
    assert left.is_running()
    with Postgres(folder / "data") as server:
        wait_until_ended(left)
        assert server.psql("select 1") == "1\n"


def test_data_half_made_by_a_killed_initdb_is_made_again(folder: Path) -> None:
    (folder / "data.new").mkdir()
    (folder / "data.new" / "PG_VERSION").write_text("18\n")
    with Postgres(folder / "data") as server:
        assert server.psql("select 1") == "1\n"


def test_freezing_bears_with_backends_that_come_and_go(server: Postgres) -> None:
    for _ in range(20):
        server.psql("select 1")
        server.freeze()
        server.thaw()
    assert server.psql("select 1") == "1\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_root_runs_a_server_as_whose_data_it_is(folder: Path) -> None:
    with Postgres(folder / "data") as server:
        process = psutil.Process(server.pid)
        assert process.uids().effective == (folder / "data").stat().st_uid != 0
