from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Iterable, Mapping
from typing import Any

from django.apps import apps
from django.db.backends.postgresql.psycopg_any import IsolationLevel
from django.db.backends.signals import connection_created

from tornjango.db.engines import base
from tornjango.exceptions import ConfigurationError

logger = logging.getLogger("tornjango.db")

EXTENSION_TYPES = "SELECT typname, oid, typarray FROM pg_type WHERE typname IN ('hstore', 'citext')"


class Session:
    """What Django makes of a new connection, for connections that it does not open itself."""

    def __init__(self, wrapper: Any) -> None:
        options = wrapper.settings_dict["OPTIONS"]
        self.wrapper = wrapper
        self.role = options.get("assume_role")
        self.connect_timeout = float(options.get("connect_timeout") or base.CONNECT_TIMEOUT)
        _check_isolation_level(wrapper.alias, options.get("isolation_level"))
        _warn_of_receivers(wrapper)

    def check_server(self, version: int) -> None:
        """Raises Django's NotSupportedError for a server that is too old for it."""
        self.wrapper.pg_version = version
        self.wrapper.check_database_version_supported()

    def statements(self, timezone: str | None) -> Iterable[tuple[str, list[Any]]]:
        """To be run before anything else; ``timezone`` is what the connection has already."""
        wanted = self.wrapper.timezone_name
        if wanted and timezone != wanted:
            yield self.wrapper.ops.set_time_zone_sql(), [wanted]
        if self.role:
            yield "SET ROLE %s", [self.role]

    @property
    def wants_extension_types(self) -> bool:
        """Whether the types in the rows of EXTENSION_TYPES are to be registered, as django.contrib.postgres does."""
        return apps.is_installed("django.contrib.postgres")


def _check_isolation_level(alias: str, level: Any) -> None:
    """It is for transactions: Django's connection leaves a statement in autocommit to the server's own level."""
    if level is None:
        return
    try:
        IsolationLevel(level)
    except ValueError:
        raise ConfigurationError(
            f"OPTIONS['isolation_level'] of database {alias!r} is {level!r}, "
            "which is none of django.db.backends.postgresql.psycopg_any.IsolationLevel."
        ) from None


def _warn_of_receivers(wrapper: Any) -> None:
    """Receivers query a connection the way that blocks."""
    receivers, async_receivers = connection_created._live_receivers(type(wrapper))
    for receiver in [*receivers, *async_receivers]:
        if getattr(receiver, "__module__", "") != "django.contrib.postgres.signals":
            logger.warning(
                "%r is not called for the connections of tornjango's pool of database %r. "
                "What it sets on a connection can be set by OPTIONS, or ALTER ROLE ... SET.",
                receiver,
                wrapper.alias,
            )


def with_addresses(params: Mapping[str, Any]) -> dict[str, Any]:
    """``params`` with the addresses of their hosts: libpq would look them up while it holds up the loop. Blocks."""
    hosts = str(params.get("host") or os.environ.get("PGHOST", "")).split(",")
    ports = str(params.get("port") or os.environ.get("PGPORT", "")).split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    known = params.get("hostaddr") or os.environ.get("PGHOSTADDR") or params.get("service")
    if known or len(ports) != len(hosts) or all(map(_is_socket, hosts)):
        return dict(params)
    tries = [
        (host, address, port)
        for host, port in zip(hosts, ports, strict=True)
        for address in _addresses(host)
    ]
    lists = [",".join(values) for values in zip(*tries, strict=True)]
    return {**params, **dict(zip(("host", "hostaddr", "port"), lists, strict=True))}


def _is_socket(host: str) -> bool:
    return not host or host[0] in "/@"


def _addresses(host: str) -> list[str]:
    if _is_socket(host):
        return [""]
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))
