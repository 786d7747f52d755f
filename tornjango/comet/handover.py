"""The memory's messages, from a process to the one that takes its place: by a file in development, by a socket under a master.

Over the socket the one that leaves sends all it has; from then on what is still published there goes the same way, and the
new one numbers it. So a position that a client has means the same before and after, and nothing is missing.

Both speak in lines of JSON: what the logs are, then each channel's messages; then the drafts, each answered by a position.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BufferedRWPair
from typing import IO, Any

from tornjango.comet.brokers.base import Draft
from tornjango.comet.log import Audience, Channel, Limits, Message, Position, Snapshot
from tornjango.exceptions import BrokerUnavailable

Stream = IO[bytes] | BufferedRWPair

logger = logging.getLogger("tornjango.comet")

#: Seconds in which a process that works has sent or taken the next piece.
TIMEOUT = 5.0


def write(snapshot: Snapshot, stream: Stream) -> None:
    """Ages are told, not times: each process has a clock of its own."""
    now = time.monotonic()
    _put(stream, [*_position(snapshot.end), snapshot.floor, len(snapshot.channels)])
    for name, floor, messages in snapshot.channels:
        _put(stream, [name, floor, len(messages)])
        for message in messages:
            age = now - message.published
            _put(stream, [message.offset, age, message.body.decode(), _audience(message.audience)])
    stream.flush()


def read(stream: Stream) -> Snapshot:
    """Raises ValueError for what `write` has not written, or not to its end."""
    now = time.monotonic()
    epoch, offset, floor, count = _get(stream)
    channels = []
    for _ in range(count):
        name, low, messages = _get(stream)
        channels.append((name, low, [_message(name, now, *_get(stream)) for _ in range(messages)]))
    return Snapshot(Position(bytes.fromhex(epoch), offset), floor, channels)


def _message(
    channel: str, now: float, offset: int, age: float, body: str, audience: Any
) -> Message:
    return Message(channel, offset, now - age, body.encode(), _to_audience(audience))


def _put(stream: Stream, value: Any) -> None:
    stream.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")


def _get(stream: Stream) -> Any:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise ValueError("The messages of the process before end in the middle.")
    return json.loads(line)


def _position(position: Position) -> tuple[str, int]:
    return position.epoch.hex(), position.offset


def _audience(audience: Audience | None) -> list[list[str]] | None:
    return None if audience is None else [sorted(audience.users), sorted(audience.groups)]


def _to_audience(value: Any) -> Audience | None:
    return None if value is None else Audience(frozenset(value[0]), frozenset(value[1]))


class Successor:
    """The process that has taken over, to the one that leaves: it takes what is still published, as a broker does."""

    name = "memory"

    def __init__(self, line: socket.socket, snapshot: Snapshot) -> None:
        line.settimeout(TIMEOUT)
        self._stream = line.makefile("rwb")
        self._line = line
        self._snapshot: Snapshot | None = snapshot
        self._lock = threading.Lock()
        threading.Thread(target=self._begin, name="tornjango-handover", daemon=True).start()

    def _begin(self) -> None:
        with self._lock:
            try:
                self._hand_over()
            except OSError as error:
                logger.error("%s", self._gone(error))

    def _hand_over(self) -> None:
        if self._snapshot is not None:
            snapshot, self._snapshot = self._snapshot, None
            write(snapshot, self._stream)

    def append(self, batch: bytes, drafts: Sequence[Draft], known: Position | None) -> Position:
        with self._lock:
            return self._append(drafts)

    def _append(self, drafts: Sequence[Draft]) -> Position:
        try:
            self._hand_over()
            _put(
                self._stream,
                [
                    [*draft.channel, draft.body.decode(), _audience(draft.audience)]
                    for draft in drafts
                ],
            )
            self._stream.flush()
            epoch, offset = _get(self._stream)
        except (OSError, ValueError) as error:
            raise self._gone(error) from error
        return Position(bytes.fromhex(epoch), offset)

    def close(self) -> None:
        with self._lock:
            with suppress(
                OSError
            ):  # it is gone, and what was written last with it: `append` has said so
                self._stream.close()
            self._line.close()

    def _gone(self, error: Exception) -> BrokerUnavailable:
        return BrokerUnavailable(
            f"The worker that has taken this one's place does not take its messages: {error!r}."
        )


class Inheritance:
    """The process before, to the one that takes over: in a thread, until that process is gone.

    ``inherit`` is called once, with what it had, or None where nothing came; ``send`` with what it still publishes.
    """

    def __init__(
        self,
        line: socket.socket,
        inherit: Callable[[Snapshot | None], None],
        send: Callable[[Sequence[Draft]], Position],
    ) -> None:
        self._line = line
        self._inherit = inherit
        self._send = send
        threading.Thread(target=self._run, name="tornjango-handover", daemon=True).start()

    def _run(self) -> None:
        self._line.settimeout(TIMEOUT)
        with self._line, self._line.makefile("rwb") as stream:
            try:
                snapshot = read(stream)
            except (OSError, ValueError) as error:
                logger.error(
                    "The messages of the worker before did not come over, and readers are told of a gap: %r",
                    error,
                )
                self._inherit(None)
                return
            self._inherit(snapshot)
            self._line.settimeout(None)
            with suppress(ConnectionError):  # it was killed
                while line := stream.readline():
                    end = self._send([_draft(*fields) for fields in json.loads(line)])
                    _put(stream, _position(end))
                    stream.flush()


def _draft(name: str, limits: list[Any], body: str, audience: Any) -> Draft:
    return Draft(Channel(name, Limits(*limits)), body.encode(), _to_audience(audience))
