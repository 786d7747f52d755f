from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import django
import pytest
from tornado.ioloop import IOLoop

from tests.browser import devtools, new_page, new_reader  # noqa: F401 (fixtures)
from tests.example import Example, served
from tests.postgres import Postgres

if TYPE_CHECKING:
    from tests.database import Watcher

_folder: Path
_postgres: Postgres
_own_postgres: Postgres


def pytest_configure(config: pytest.Config) -> None:
    """Before any module of tests is imported: they import models, and those want Django set up.

    Each process of `-n` has servers of its own; the one that only hands out the tests needs none.
    """
    global _folder, _postgres, _own_postgres
    if _hands_out(config):
        return
    _folder = _make_folder()
    _postgres = Postgres(_folder / "postgres")
    _postgres.start()
    _own_postgres = Postgres(_folder / "own")
    _configure_environment()
    django.setup()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _hands_out(config):
        return
    _own_postgres.close()
    _postgres.close()
    shutil.rmtree(_folder)


def _hands_out(config: pytest.Config) -> bool:
    return bool(config.getoption("numprocesses", None)) and not hasattr(config, "workerinput")


def _make_folder() -> Path:
    """For PostgreSQL, which runs as another user when the tests run as root: pytest closes its folders to others."""
    folder = Path(tempfile.mkdtemp(prefix="tornjango-"))
    folder.chmod(0o711)
    return folder


def _configure_environment() -> None:
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]
    os.environ |= _postgres.env()
    os.environ |= {f"OWN_{name}": value for name, value in _own_postgres.env(tcp=True).items()}
    os.environ |= {
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "TESTS_SQLITE": str(_folder / "tests.sqlite3"),
    }


def _make_tables(server: Postgres, alias: str) -> None:
    from django.core.management import call_command
    from django.db import connections

    server.create_database("tornjango")
    call_command("migrate", database=alias, run_syncdb=True, verbosity=0, interactive=False)
    connections.close_all()


@pytest.fixture(scope="session")
def _tables() -> None:
    _make_tables(_postgres, "default")


@pytest.fixture(autouse=True)
def _connections_closed(_tables: None) -> Iterator[None]:
    from django.db import connections

    yield
    connections.close_all()


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder, in which PostgreSQL's data may be."""
    folder = _make_folder()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def postgres() -> Postgres:
    """The server of database "default", shared by all tests: they may end its backends, but not stop it."""
    return _postgres


@pytest.fixture(scope="session")
def postgres_folder() -> tuple[Postgres, Path]:
    """That server, and a folder for what goes with databases of a test module's own."""
    return _postgres, _folder


@pytest.fixture
def watcher(postgres: Postgres) -> Iterator[Watcher]:
    """Sees from the outside what happens on the server of database "default"."""
    # It imports models.
    from tests.database import Watcher

    watcher = Watcher(postgres.dsn("tornjango"))
    yield watcher
    watcher.close()


@pytest.fixture
def database(_tables: None) -> None:
    """Database "default" with all tables empty, but those that `migrate` fills."""
    from django.apps import apps
    from django.db import connection

    filled = {"django_content_type", "auth_permission"}
    tables = {model._meta.db_table for model in apps.get_models(include_auto_created=True)}
    names = ", ".join(connection.ops.quote_name(name) for name in sorted(tables - filled))
    with connection.cursor() as cursor:
        # A test before this one may have left a transaction open: better an error than waiting for ever.
        cursor.execute("set lock_timeout = '5s'")
        cursor.execute(f"truncate {names} restart identity cascade")
        cursor.execute("reset lock_timeout")


@pytest.fixture(scope="session")
def _own_tables() -> Postgres:
    _own_postgres.start()
    _make_tables(_own_postgres, "own")
    return _own_postgres


@pytest.fixture
def own_postgres(_own_tables: Postgres) -> Iterator[Postgres]:
    """The server of database "own" (on TCP), which a test may stop, restart and freeze as it likes."""
    _own_tables.start()
    yield _own_tables
    _own_tables.thaw()


@pytest.fixture(scope="session")
def example() -> Iterator[Example]:
    """The example project, served with its sample entries in a database of its own."""
    with served(_postgres, _folder) as example:
        yield example


@pytest.fixture
def io_loop() -> Iterator[IOLoop]:
    """pytest-tornado's, without the calls that Tornado deprecates; tasks left over are cancelled at the end."""
    loop = IOLoop(make_current=False)
    aio: asyncio.AbstractEventLoop = loop.asyncio_loop
    asyncio.set_event_loop(aio)
    yield loop
    tasks = asyncio.all_tasks(aio)
    for task in tasks:
        task.cancel()
    aio.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    aio.run_until_complete(aio.shutdown_asyncgens())
    aio.run_until_complete(aio.shutdown_default_executor())
    asyncio.set_event_loop(None)
    loop.close(all_fds=True)


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture(autouse=True)
def error_log() -> Iterator[list[logging.LogRecord]]:
    """What was logged as an error. A test takes out what it expects (`error_log.pop()`); the rest fails it."""
    handler = _Errors()
    logging.getLogger().addHandler(handler)
    yield handler.records
    logging.getLogger().removeHandler(handler)
    unexpected = [f"{record.name}: {record.getMessage()}" for record in handler.records]
    assert not unexpected, "logged errors that the test did not take from error_log"
