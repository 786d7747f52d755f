"""For Django's ``runtests.py``. ``__main__`` says by the environment which engine or the bridge, and where the databases are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Django's own, beside runtests.py: the databases are replaced below.
from test_sqlite import *  # type: ignore[import-not-found]  # noqa: F403

ENGINE = os.environ["REFEREE_ENGINE"]
MODULE = os.environ["REFEREE_MODULE"]
FOLDER = Path(os.environ["REFEREE_FOLDER"])


def _sqlite(alias: str) -> dict[str, Any]:
    # In a file: one in memory would be of one connection only.
    return {
        "ENGINE": "django.db.backends.sqlite3",
        "TEST": {"NAME": FOLDER / f"{MODULE}-{alias}.sqlite3"},
    }


def _postgresql(alias: str) -> dict[str, Any]:
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": f"{MODULE}_{alias}",
        "HOST": os.environ["PGHOST"],
        "PORT": os.environ["PGPORT"],
        "USER": os.environ["PGUSER"],
    }


_database = _sqlite if ENGINE.endswith("sqlite") else _postgresql
_engine = ENGINE.removesuffix("-sqlite")
# In memory for the bridge, as Django has them: all threads are given the test's connections.
if _engine != "bridge":
    DATABASES = {alias: _database(alias) for alias in ("default", "other")}
TORNJANGO = {"ENGINES": dict.fromkeys(DATABASES, _engine)}
if _engine in ("bridge", "django"):
    TORNJANGO.clear()
_runners = {"bridge": "BridgeRunner", "django": "Runner"}
TEST_RUNNER = "tests.referee.runner." + _runners.get(_engine, "GreenRunner")
