"""The files below a folder as they go out over HTTP: their variants, their headers, and what a request's headers ask.

All that does not depend on a request is made once, when a file is looked at. No Tornado, no Django request; only `look` and
`read` wait for the disk.
"""

from __future__ import annotations

import asyncio
import mimetypes
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import BinaryIO, NamedTuple, cast

from django.utils.http import http_date, parse_etags, parse_http_date_safe

from tornjango import ranges
from tornjango.ranges import Part, Unsatisfiable

Headers = tuple[tuple[str, str], ...]

#: What a file's compressed variant has after the file's name, and its name in Content-Encoding.
ENCODINGS = {".br": "br", ".zst": "zstd", ".gz": "gzip"}
#: RFC 9110, 8.4.1.3.
_ALIASES = {"x-gzip": "gzip"}

#: What Python's own table does not have in every release, and systems without /etc/mime.types lack.
_TYPES = {
    ".avif": "image/avif",
    ".map": "application/json",
    ".otf": "font/otf",
    ".ttf": "font/ttf",
    ".webp": "image/webp",
    ".woff": "font/woff",
    ".woff2": "font/woff2",
}
#: The types of what is compressed, by the name mimetypes has for the compression.
_COMPRESSED_TYPES = {
    "br": "application/x-brotli",
    "bzip2": "application/x-bzip",
    "compress": "application/x-compress",
    "gzip": "application/gzip",
    "xz": "application/x-xz",
}

FOREVER = "max-age=31536000, public, immutable"
#: For names that may get another content. Behind it every browser asks with the ETag.
BRIEFLY = "max-age=60, public"

# "main.3f2a9c1b.js", "2.0f3a9c1b2d4e.chunk.js": hexadecimal, between dots, at least eight digits. With digits alone it
# could be a date or a version, with letters alone a word.
_HASHED = re.compile(r"[^/]\.(?=[a-f]*[0-9])(?=[0-9]*[a-f])[0-9a-f]{8,64}(\.[A-Za-z0-9]+){1,2}\Z")

#: A file that takes more than this part of the memory for all is read from the disk each time: none drives all others out.
LARGEST_PART = 8


class Changed(Exception):
    """The file is no longer the one that was looked at."""


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """One form of a file's content: as it is, or compressed. Its ETag is its own."""

    path: str
    #: As in Content-Encoding; empty for the file as it is.
    encoding: str
    size: int
    #: Of its content, in nanoseconds.
    changed: int
    etag: str
    last_modified: str
    #: All of a 200 but Content-Length, Date and Server.
    headers: Headers
    #: What a 304 repeats of them (RFC 9110, 15.4.5).
    cache_headers: Headers

    def open(self) -> BinaryIO:
        """The content, without a buffer. Raises `Changed` where it is not what the headers say, and other ``OSError``."""
        try:
            file = open(self.path, "rb", buffering=0)  # noqa: SIM115  whoever asked closes it
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise Changed(f"{self.path} is no longer what it was.") from exc
        found = os.fstat(file.fileno())
        if (found.st_size, found.st_mtime_ns) != (self.size, self.changed):
            file.close()
            raise Changed(f"{self.path} is no longer what it was.")
        return cast(BinaryIO, file)

    def read(self) -> bytes:
        """The whole content; raises as `open` does."""
        with self.open() as file:
            content = b"".join(iter(partial(file.read, self.size), b""))
        if len(content) != self.size:
            raise Changed(f"{self.path} has changed while it was read.")
        return content


class Reply(NamedTuple):
    """How a request for a file is answered. ``part`` is what of the variant's content goes out; None for nothing."""

    status: int
    headers: Headers
    variant: Variant | None = None
    part: Part | None = None


_NOT_ALLOWED = Reply(405, (("Allow", "GET, HEAD"), ("Content-Length", "0")))
_FAILED = Reply(412, (("Content-Length", "0"),))


@dataclass(frozen=True, slots=True)
class File:
    """A file that is served, with its variants: the file as it is comes first."""

    name: str
    variants: tuple[Variant, ...]

    def reply(self, method: str, asked: Mapping[str, str]) -> Reply:
        """``asked`` are the request's headers. A HEAD gets the headers of a GET without a range (RFC 9110, 14.2)."""
        if method not in ("GET", "HEAD"):
            return _NOT_ALLOWED
        variant = self._variant(asked)
        status = precondition(asked, variant)
        if status == 304:
            return Reply(304, variant.cache_headers)
        if status == 412:
            return _FAILED
        if method == "GET" and (wanted := asked.get("Range")):
            return _ranged(variant, wanted, asked.get("If-Range"))
        return _whole(variant, method)

    def _variant(self, asked: Mapping[str, str]) -> Variant:
        if len(self.variants) == 1:
            return self.variants[0]
        return choose(self.variants, asked.get("Accept-Encoding", ""))


def _whole(variant: Variant, method: str) -> Reply:
    headers = (*variant.headers, ("Content-Length", str(variant.size)))
    if method == "HEAD":
        return Reply(200, headers)
    return Reply(200, headers, variant, Part(0, variant.size))


def _ranged(variant: Variant, wanted: str, if_range: str | None) -> Reply:
    try:
        part = ranges.wanted(
            wanted,
            variant.size,
            if_range=if_range,
            etag=variant.etag,
            last_modified=variant.last_modified,
        )
    except Unsatisfiable as exc:
        return Reply(416, (("Content-Range", exc.content_range), ("Content-Length", "0")))
    if part is None:
        return _whole(variant, "GET")
    content_range = ("Content-Range", part.content_range(variant.size))
    length = ("Content-Length", str(part.length))
    return Reply(206, (*variant.headers, content_range, length), variant, part)


def precondition(asked: Mapping[str, str], variant: Variant) -> int:
    """200, 304 or 412 for a GET or HEAD (RFC 9110, 13.2.2)."""
    if (tags := asked.get("If-Match")) is not None:
        if not _matches(tags, variant.etag, weakly=False):
            return 412
    elif (date := asked.get("If-Unmodified-Since")) is not None and _is_later(variant, date):
        return 412
    if (tags := asked.get("If-None-Match")) is not None:
        return 304 if _matches(tags, variant.etag, weakly=True) else 200
    if (date := asked.get("If-Modified-Since")) is not None and not _is_later(variant, date, True):
        return 304
    return 200


def _matches(tags: str, etag: str, *, weakly: bool) -> bool:
    if tags == etag:
        return True
    known = parse_etags(tags)
    return known == ["*"] or etag in known or (weakly and f"W/{etag}" in known)


def _is_later(variant: Variant, date: str, otherwise: bool = False) -> bool:
    """Whether the variant is of a time after ``date``; ``otherwise`` where that is no date."""
    if date == variant.last_modified:
        return False
    seconds = parse_http_date_safe(date)
    return otherwise if seconds is None else variant.changed // 10**9 > seconds


def choose(variants: tuple[Variant, ...], accept_encoding: str) -> Variant:
    """The variant that a client likes best (RFC 9110, 12.5.3), the smallest of several; never 406.

    A client that names no coding gets the file as it is.
    """
    # A header may be long, and what is kept of them is to be little.
    read = _weights if len(accept_encoding) <= 100 else _weights.__wrapped__
    weights = read(accept_encoding)
    best, rank = variants[0], _rank(variants[0], weights)
    for variant in variants[1:]:
        its = _rank(variant, weights)
        if its[0] > 0 and its > rank:
            best, rank = variant, its
    return best


def _rank(variant: Variant, weights: Mapping[str, float]) -> tuple[float, bool, bool, int]:
    coding = variant.encoding or "identity"
    named = coding in weights
    # What is not named is unwanted; but the file as it is, which is only the last choice.
    otherwise = weights.get("*", 0.0 if variant.encoding else 0.0001)
    weight = weights[coding] if named else otherwise
    # "*" alone says nothing for a coding: as it is, then.
    return weight, named, not named and not variant.encoding, -variant.size


@lru_cache(256)
def _weights(accept_encoding: str) -> Mapping[str, float]:
    weights = {}
    for member in accept_encoding.split(","):
        coding, *parameters = (part.strip().lower() for part in member.split(";"))
        if coding:
            weights[_ALIASES.get(coding, coding)] = _weight(parameters)
    return weights


def _weight(parameters: list[str]) -> float:
    """A weight that cannot be read is none."""
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            value = value.strip()
            return float(value) if re.fullmatch(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?", value) else 0.0
    return 1.0


class Folder:
    """All files below a folder, found once; what is not among them can be looked for again.

    Links are followed, as Django's storages do and ``collectstatic --link`` needs. What begins with a dot is not served,
    nor what is in such a folder (``.git``, ``.env``), save ``.well-known`` (RFC 8615).
    """

    def __init__(self, root: str, hashed: Callable[[], Iterable[str]] = tuple) -> None:
        """``hashed`` gives the names that never get another content. Raises ``OSError`` for a folder it cannot read."""
        self.root = root
        self._hashed_names = hashed
        self._hashed = frozenset(hashed())
        #: Compressed variants that are older than what they are variants of, and so not used.
        self.stale: list[str] = []
        self.files: dict[str, File] = {}
        names = dict.fromkeys(_walk(root, "", frozenset()))
        for name in names:
            self._add(name, names)

    def look_again(self, name: str) -> File | None:
        """What is on the disk now, in the table from now on; waits for the disk. Any thread may call it."""
        if not _may_be_served(name):
            return None
        if name not in self._hashed:
            self._hashed = frozenset(self._hashed_names())
        return self._add(name)

    def _add(self, name: str, known: Container[str] | None = None) -> File | None:
        """``known`` are all names that are there, which saves looking for others."""
        endings = [ending for ending in ENCODINGS if known is None or name + ending in known]
        variants = tuple(self._variants(name, endings))
        if not variants:
            self.files.pop(name, None)
            return None
        self.files[name] = File(name, variants)
        return self.files[name]

    def _variants(self, name: str, endings: list[str]) -> Iterator[Variant]:
        path = os.path.join(self.root, name)
        found = _stat(path)
        if found is None:
            return
        forever = name in self._hashed or _HASHED.search(name) is not None
        others = [(ending, _stat(path + ending)) for ending in endings]
        used = [
            (ending, other) for ending, other in others if other and other.st_size < found.st_size
        ]
        if not forever:
            used = [pair for pair in used if self._is_current(path, found, *pair)]
        common = _common_headers(name, forever, bool(used))
        yield _variant(path, "", found, common)
        for ending, other in used:
            yield _variant(path + ending, ENCODINGS[ending], other, common)

    def _is_current(
        self, path: str, found: os.stat_result, ending: str, other: os.stat_result
    ) -> bool:
        # Some tools keep the time of the original, but to the second.
        current = int(other.st_mtime) >= int(found.st_mtime)
        if not current:
            self.stale.append(path + ending)
        return current


def _walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    own = os.stat(folder)
    here = (own.st_dev, own.st_ino)
    if here in above:  # a link to a folder that it is in
        return
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = prefix + entry.name
            if not _may_be_served(name):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, f"{name}/", above | {here})
            else:
                yield name


def _may_be_served(name: str) -> bool:
    parts = name.split("/")
    return "\0" not in name and all(
        part and (part[0] != "." or (part == ".well-known" and index == 0))
        for index, part in enumerate(parts)
    )


def _stat(path: str) -> os.stat_result | None:
    """None for what is not a file."""
    try:
        found = os.stat(path)
    except OSError:  # gone, a link to nowhere, a name too long: not there
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _common_headers(name: str, forever: bool, varies: bool) -> Headers:
    content_type, content_encoding = content_type_of(name)
    headers = [
        ("Content-Type", content_type),
        ("Cache-Control", FOREVER if forever else BRIEFLY),
        # Fonts and modules are asked for by other origins, a CDN's say; what is here is public.
        ("Access-Control-Allow-Origin", "*"),
        ("Accept-Ranges", "bytes"),
    ]
    if content_encoding:
        headers.append(("Content-Encoding", content_encoding))
    if varies:
        headers.append(("Vary", "Accept-Encoding"))
    return tuple(headers)


def _variant(path: str, encoding: str, found: os.stat_result, common: Headers) -> Variant:
    suffix = f"-{encoding}" if encoding else ""
    etag = f'"{found.st_mtime_ns:x}-{found.st_size:x}{suffix}"'
    last_modified = http_date(found.st_mtime_ns // 10**9)
    headers = (*common, ("ETag", etag), ("Last-Modified", last_modified))
    if encoding:
        headers = (*headers, ("Content-Encoding", encoding))
    repeated = ("Cache-Control", "Access-Control-Allow-Origin", "Vary", "ETag", "Last-Modified")
    cache_headers = tuple(header for header in headers if header[0] in repeated)
    return Variant(
        path,
        encoding,
        found.st_size,
        found.st_mtime_ns,
        etag,
        last_modified,
        headers,
        cache_headers,
    )


def content_type_of(name: str) -> tuple[str, str]:
    """Content-Type and Content-Encoding of a file as it is.

    The type is that of Django's development server, with UTF-8 said of text. What is compressed by its name is sent as that
    (a ``.tar.gz`` stays one), save ``.svgz``, which is an image.
    """
    guessed, compression = mimetypes.guess_type(name)
    ending = os.path.splitext(name)[1].lower()
    if compression and ending != ".svgz":
        return _COMPRESSED_TYPES.get(compression, "application/octet-stream"), ""
    content_type = guessed or _TYPES.get(ending, "application/octet-stream")
    if content_type.startswith("text/"):
        content_type += "; charset=utf-8"
    return content_type, compression or ""


class Memory:
    """Contents of files; the one not asked for the longest goes first.

    What is kept and what is being read are together never more than ``limit`` bytes. Lives on one event loop.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: OrderedDict[Variant, bytes] = OrderedDict()
        self._reading: dict[Variant, asyncio.Future[bytes]] = {}
        self._size = 0

    @property
    def size(self) -> int:
        """Bytes that are kept, or being read."""
        return self._size

    def get(self, variant: Variant) -> bytes | None:
        """Its content, if that is here."""
        content = self._kept.get(variant)
        if content is not None:
            self._kept.move_to_end(variant)
        return content

    def read(
        self, variant: Variant, start: Callable[[Callable[[], bytes]], asyncio.Future[bytes]]
    ) -> asyncio.Future[bytes] | None:
        """What will be its content, read once for all who ask meanwhile; None where it is not to be kept.

        ``start`` runs a function in a worker thread. Whoever waits for the future shields it: others may, too.
        """
        if variant in self._reading:
            return self._reading[variant]
        if variant.size > self.limit // LARGEST_PART or not self._make_room(variant.size):
            return None
        reading = self._reading[variant] = start(variant.read)
        self._size += variant.size
        reading.add_done_callback(lambda done: self._keep(variant, done))
        return reading

    def _make_room(self, size: int) -> bool:
        while self._size + size > self.limit and self._kept:
            dropped, _ = self._kept.popitem(last=False)
            self._size -= dropped.size
        return self._size + size <= self.limit

    def _keep(self, variant: Variant, done: asyncio.Future[bytes]) -> None:
        del self._reading[variant]
        if done.cancelled() or done.exception() is not None:
            self._size -= variant.size
        else:
            self._kept[variant] = done.result()
