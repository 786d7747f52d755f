"""Parts of a representation that a client asks for, by RFC 9110, 14: pure functions of headers and sizes."""

from __future__ import annotations

import re
from typing import NamedTuple

# RFC 9110, 14.1.1: one range of bytes, its unit in any case.
_ONE_RANGE = re.compile(r"bytes=[ \t,]*([0-9]*)-([0-9]*)[ \t,]*", re.IGNORECASE | re.ASCII)
#: Digits of a position; no file has more bytes, and Python reads no number of thousands of them.
_DIGITS = 20


class Part(NamedTuple):
    """``length`` bytes from ``start`` on; never more than there are, never none."""

    start: int
    length: int

    def content_range(self, size: int) -> str:
        """The ``Content-Range`` of a 206 with this part of ``size`` bytes (14.4)."""
        return f"bytes {self.start}-{self.start + self.length - 1}/{size}"


class Unsatisfiable(ValueError):
    """Nothing of what was asked for is there: the answer is 416, with ``content_range``."""

    def __init__(self, size: int) -> None:
        super().__init__(f"no byte of the range is among the {size}")
        #: The ``Content-Range`` of the 416 (15.5.17).
        self.content_range = f"bytes */{size}"


def wanted(
    asked: str | None,
    size: int,
    *,
    if_range: str | None = None,
    etag: str | None = None,
    last_modified: str | None = None,
) -> Part | None:
    """The part of ``size`` bytes that the header ``Range`` of a GET asks for; None for the whole, with 200.

    ``asked`` and ``if_range`` are the request's headers, ``etag`` and ``last_modified`` those of the answer. The whole is
    also the answer to what the RFC lets a server ignore: other units, what is malformed, and more than one range. Raises
    ``Unsatisfiable``. Preconditions (304, 412) come before, and only GET has ranges (13.2.2, 14.2).
    """
    if not asked or not _is_current(if_range, etag, last_modified):
        return None
    found = _ONE_RANGE.fullmatch(asked.strip())
    if found is None:
        return None
    first, last = found.groups()
    if len(first) > _DIGITS or len(last) > _DIGITS or not (first or last):
        return None
    return _from(int(first), last, size) if first else _suffix(int(last), size)


def _from(start: int, last: str, size: int) -> Part | None:
    stop = min(int(last) + 1, size) if last else size
    if last and int(last) < start:
        return None  # malformed (14.1.1), not out of bounds
    if start >= size:
        raise Unsatisfiable(size)
    return Part(start, stop - start)


def _suffix(length: int, size: int) -> Part:
    if not length or not size:
        raise Unsatisfiable(size)
    length = min(length, size)
    return Part(size - length, length)


def _is_current(if_range: str | None, etag: str | None, last_modified: str | None) -> bool:
    """Whether the part is of what the client has the rest of: by a strong ETag, or by the very same date (13.1.5)."""
    if if_range is None:
        return True
    if if_range.startswith(('"', "W/")):
        return if_range == etag and not if_range.startswith("W/")
    return bool(if_range) and if_range == last_modified
