"""Who is reading what, in this process: a page counts from its first poll until shortly after its last."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass
from uuid import UUID

from tornjango import comet

GRACE = 3  # seconds in which a page whose poll was answered is back with the next


@dataclass
class Page:
    reader: str
    polls: int = 0


pages: defaultdict[int, dict[UUID, Page]] = defaultdict(dict)


def arrive(pk: int, page: UUID, reader: str) -> None:
    known = page in pages[pk]
    pages[pk].setdefault(page, Page(reader)).polls += 1
    if not known:
        announce(pk)


def leave(pk: int, page: UUID) -> None:
    pages[pk][page].polls -= 1
    asyncio.get_running_loop().call_later(GRACE, forget, pk, page)


def forget(pk: int, page: UUID) -> None:
    """Unless it has come back, or another call was quicker."""
    if page in pages[pk] and not pages[pk][page].polls:
        del pages[pk][page]
        announce(pk)
    if not pages[pk]:
        del pages[pk]


def announce(pk: int) -> None:
    comet.publish(f"readers:{pk}", line(pk))


def line(pk: int) -> str:
    open_pages = pages.get(pk, {}).values()
    names = sorted({page.reader for page in open_pages if page.reader})
    among = f", {' and '.join(names)} among them" if names else ""
    return f"{len(open_pages)} reading now{among}"
