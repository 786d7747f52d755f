from __future__ import annotations

import asyncio
import importlib.util
from typing import Any

from django.db import connections
from django.utils.version import get_version_tuple

from tornjango import asyncdjango, green
from tornjango.conf import Config, get_config
from tornjango.db import connection
from tornjango.db.engines.base import Engine
from tornjango.db.engines.plain import PlainEngine
from tornjango.db.engines.threads import ThreadsEngine
from tornjango.exceptions import ConfigurationError

#: The driver that Django must use for a database, so that the parameters it compiles fit the engine.
DRIVERS = {"momoko": "psycopg2", "psycopg": "psycopg"}
PSYCOPG = (3, 2)

_engines: dict[str, Engine] | None = None
_plain: dict[str, Engine] = {}


def open(config: Config | None = None) -> None:
    """Marks this process as served by tornjango: from now on, queries run on engines of their own.

    Connections are opened when the first queries need them; ``await connect()`` opens one of each now.
    Raises ConfigurationError for a database that cannot have the engine that the settings say, and RuntimeError when
    the pools are open.
    """
    global _engines
    if _engines is not None:
        raise RuntimeError("The pools are open in this process already: await pools.close() first.")
    config = config or get_config()
    for alias in config.ENGINES:
        if alias not in connections:
            raise ConfigurationError(
                f'TORNJANGO["ENGINES"] has {alias!r}, which DATABASES has not.'
            )
    engines = {alias: _make(alias, config) for alias in connections}
    connection.install(engines)
    asyncdjango.install()
    green.serve()
    _engines = engines


async def connect() -> None:
    """Returns when every database has answered; raises what keeps the first one from it."""
    await asyncio.gather(*(engine.open() for engine in (_engines or {}).values()))


async def close() -> None:
    """Closes all connections; queries run on Django's own again. Closing twice is harmless."""
    global _engines
    engines, _engines = _engines, None
    if engines is not None:
        green.stop_serving()
        asyncdjango.uninstall()
        connection.uninstall()
    await asyncio.gather(*(engine.close() for engine in (engines or {}).values()))


def is_open() -> bool:
    return _engines is not None


def get(alias: str) -> Engine:
    """The engine of a database; Django's own connection, where the caller's queries are not for the pools.

    Raises Django's ConnectionDoesNotExist for an alias that DATABASES has not.
    """
    engines = _engines if _engines is not None and green.is_served() else _plain
    engine = engines.get(alias)
    if engine is not None:
        return engine
    connections[alias]
    return _plain.setdefault(alias, PlainEngine(alias))


def status() -> dict[str, dict[str, Any]]:
    """Alias to the numbers of its engine; empty while the pools are not open."""
    return {alias: engine.status() for alias, engine in (_engines or {}).items()}


def choice(alias: str, config: Config) -> tuple[str, str]:
    """The engine that a database has, and for "threads", why; this opens nothing.

    Raises ConfigurationError where the settings name one that it cannot have, and what Django raises for a backend that
    cannot be imported.
    """
    wrapper: Any = connections.create_connection(alias)
    given = config.ENGINES.get(alias)
    engine = given or _default(wrapper)
    if engine == "threads":
        why = 'TORNJANGO["ENGINES"] says so.' if given else _obstacle(wrapper)
        return engine, f"{why[0].upper()}{why[1:]}"
    if unfit := _unfit(engine, wrapper):
        raise _cannot_be(alias, engine, unfit)
    return engine, ""


def _obstacle(wrapper: Any) -> str:
    """What keeps a database from the engine of the driver that Django uses for it."""
    driver = wrapper.Database.__name__
    engine = next((name for name, needed in DRIVERS.items() if needed == driver), "momoko")
    return _unfit(engine, wrapper) or ""


def _cannot_be(alias: str, engine: str, unfit: str) -> ConfigurationError:
    return ConfigurationError(f'TORNJANGO["ENGINES"][{alias!r}] cannot be "{engine}": {unfit}')


def _make(alias: str, config: Config) -> Engine:
    wrapper: Any = connections.create_connection(alias)
    wanted = config.ENGINES.get(alias) or _default(wrapper)
    if wanted == "threads":
        return ThreadsEngine(alias, config)
    unfit = _unfit(wanted, wrapper)
    if unfit:
        raise _cannot_be(alias, wanted, unfit)
    # Each imports its driver, which is optional.
    if wanted == "psycopg":
        from tornjango.db.engines.psycopg import PsycopgEngine

        return PsycopgEngine(alias, config)
    from tornjango.db.engines.momoko import MomokoEngine

    return MomokoEngine(alias, config)


def _default(wrapper: Any) -> str:
    return next((engine for engine in DRIVERS if not _unfit(engine, wrapper)), "threads")


def _unfit(engine: str, wrapper: Any) -> str | None:
    """Why a database cannot be reached by an engine; None if it can."""
    if wrapper.vendor != "postgresql":
        return f"the database is {wrapper.display_name}, not PostgreSQL."
    driver, needed = wrapper.Database.__name__, DRIVERS[engine]
    if driver != needed:
        return (
            f"Django uses {driver} for it, and {engine} needs {needed}. "
            "(Django takes psycopg, which is psycopg 3, wherever it is installed, and psycopg2 elsewhere.)"
        )
    if engine == "momoko" and importlib.util.find_spec("momoko") is None:
        return "momoko is not installed (pip install --no-deps momoko==2.2.5.1)."
    if engine == "psycopg" and hasattr(wrapper, "register_geometry_adapters"):
        return "its backend registers PostGIS's types with psycopg's connections, and this engine has none."
    if engine == "psycopg" and get_version_tuple(wrapper.Database.__version__) < PSYCOPG:
        return f'psycopg {wrapper.Database.__version__} is too old (pip install "psycopg[binary]>=3.2").'
    return None
