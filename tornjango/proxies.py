"""Proxies before the server: whose word is taken on who the client is, and by what name and scheme it came.

One rule: what a header says counts if the one who wrote it is trusted. Proxies add to the end of a list, so it is read from
there, and no further than trust reaches. What cannot be read says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple, Protocol

#: In ``TRUSTED_PROXIES``, whoever connects to a Unix socket.
UNIX = "unix"

Network = IPv4Network | IPv6Network

#: What proxies call them, and what they are to Django; "ws" and "wss" are said of WebSockets.
_SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}

# RFC 7239, 4: pairs of a token and a token or a quoted string, with ";" between them.
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PAIR = re.compile(
    rf'[ \t]*(?:({_TOKEN})=(?:({_TOKEN})|"((?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[\t -~])*)")[ \t]*)?(?:;|\Z)'
)
# RFC 7239, 6, and what X-Forwarded-For has in practice: IPv6 with brackets or without.
_NODE = re.compile(
    r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+))(?::(?:[0-9]{1,5}|_[0-9A-Za-z._-]+))?|([0-9A-Fa-f:.]+)"
)


class Headers(Protocol):
    """What is read of Tornado's ``HTTPHeaders``."""

    def get_list(self, name: str, /) -> list[str]: ...


class Origin(NamedTuple):
    """What trusted proxies say of a request; None where they say nothing."""

    client: str | None = None
    scheme: str | None = None
    host: str | None = None
    port: str | None = None


class Proxies:
    """The proxies that are trusted: addresses, networks, and "unix" for whoever connects to a Unix socket."""

    def __init__(self, trusted: Sequence[str], headers: str = "x-forwarded") -> None:
        """``headers`` is "x-forwarded" or "forwarded". Raises ``ValueError`` as `networks`."""
        self._unix = UNIX in trusted
        self._networks = networks(trusted)
        self._read = _from_forwarded if headers == "forwarded" else _from_x_forwarded
        #: Whether this is the address of a proxy.
        self.trusts = lru_cache(1024)(self._trusts)

    def origin(self, peer: str, headers: Headers, *, unix: bool = False) -> Origin | None:
        """What is said of a request that ``peer`` has sent; None if ``peer`` is not trusted."""
        if not (self._unix if unix else self.trusts(peer)):
            return None
        return self._read(self, headers)

    def _trusts(self, address: str) -> bool:
        known = _address(address)
        return known is not None and any(known in network for network in self._networks)


def networks(trusted: Sequence[str]) -> list[Network]:
    """Raises ``ValueError`` for what is neither an address, nor a network without host bits, nor "unix"."""
    return [ip_network(item) for item in trusted if item != UNIX]


def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    # A socket for both families shows IPv4 as ::ffff:a.b.c.d.
    return getattr(address, "ipv4_mapped", None) or address


def _client(node: str) -> str | None:
    """A node's address without its port; None for what hides it (RFC 7239, 6.3), or is none."""
    found = _NODE.fullmatch(node)
    address = _address(found[found.lastindex or 0]) if found else None
    return None if address is None else str(address)


def _from_the_end(lines: list[str]) -> Iterator[str]:
    return (item for text in reversed(",".join(lines).split(",")) if (item := text.strip(" \t")))


# X-Forwarded-*


def _from_x_forwarded(proxies: Proxies, headers: Headers) -> Origin:
    scheme = _last(headers, "X-Forwarded-Proto")
    return Origin(
        client=_nearest_stranger(proxies, headers.get_list("X-Forwarded-For")),
        scheme=_SCHEMES.get((scheme or "").lower()),
        host=_last(headers, "X-Forwarded-Host"),
        port=_port(_last(headers, "X-Forwarded-Port")),
    )


def _nearest_stranger(proxies: Proxies, lines: list[str]) -> str | None:
    """The last address that is not a proxy's; the first one if all are."""
    client = None
    for node in _from_the_end(lines):
        client = _client(node)
        if client is None or not proxies.trusts(client):
            break
    return client


def _last(headers: Headers, name: str) -> str | None:
    """Of several values the last: what the nearest proxy says. Others need not add to these lists as they should."""
    return next(_from_the_end(headers.get_list(name)), None)


def _port(text: str | None) -> str | None:
    valid = text and len(text) < 6 and text.isascii() and text.isdecimal() and int(text) < 65536
    return text if valid else None


# Forwarded (RFC 7239)


def _from_forwarded(proxies: Proxies, headers: Headers) -> Origin:
    """What the outermost of the trusted proxies wrote, of the client that it saw."""
    origin = Origin()
    # No address and no host has a comma, so none is looked for in quotes: a client that leaves one open hides nothing.
    for text in _from_the_end(headers.get_list("Forwarded")):
        element = _element(text)
        if element is None:
            return Origin()
        client = _client(element.get("for", ""))
        scheme = _SCHEMES.get(element.get("proto", "").lower())
        origin = Origin(client, scheme, element.get("host"))
        if client is None or not proxies.trusts(client):
            break
    return origin


def _element(text: str) -> dict[str, str] | None:
    """The parameters of one element; None if it is malformed."""
    parameters: dict[str, str] = {}
    position = 0
    while position < len(text):
        found = _PAIR.match(text, position)
        if found is None or (name := (found[1] or "").lower()) in parameters:
            return None
        if name:
            parameters[name] = found[2] or re.sub(r"\\(.)", r"\1", found[3])
        position = found.end()
    return parameters
