"""What an authoriser has said, as clients keep it: signed, for one client, and not for long.

A grant is not needed: without one, or with one that does not count, the authoriser is asked again. It counts until it
expires, by the clock of whoever looks, and until its channel is revoked: it says where the logs stood when it was given.
It is bound to what the client shows of itself, the session's cookie and ``Authorization``: another's is of no use.
"""

from __future__ import annotations

import binascii
import hashlib
import struct
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from django.conf import settings
from django.core.signing import BadSignature, Signer
from django.http import HttpRequest

from tornjango.comet import cursors
from tornjango.comet.log import EPOCH_BYTES, Position
from tornjango.conf import get_config

_SALT = "tornjango.comet.grant.1"
_SEPARATOR = "."
_SIGNATURE_LENGTH = 43
_BINDING_BYTES = 12
_HEAD = struct.Struct(f">{_BINDING_BYTES}s{EPOCH_BYTES}sQQ")

# A grant from a host whose clock is ahead is no forgery.
_SKEW = 60

_REMEMBERED = 4096

# Of its time a grant may lose so much.
_STEP = 1 / 16


class Grant(NamedTuple):
    """A yes to these channels, by digest, given when the logs stood at ``position``; until ``expires``, in seconds since 1970."""

    position: Position
    expires: int
    channels: frozenset[bytes]

    def covers(self, name: str) -> bool:
        return cursors.digest(name) in self.channels and time.time() < self.expires


NOTHING = Grant(Position(b"", 0), 0, frozenset())


def expiry() -> int:
    """When a yes that is said now ends to count: in ``TORNJANGO["COMET"]["GRANT_TTL"]`` seconds, or a little before."""
    ttl = get_config().COMET.GRANT_TTL
    # In steps: a crowd that shows nothing of itself has one grant, and one signature.
    step = max(1, int(ttl * _STEP))
    return int(time.time() + ttl) // step * step


def issue(request: HttpRequest, position: Position, expires: int, names: Iterable[str]) -> str:
    """A grant for these channels, whose authorisers have said yes."""
    head = _HEAD.pack(binding(request), *position, expires)
    payload = head + b"".join(sorted(cursors.digest(name) for name in names))
    return _signed(payload, cursors.keys())


@lru_cache(maxsize=_REMEMBERED)
def _signed(payload: bytes, keys: cursors.Keys) -> str:
    return _signer(keys).sign(urlsafe_b64encode(payload).rstrip(b"=").decode())


def read(request: HttpRequest, token: str | None) -> Grant:
    """What a client's grant still gives it: `NOTHING` for another's, an old or a forged one."""
    if not token or len(token) > _longest():
        return NOTHING
    bound, grant = _read(token, cursors.keys())
    latest = time.time() + get_config().COMET.GRANT_TTL + _SKEW
    return grant if bound == binding(request) and grant.expires <= latest else NOTHING


@lru_cache(maxsize=_REMEMBERED)
def _read(token: str, keys: cursors.Keys) -> tuple[bytes, Grant]:
    try:
        payload = _signer(keys).unsign(token)
        data = urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
        bound, epoch, offset, expires = _HEAD.unpack_from(data)
        digests = struct.iter_unpack(f"{cursors.DIGEST_BYTES}s", data[_HEAD.size :])
        return bound, Grant(Position(epoch, offset), expires, frozenset(it for (it,) in digests))
    except (BadSignature, binascii.Error, struct.error, UnicodeError):
        return b"", NOTHING


def binding(request: HttpRequest) -> bytes:
    """A digest of what the client shows of itself."""
    shown = (
        request.COOKIES.get(settings.SESSION_COOKIE_NAME, ""),
        request.META.get("HTTP_AUTHORIZATION", ""),
        request.META.get("REMOTE_USER", ""),
    )
    data = "\0".join(shown).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=_BINDING_BYTES).digest()


def _longest() -> int:
    size = _HEAD.size + get_config().COMET.CHANNELS_PER_CLIENT * cursors.DIGEST_BYTES
    return -(-size * 4 // 3) + len(_SEPARATOR) + _SIGNATURE_LENGTH


@lru_cache(maxsize=1)
def _signer(keys: cursors.Keys) -> Signer:
    key, *fallback_keys = keys
    return Signer(key=key, fallback_keys=fallback_keys, salt=_SALT, sep=_SEPARATOR)
