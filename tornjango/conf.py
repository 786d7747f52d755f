"""``settings.TORNJANGO``, read once into a frozen :class:`Config`.

Every default stands in a dataclass field, and nowhere else; the README's table is made from them by a test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from django.conf import settings
from django.core.signals import setting_changed

from tornjango.exceptions import ConfigurationError

ENGINES = ("momoko", "psycopg", "threads")


SYNC_VIEWS = ("threads", "green")


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _engines(value: object) -> bool:
    return isinstance(value, Mapping) and all(engine in ENGINES for engine in value.values())


def _option(
    default: Any, valid: Callable[[object], bool], expects: str, help: str, unit: str = ""
) -> Any:
    """One key: its default, what it takes, and the line that the README's table shows for it."""
    metadata = {"valid": valid, "expects": expects, "help": help, "unit": unit}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _seconds(default: float, help: str) -> Any:
    return _option(default, _positive, "a positive number of seconds", help, "s")


def _number(default: int, help: str) -> Any:
    return _option(default, _count, "a positive whole number", help)


def _bytes(default: int, help: str) -> Any:
    return _option(default, _count, "a positive whole number of bytes", help, "bytes")


@dataclasses.dataclass(frozen=True)
class CometConfig:
    """``TORNJANGO["COMET"]``: the bounds of channels and polls."""

    HISTORY: int = _number(200, "messages a channel keeps, unless it says otherwise")
    TTL: float = _seconds(600, "how long a channel keeps a message")
    MAX_BYTES: int = _bytes(1024 * 1024, "size of a channel's messages together")
    MAX_MESSAGE: int = _bytes(64 * 1024, "size of one message, as JSON")
    MAX_CHANNELS: int = _number(100_000, "channels with a log at one time")
    CHANNELS_PER_POLL: int = _number(32, "channels one poll may ask for")
    MESSAGES_PER_POLL: int = _number(
        100, "messages in one answer; the rest comes with the next poll"
    )
    POLL_TIMEOUT: float = _seconds(25, "after which a poll with no news is answered empty")


@dataclasses.dataclass(frozen=True)
class Config:
    """``settings.TORNJANGO``; a key that is not there has its default."""

    ENGINES: Mapping[str, str] = _option(
        {},
        _engines,
        f"a dict from database alias to one of {', '.join(ENGINES)}",
        "engine per database, where the default does not suit",
    )
    POOL_SIZE: int = _number(10, "connections an engine opens to one database")
    POOL_QUEUE: int = _number(
        1000, "queries that may wait for a connection; one more is answered 503"
    )
    POOL_TIMEOUT: float = _seconds(
        10, "how long a query waits for a connection before it is answered 503"
    )
    THREADS: int = _number(16, "worker threads for sync views and other sync code")
    THREADS_QUEUE: int = _number(
        1000, "calls that may wait for a worker thread; one more is answered 503"
    )
    SYNC_VIEWS: str = _option(
        "threads",
        lambda value: value in SYNC_VIEWS,
        f"one of {', '.join(SYNC_VIEWS)}",
        'where sync views run; "green" is on the event loop: see @green for what that asks of them',
    )
    RESPONSE_TIMEOUT: float = _seconds(
        60, "how long a deferred response may stay unfinished before it is answered 504"
    )
    GRACEFUL_TIMEOUT: float = _seconds(
        10, "how long requests in flight may take to finish when the server stops"
    )
    HEADER_TIMEOUT: float = _seconds(
        75, "how long a connection may take to send a request's headers, idle time included"
    )
    BODY_TIMEOUT: float = _seconds(300, "how long a request's body may take to arrive")
    MAX_HEADER_SIZE: int = _bytes(
        64 * 1024, "size of a request's line and headers; more is answered 431"
    )
    MAX_BODY_SIZE: int = _bytes(
        1024 * 1024 * 1024, "size of a request's body; more is answered 413"
    )
    COMET: CometConfig = dataclasses.field(default_factory=CometConfig)

    @classmethod
    def from_dict(cls, values: object) -> Config:
        """Raises ConfigurationError, naming the key, for an unknown key or a value it does not take."""
        options = _checked(cls, values, "TORNJANGO")
        options["COMET"] = CometConfig(
            **_checked(CometConfig, options.get("COMET", {}), 'TORNJANGO["COMET"]')
        )
        return cls(**options)


def _checked(cls: type[Any], values: object, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigurationError(f"{where} must be a dict, not {type(values).__name__}.")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            raise ConfigurationError(f"{where} has no key {key!r}. It takes: {', '.join(fields)}.")
        valid = fields[key].metadata.get("valid")
        if valid and not valid(value):
            raise ConfigurationError(
                f"{where}[{key!r}] must be {fields[key].metadata['expects']}, not {value!r}."
            )
    return dict(values)


@cache
def get_config() -> Config:
    """The project's configuration, read from the settings at the first call."""
    return Config.from_dict(getattr(settings, "TORNJANGO", {}))


def _forget(*, setting: str, **kwargs: object) -> None:
    """Lets ``override_settings(TORNJANGO=...)`` take effect in tests."""
    if setting == "TORNJANGO":
        get_config.cache_clear()


setting_changed.connect(_forget, dispatch_uid="tornjango.conf")
