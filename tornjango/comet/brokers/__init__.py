"""What carries messages between the processes of a project, and which one it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.db import connections

from tornjango.conf import Config
from tornjango.exceptions import ConfigurationError

if TYPE_CHECKING:
    from tornjango.comet.brokers.base import Broker

MEMORY, POSTGRES, REDIS = "memory", "postgres", "redis"


def chosen(config: Config) -> str:
    """The broker's name. With several workers, and no other word, it is PostgreSQL, if that is the database."""
    if config.COMET.BROKER != "auto":
        return config.COMET.BROKER
    if config.WORKERS > 1 and is_postgres(config.COMET.DATABASE):
        return POSTGRES
    return MEMORY


def is_postgres(alias: str) -> bool:
    return alias in connections and connections[alias].vendor == "postgresql"


def key(config: Config) -> object:
    """Two configurations with one key have the same broker."""
    comet = config.COMET
    return chosen(config), comet.DATABASE, comet.REDIS, comet.PREFIX


def make(config: Config) -> Broker | None:
    """A broker that has not connected yet; None for the memory. Raises ConfigurationError where it lacks something."""
    name = chosen(config)
    if name == POSTGRES:
        from tornjango.comet.brokers.postgres import PostgresBroker

        if not is_postgres(config.COMET.DATABASE):
            raise ConfigurationError(
                f'TORNJANGO["COMET"]["DATABASE"] is {config.COMET.DATABASE!r}, which is no PostgreSQL of DATABASES.'
            )
        return PostgresBroker(config.COMET.DATABASE)
    if name == REDIS:
        try:
            from tornjango.comet.brokers.redis import RedisBroker
        except ImportError as error:
            raise ConfigurationError(
                'The Redis broker needs redis-py: pip install "tornjango[redis]"'
            ) from error
        return RedisBroker(config.COMET.REDIS, config.COMET.PREFIX)
    return None
