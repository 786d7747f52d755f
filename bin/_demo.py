"""Serves the example project, with a PostgreSQL of its own unless the environment names another. See bin/demo."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).absolute().parent.parent
DATA = ROOT / ".data"
SERVER_NAMES = {"DATABASE_URL", "PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGSERVICE"}
ADDRESS = re.compile(r"(?:(?P<host>[^:\[\]]+|\[[0-9a-fA-F:]+\]):)?(?P<port>\d{1,5})")

sys.path[:0] = [str(ROOT), str(ROOT / "example_project")]

from tests.postgres import Postgres, PostgresError  # noqa: E402


def main(address: str = "127.0.0.1:8000") -> None:
    signal.signal(signal.SIGTERM, _stop)
    host, port = _parse(address)
    _check_free(host, port)
    DATA.mkdir(exist_ok=True)
    with _alone(DATA / "demo.lock"), _database():
        _fill()
        url = f"http://{host}:{port}/"
        _say(f"\nOpen {url} in a browser (two of them, to see comments arrive). Ctrl-C ends it.\n")
        _django("serve", "--noreload", f"{host}:{port}")


def _stop(*args: object) -> NoReturn:
    """Until the server has its own way to stop: what is open is closed on the way out."""
    sys.exit(0)


def _parse(address: str) -> tuple[str, int]:
    match = ADDRESS.fullmatch(address)
    if not match or not 0 < int(match["port"]) < 65536:
        sys.exit(f"{address!r} is not an address: give a port, or address:port.")
    return match["host"] or "127.0.0.1", int(match["port"])


def _check_free(host: str, port: int) -> None:
    """Before anything is started, since loading the sample data takes a while."""
    bare = host.strip("[]")
    try:
        socket.create_server(
            (bare, port), family=socket.AF_INET6 if ":" in bare else socket.AF_INET
        ).close()
    except OSError as error:
        sys.exit(
            f"Cannot listen on {host}:{port}: {error.strerror or error}."
            " End what listens there, or choose another port: bin/demo 8001"
        )


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Two demos in one clone would share PostgreSQL's data, and the first to end would stop it for both."""
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            sys.exit(
                f"bin/demo runs in this clone already, as process {file.read()}: end it first."
            )
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
        yield


@contextlib.contextmanager
def _database() -> Iterator[None]:
    if SERVER_NAMES & os.environ.keys():
        yield
        return
    _say("Starting PostgreSQL, with its data in .data/postgres")
    with Postgres(DATA / "postgres", tcp=False, durable=True) as server:
        server.create_database("tornjango")
        os.environ["DATABASE_URL"] = server.dsn("tornjango")
        yield


def _fill() -> None:
    from django.db import OperationalError

    try:
        _django("migrate", "--verbosity=0")
    except OperationalError as error:
        sys.exit(f"The database does not answer: {str(error).strip()}")
    _django("load_sample")


def _django(*command: str) -> None:
    from django.core.management import execute_from_command_line

    os.environ["DJANGO_SETTINGS_MODULE"] = "config.settings"
    execute_from_command_line(["manage.py", *command])


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except PostgresError as error:
        sys.exit(str(error))
    except PermissionError as error:
        sys.exit(f"{error.filename} belongs to another user: who ran bin/demo here before?")
    except KeyboardInterrupt:
        sys.exit(0)
