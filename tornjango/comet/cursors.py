"""Cursors as clients hold them: opaque, signed, and of bounded length.

A cursor is, for each channel, a digest of its name, an epoch and an offset, in base64url with Django's signature behind it.
The digest keeps it short whatever the names; it grants nothing, for every poll names its channels and is authorised for them.
"""

from __future__ import annotations

import binascii
import hashlib
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Mapping
from functools import lru_cache

from django.conf import settings
from django.core.signing import BadSignature, Signer

from tornjango.comet.log import EPOCH_BYTES, Position
from tornjango.conf import get_config
from tornjango.exceptions import InvalidCursor

Keys = tuple[str | bytes, ...]

DIGEST_BYTES = 8
_ENTRY = struct.Struct(f">{DIGEST_BYTES}s{EPOCH_BYTES}sQ")
_SEPARATOR = "."
_SIGNATURE_LENGTH = 43

# The number is the format's: a changed format gets a new one, so that old cursors are refused, not misread.
_SALT = "tornjango.comet.cursor.1"

_REMEMBERED = 1024

_TRY_AGAIN = "Poll without a cursor to get a new one, and fetch the page's state afresh."


def encode(positions: Mapping[str, Position]) -> str:
    """The cursor that stands at these positions, by channel name."""
    entries = b"".join(_ENTRY.pack(digest(name), *where) for name, where in positions.items())
    return _signed(urlsafe_b64encode(entries).rstrip(b"=").decode(), keys())


def decode(cursor: str, names: Iterable[str]) -> dict[str, Position]:
    """The positions that a cursor gives for these channels; one it does not know is left out.

    Raises InvalidCursor for what ``encode`` did not make under this project's SECRET_KEY (or its fallbacks).
    """
    if len(cursor) > _longest():
        raise InvalidCursor(f"The cursor is too long. {_TRY_AGAIN}")
    entries = _entries(cursor, keys())
    digests = {name: digest(name) for name in names}
    return {name: entries[digest] for name, digest in digests.items() if digest in entries}


# The readers of a channel come with one and the same cursor, and leave with one: signing it once makes a crowd cheap.


@lru_cache(maxsize=_REMEMBERED)
def _signed(payload: str, keys: Keys) -> str:
    return _signer(keys).sign(payload)


@lru_cache(maxsize=_REMEMBERED)
def _entries(cursor: str, keys: Keys) -> Mapping[bytes, Position]:
    try:
        payload = _signer(keys).unsign(cursor)
        data = urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
        entries: Iterable[tuple[bytes, bytes, int]] = _ENTRY.iter_unpack(data)
        return {digest: Position(epoch, offset) for digest, epoch, offset in entries}
    except (BadSignature, binascii.Error, struct.error, UnicodeError) as error:
        raise InvalidCursor(f"The cursor is not one of this site. {_TRY_AGAIN}") from error


def _longest() -> int:
    entries = get_config().COMET.CHANNELS_PER_CLIENT * _ENTRY.size
    return -(-entries * 4 // 3) + len(_SEPARATOR) + _SIGNATURE_LENGTH


def keys() -> Keys:
    return (settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS)


@lru_cache(maxsize=1)
def _signer(keys: Keys) -> Signer:
    key, *fallback_keys = keys
    return Signer(key=key, fallback_keys=fallback_keys, salt=_SALT, sep=_SEPARATOR)


@lru_cache(maxsize=_REMEMBERED)
def digest(name: str) -> bytes:
    data = name.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
