"""The PostgreSQL for Django's tests, and what of them it can run."""

from __future__ import annotations

from pathlib import Path

from tests.postgres import Postgres

#: What the tables of some modules cannot be made without: extensions, and collations of ICU.
NEEDS = {
    "db_functions": ("pgcrypto",),
    "model_fields": ("sv-x-icu",),
    "postgres_tests": (
        *("bloom", "btree_gin", "btree_gist", "citext", "hstore", "pg_trgm", "unaccent"),
        *("uuid-ossp", "sv-x-icu"),
    ),
}

HAS = "select name from pg_available_extensions union select collname from pg_collation"


class InstalledPostgres(Postgres):
    """As of a Linux distribution, with all that belongs to PostgreSQL; its data is in a folder of ours all the same."""

    locale = ("--locale=C.UTF-8",)

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        super().__init__(folder)

    @property
    def programs(self) -> Path:
        return self._programs


def find(folder: Path) -> Postgres:
    """The newest that the machine has installed, else the one of the wheel, which has neither extensions nor ICU."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=_version)
    return InstalledPostgres(found[-1].parent, folder) if found else Postgres(folder)


def _version(initdb: Path) -> float:
    return float(initdb.parent.parent.name)


def lacks(server: Postgres, module: str) -> list[str]:
    """What a module's tests need and the server has not."""
    has = server.psql(HAS).split()
    return [name for name in NEEDS.get(module, ()) if name not in has]
