"""``settings.TORNJANGO``, read once into a frozen :class:`Config`.

Every default stands in a dataclass field, and nowhere else; the README's table is made from them by a test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from ipaddress import ip_network
from typing import Any

from django.conf import settings
from django.core.signals import setting_changed

from tornjango.exceptions import ConfigurationError

ENGINES = ("momoko", "psycopg", "threads")

SYNC_VIEWS = ("threads", "green")

ACCESS_LOGS = ("auto", "runserver", "common", "json", "off")

PROXY_HEADERS = ("x-forwarded", "forwarded")

BROKERS = ("auto", "memory", "postgres", "redis")


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _count_or_zero(value: object) -> bool:
    return value == 0 or _count(value)


def _text(value: object) -> bool:
    return isinstance(value, str)


def _path(value: object) -> bool:
    return isinstance(value, str) and (not value or value.startswith("/"))


def _texts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _proxies(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(
        item == "unix" or _network(item) for item in value
    )


def _network(value: object) -> bool:
    """Text only: of a number, Python makes an address."""
    try:
        return isinstance(value, str) and bool(ip_network(value))
    except ValueError:
        return False


def _engines(value: object) -> bool:
    return isinstance(value, Mapping) and all(engine in ENGINES for engine in value.values())


def _option(
    default: Any,
    valid: Callable[[object], bool],
    expects: str,
    help: str,
    unit: str = "",
    flag: str = "",
) -> Any:
    """One key: its default, what it takes, the line that the README's table shows for it, and the option of ``serve``
    that sets it, if there is one."""
    metadata = {"valid": valid, "expects": expects, "help": help, "unit": unit, "flag": flag}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _seconds(default: float, help: str, flag: str = "") -> Any:
    return _option(default, _positive, "a positive number of seconds", help, "s", flag)


def _number(default: int, help: str, flag: str = "") -> Any:
    return _option(default, _count, "a positive whole number", help, flag=flag)


def _number_or_none(default: int, help: str, flag: str = "") -> Any:
    return _option(default, _count_or_zero, "a whole number, or 0", help, flag=flag)


def _bytes(default: int, help: str, flag: str = "") -> Any:
    return _option(default, _count, "a positive whole number of bytes", help, "bytes", flag)


def _string(help: str, flag: str = "") -> Any:
    return _option("", _text, "a string", help, flag=flag)


def _url_path(help: str, flag: str = "") -> Any:
    return _option(
        "", _path, "a path that begins with a slash, or an empty string", help, flag=flag
    )


def _one_of(values: tuple[str, ...], default: str, help: str, flag: str = "") -> Any:
    expects = f"one of {', '.join(values)}"
    return _option(default, lambda value: value in values, expects, help, flag=flag)


def _strings(help: str, flag: str = "") -> Any:
    return _option((), _texts, "a list of strings", help, flag=flag)


def _switch(default: bool, help: str, flag: str = "") -> Any:
    return _option(default, lambda value: isinstance(value, bool), "True or False", help, flag=flag)


@dataclasses.dataclass(frozen=True)
class CometConfig:
    """``TORNJANGO["COMET"]``: the bounds of channels and polls."""

    BROKER: str = _one_of(
        BROKERS,
        "auto",
        'what carries messages between processes; "auto" is memory for one process, and PostgreSQL where WORKERS are several',
    )
    DATABASE: str = _option(
        "default", _text, "an alias of DATABASES", "the database of the PostgreSQL broker"
    )
    REDIS: str = _option(
        "redis://127.0.0.1:6379/0",
        _text,
        "a URL that redis-py takes",
        "the server of the Redis broker",
    )
    PREFIX: str = _option(
        "tornjango",
        _text,
        "a string",
        "what the Redis broker's keys begin with; another one for each project on one server",
    )
    HISTORY: int = _number(200, "messages a channel keeps, unless it says otherwise")
    TTL: float = _seconds(600, "how long a channel keeps a message")
    MAX_BYTES: int = _bytes(1024 * 1024, "size of a channel's messages together")
    MAX_MESSAGE: int = _bytes(64 * 1024, "size of one message, as JSON")
    MAX_CHANNELS: int = _number(100_000, "channels with a log in a process's memory at one time")
    MAX_MEMORY: int = _bytes(
        256 * 1024 * 1024,
        "size of all messages in a process's memory; beyond that the channel longest untouched goes",
    )
    CHANNELS_PER_CLIENT: int = _number(32, "channels that one reader may follow at once")
    MESSAGES_PER_ANSWER: int = _number(
        100, "messages in one answer; the rest comes with the next one"
    )
    BYTES_PER_ANSWER: int = _bytes(
        512 * 1024, "size of one answer's messages, but for a single larger one"
    )
    BYTES_WAITING: int = _bytes(
        1024 * 1024,
        "what may wait for a slow client of a stream before it is closed, to come back with its cursor",
    )
    POLL_TIMEOUT: float = _seconds(25, "after which a poll with no news is answered empty")
    HEARTBEAT: float = _seconds(
        20, "how often a stream without news says that it lives, and where its reader stands"
    )
    GRANT_TTL: float = _seconds(
        300, "how long an authoriser's yes counts; comet.revoke() ends it at once"
    )
    LINGER: float = _seconds(
        10,
        "how long a client that is gone still counts as present: its next poll may be on its way",
    )
    PUBLISH_TIMEOUT: float = _seconds(
        10, "how long a message waits for a broker that is away, before publishing it fails"
    )
    PUBLISH_QUEUE: int = _number(10_000, "messages of a process that may wait for the broker")
    PUBLISHES_PER_SECOND: float = _option(
        5,
        _positive,
        "a positive number",
        "messages a client may publish, where a channel lets clients publish",
    )


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
    SYNC_VIEWS: str = _one_of(
        SYNC_VIEWS,
        "threads",
        'where sync views run; "green" is on the event loop: see @green for what that asks of them',
    )
    LOOP_MIDDLEWARE: Sequence[str] = _strings(
        "sync-only middleware of others, by its path in MIDDLEWARE, that runs on the event loop; "
        "what @green asks of views, this asks of it"
    )
    CANCEL_ON_DISCONNECT: bool = _switch(
        True, "whether a view that runs on the loop is cancelled when its client leaves"
    )
    RESPONSE_TIMEOUT: float = _seconds(
        60, "how long a deferred response may stay unfinished before it is answered 504"
    )
    GRACEFUL_TIMEOUT: float = _seconds(
        10,
        "how long requests in flight may take to finish when the server stops",
        "--graceful-timeout",
    )
    WORKERS: int = _number_or_none(
        0,
        "worker processes that serve keeps running; with 0 it serves in its own process",
        "--workers",
    )
    MAX_REQUESTS: int = _number_or_none(
        0,
        "requests (and up to a tenth more, at random) after which a worker process is replaced; 0 is never",
        "--max-requests",
    )
    UNIX: str = _string("path of a Unix socket to serve on, in place of an address", "--unix")
    CERTFILE: str = _string(
        "file with the TLS certificate, and those that it depends on", "--certfile"
    )
    KEYFILE: str = _string("file with the certificate's key, where CERTFILE has none", "--keyfile")
    TRUSTED_PROXIES: Sequence[str] = _option(
        (),
        _proxies,
        'a list of addresses ("127.0.0.1"), networks ("10.0.0.0/8") and "unix"',
        'addresses and networks whose word on client, scheme and host is taken; "unix" is whoever '
        "connects to a Unix socket",
        flag="--proxy",
    )
    PROXY_HEADERS: str = _one_of(
        PROXY_HEADERS,
        "x-forwarded",
        "the headers that those proxies set: X-Forwarded-For, -Proto, -Host and -Port, or Forwarded",
    )
    ACCESS_LOG: str = _one_of(
        ACCESS_LOGS,
        "auto",
        'a line for each request; "auto" is runserver\'s where DEBUG is on, and none elsewhere',
        "--access-log",
    )
    HEALTH: str = _url_path(
        'path that answers whether the server is well, "/-/health" say', "--health"
    )
    METRICS: str = _url_path(
        'path of metrics for Prometheus, "/-/metrics" say; needs prometheus-client', "--metrics"
    )
    WATCHDOG: float | None = _option(
        None,
        lambda value: value is None or value == 0 or _positive(value),
        "a number of seconds, 0, or None",
        "how long one thing may hold up the event loop before the log names it; 0 is for ever, None "
        "is 0.1 where DEBUG is on, and 0 elsewhere",
        "s",
        "--watchdog",
    )
    STATIC: bool = _switch(
        False, "whether the files of STATIC_ROOT are served where DEBUG is off", "--static"
    )
    STATIC_CACHE: int = _bytes(
        64 * 1024 * 1024, "size of the static files that a process keeps in memory, together"
    )
    MAX_CONNECTIONS: int = _number(
        50_000, "connections at one time; one more is answered 503", "--max-connections"
    )
    HEADER_TIMEOUT: float = _seconds(
        20, "how long a request's headers may take to arrive, from their first byte"
    )
    BODY_TIMEOUT: float = _seconds(300, "how long a request's body may take to arrive")
    IDLE_TIMEOUT: float = _seconds(75, "how long a connection may stay open without a request")
    SEND_TIMEOUT: float = _seconds(
        60, "how long a client may take none of an answer before its connection is closed"
    )
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


#: What the command line says; it goes before the settings.
_given: dict[str, Any] = {}


def configure(**given: Any) -> Config:
    """Lets these keys go before those of the settings, for this process.

    Raises ConfigurationError, as `Config.from_dict`, and then changes nothing.
    """
    values = getattr(settings, "TORNJANGO", {})
    Config.from_dict(values)
    Config.from_dict({**values, **given})
    _given.clear()
    _given.update(given)
    get_config.cache_clear()
    return get_config()


@cache
def get_config() -> Config:
    """The project's configuration, read from the settings at the first call."""
    values = getattr(settings, "TORNJANGO", {})
    return Config.from_dict({**values, **_given} if _given else values)


def _forget(*, setting: str, **kwargs: object) -> None:
    """Lets ``override_settings(TORNJANGO=...)`` take effect in tests."""
    if setting == "TORNJANGO":
        get_config.cache_clear()


setting_changed.connect(_forget, dispatch_uid="tornjango.conf")
