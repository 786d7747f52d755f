"""Server-Sent Events, as the HTML Standard has them (9.2): what an ``EventSource`` reads, and how it comes back.

Each event has the reader's cursor for an ``id``, so the ``Last-Event-ID`` of a client that comes back is its cursor; its
``data`` is the same answer that a poll gets. Nothing waits here for a client that takes nothing: the next answer is made
when the one before is with the system, from the log, which all readers share.
"""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from functools import lru_cache

from tornjango.comet.readers import Reader
from tornjango.conf import get_config
from tornjango.exceptions import ChannelForbidden

# Milliseconds after which a client comes back whose connection broke: each its own, for a network breaks for many.
_RECONNECT = 1000, 3000

# Streams that began together should not all speak together.
_EARLIEST_HEARTBEAT = 0.8

# As for answers: a crowd's is made once.
_REMEMBERED = 8


async def stream(reader: Reader) -> AsyncIterator[bytes]:
    """The reader's answers, the first at once, and one without messages at least every ``HEARTBEAT`` seconds.

    Ends when the server stops, after an answer that says when to come back; when a newer reader has taken this one's
    place; and when there is no channel left that it may read, after an event that says so.
    """
    timeout = 0.0
    with reader.parked():
        yield _retry(random.randint(*_RECONNECT))
        while reader.channels:
            try:
                answer = await reader.next(timeout)
            except ChannelForbidden as error:
                yield _refused(error)
                continue
            if reader.superseded:
                return
            yield _event(answer.cursor, answer.json())
            if answer.retry:
                yield _retry(answer.retry)
                return
            timeout = _heartbeat()


def _heartbeat() -> float:
    seconds = get_config().COMET.HEARTBEAT
    return seconds * random.uniform(_EARLIEST_HEARTBEAT, 1)


@lru_cache(maxsize=_REMEMBERED)
def _event(cursor: str, answer: bytes) -> bytes:
    # JSON has no line breaks, and U+2028 is none here (9.2.5).
    return b"id: %s\ndata: %s\n\n" % (cursor.encode(), answer)


def _retry(milliseconds: int) -> bytes:
    return b"retry: %d\n\n" % milliseconds


def _refused(error: ChannelForbidden) -> bytes:
    told = {"error": str(error), "status": error.status, "channels": list(error.channels)}
    return b"event: refused\ndata: %s\n\n" % json.dumps(told).encode()
