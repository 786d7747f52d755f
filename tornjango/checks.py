"""System checks: what is wrong in a project is said before it is a crash.

tornjango.E001  a wrong key or value in ``settings.TORNJANGO``
tornjango.E002  several workers, and COMET channels whose messages stay in one of them
tornjango.E003  static files are to be served from a STATIC_ROOT that is not set
tornjango.E004  metrics without prometheus-client
tornjango.E005  a database that cannot have the engine that the settings say
tornjango.E006  LOOP_MIDDLEWARE names what is not in MIDDLEWARE
tornjango.E007  a COMET broker that lacks its database, its tables or its package
tornjango.W001  another app's ``runserver`` hides tornjango's
tornjango.W002  metrics of several workers, and nothing that gathers them
tornjango.W003  several workers where DEBUG is on
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning, register
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.utils.module_loading import autodiscover_modules

from tornjango.comet import brokers, channels
from tornjango.conf import Config, get_config
from tornjango.db import pools
from tornjango.exceptions import ConfigurationError
from tornjango.monitoring import MULTIPROCESS_DIR

WRONG_SETTINGS = "tornjango.E001"


def run() -> list[CheckMessage]:
    """All that SILENCED_SYSTEM_CHECKS leaves, whether the app is installed or not; they connect to nothing."""
    found = [*check_settings(), *check_app_order()]
    return [message for message in found if not message.is_silenced()]


@register
def check_settings(**kwargs: Any) -> list[CheckMessage]:
    try:
        config = get_config()
    except ConfigurationError as exc:
        hint = "The keys and what they take are listed in tornjango's README, under Settings."
        return [Error(str(exc), hint=hint, id=WRONG_SETTINGS)]
    return [message for check in _CHECKS for message in check(config)]


def _comet(config: Config) -> Iterator[CheckMessage]:
    autodiscover_modules("channels")  # where the app is not installed, nothing has
    if not channels.patterns():
        return
    broker = brokers.chosen(config)
    if config.WORKERS > 1 and broker == brokers.MEMORY:
        yield Error(
            f'TORNJANGO["WORKERS"] is {config.WORKERS}, and COMET keeps its channels in the memory of one process: '
            "what one worker publishes, readers in another would miss.",
            hint='Set TORNJANGO["COMET"]["BROKER"] to "postgres" or "redis", or serve with one worker.',
            id="tornjango.E002",
        )
    if broker == brokers.POSTGRES:
        yield from _postgres_broker(config)
    if broker == brokers.REDIS and importlib.util.find_spec("redis") is None:
        yield Error(
            'TORNJANGO["COMET"]["BROKER"] is "redis", and redis-py is not installed.',
            hint='pip install "tornjango[redis]"',
            id="tornjango.E007",
        )


def _postgres_broker(config: Config) -> Iterator[CheckMessage]:
    alias = config.COMET.DATABASE
    if not brokers.is_postgres(alias):
        yield Error(
            f'TORNJANGO["COMET"]["DATABASE"] is {alias!r}, which is no PostgreSQL of DATABASES.',
            hint="Name the alias of one that is, and no replica.",
            id="tornjango.E007",
        )
    elif not apps.is_installed("tornjango"):
        yield Error(
            "COMET keeps its channels in PostgreSQL, and its tables are not made: 'tornjango' is not in INSTALLED_APPS.",
            hint=f"Put it there, and run manage.py migrate --database={alias}.",
            id="tornjango.E007",
        )


def _static(config: Config) -> Iterator[CheckMessage]:
    if config.STATIC and not settings.STATIC_ROOT:
        yield Error(
            'TORNJANGO["STATIC"] is True, and STATIC_ROOT is not set.',
            hint="Set STATIC_ROOT to a folder, and run manage.py collectstatic.",
            id="tornjango.E003",
        )


def _metrics(config: Config) -> Iterator[CheckMessage]:
    if not config.METRICS:
        return
    if importlib.util.find_spec("prometheus_client") is None:
        yield Error(
            'TORNJANGO["METRICS"] needs prometheus-client, which is not installed.',
            hint='pip install "tornjango[metrics]"',
            id="tornjango.E004",
        )
    if config.WORKERS > 1 and not os.environ.get(MULTIPROCESS_DIR):
        yield Warning(
            f'TORNJANGO["WORKERS"] is {config.WORKERS}: each scrape of the metrics tells of one worker, '
            "whichever is reached.",
            hint=f"Set {MULTIPROCESS_DIR} to a folder that is empty when the server starts.",
            id="tornjango.W002",
        )


def _engines(config: Config) -> Iterator[CheckMessage]:
    for alias in config.ENGINES:
        try:
            if alias not in connections:
                raise ConfigurationError(
                    f'TORNJANGO["ENGINES"] has {alias!r}, which DATABASES has not.'
                )
            pools.choice(alias, config)
        except ImproperlyConfigured as exc:
            yield Error(
                str(exc),
                hint="Leave it out, and the engine is the one that fits.",
                id="tornjango.E005",
            )


def _loop_middleware(config: Config) -> Iterator[CheckMessage]:
    unknown = [path for path in config.LOOP_MIDDLEWARE if path not in settings.MIDDLEWARE]
    if unknown:
        yield Error(
            f'TORNJANGO["LOOP_MIDDLEWARE"] names what is not in MIDDLEWARE: {", ".join(unknown)}.',
            hint="Write it as it stands in MIDDLEWARE.",
            id="tornjango.E006",
        )


def _debug(config: Config) -> Iterator[CheckMessage]:
    if config.WORKERS and settings.DEBUG:
        yield Warning(
            'TORNJANGO["WORKERS"] is for production, and DEBUG is on: errors show settings and code to anyone.',
            hint="Set DEBUG to False; in development serve without workers, with autoreload.",
            id="tornjango.W003",
        )


_CHECKS: tuple[Callable[[Config], Iterator[CheckMessage]], ...] = (
    _comet,
    _static,
    _metrics,
    _engines,
    _loop_middleware,
    _debug,
)


@register
def check_app_order(**kwargs: Any) -> list[CheckMessage]:
    """Django takes a command from the app that comes first."""
    labels = [config.name for config in apps.get_app_configs()]
    if "tornjango" not in labels:  # `tornjango serve` needs no app
        return []
    for other in ("django.contrib.staticfiles", "daphne"):
        if other in labels and labels.index(other) < labels.index("tornjango"):
            return [
                Warning(
                    f"{other!r} stands before 'tornjango' in INSTALLED_APPS, so manage.py runserver is its.",
                    hint=f"Move 'tornjango' before {other!r}.",
                    id="tornjango.W001",
                )
            ]
    return []
