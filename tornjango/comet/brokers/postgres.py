"""The broker that is the project's own PostgreSQL: a table is the log, and NOTIFY says that it has grown.

Messages are numbered by one row that each batch locks until its commit; so the order of the numbers is that of the commits,
there are no holes, and one fetch after another finds everything. A notification only says "look": one that is lost costs
SILENCE seconds, and no message.

Connections are its own: one for each process that publishes or asks for backlogs, now and then another, and one that
listens. It is the primary that they go to, and directly, or by a PgBouncer in session mode: in transaction mode LISTEN is lost.
"""

from __future__ import annotations

import json
import logging
import random
import secrets
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from django.db import connections
from django.db.utils import Error, IntegrityError, NotSupportedError

from tornjango.comet.brokers import postgres_sql as sql
from tornjango.comet.brokers.base import Broker, Draft, Sink
from tornjango.comet.brokers.postgres_connection import Connection, Watch
from tornjango.comet.brokers.postgres_trim import PAUSE, trim
from tornjango.comet.log import EPOCH_BYTES, Audience, Backlog, Channel, Message, Position
from tornjango.exceptions import BrokerUnavailable, ConfigurationError

logger = logging.getLogger("tornjango.comet")

#: Messages that the tail takes in one piece.
ROWS = 250

#: Seconds without a notification after which the tail looks all the same: then it knows whether the server is there.
SILENCE = 2.0

#: Seconds between two looks at whether the tail is to return.
SLICE = 0.25

#: Connections kept for the next one who needs one.
IDLE = 2

# PostgreSQL's names of errors (its manual, appendix A).
_READ_ONLY = frozenset({"25006", "55000"})
_NO_TABLE = frozenset({"42P01", "42703"})
_NO_PERMISSION = "42501"


class PostgresBroker(Broker):
    """Of the database of an alias, whose migrations must have run."""

    name = "postgres"

    def __init__(self, alias: str) -> None:
        self._alias = alias
        self._watch = Watch()
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._closed = False
        self._open = self._appended = self._removed = 0
        self._append_seconds = 0.0
        self._trimmer: threading.Thread | None = None
        self._next_trim = 0.0
        settings = connections.settings[alias]
        host, port = settings["HOST"] or "local", settings["PORT"] or 5432
        self._server = f"{host}:{port}/{settings['NAME']}"

    # Publishing

    def append(self, batch: bytes, drafts: Sequence[Draft], known: Position | None) -> Position:
        began = time.monotonic()
        with self._connection() as connection:
            end = self._append(connection, batch, drafts, known)
        self._append_seconds = time.monotonic() - began
        self._appended += len(drafts)
        return end

    def _append(
        self,
        connection: Connection,
        batch: bytes,
        drafts: Sequence[Draft],
        known: Position | None,
    ) -> Position:
        limits = [draft.channel.limits for draft in drafts]
        params: dict[str, object] = {
            "known_epoch": b"" if known is None else known.epoch,
            "known": 0 if known is None else known.offset,
            "fresh": _fresh_epoch(),
            "count": len(drafts),
            "batch": str(uuid.UUID(bytes=batch)),
            "channels": [draft.channel.name for draft in drafts],
            "bodies": [draft.body.decode() for draft in drafts],
            "audiences": [_audience_text(draft.audience) for draft in drafts],
            "ttls": [float(limit.ttl) for limit in limits],
            "histories": [limit.history for limit in limits],
            "sizes": [limit.max_bytes for limit in limits],
        }
        try:
            rows = self._ask_head(connection, sql.APPEND, params)
        except IntegrityError:
            rows = connection.execute(sql.APPENDED, params)
            if not rows:
                raise
        epoch, last = rows[0][:2]
        return Position(bytes(epoch), last)

    def head(self) -> Position:
        with self._connection() as connection:
            [(epoch, last)] = self._ask_head(connection, sql.HEAD, {})
        return Position(bytes(epoch), last)

    # Backlogs

    def backlog(self, channel: Channel) -> Backlog:
        name, limits = channel
        params = {
            "channel": name,
            "history": limits.history,
            "max_bytes": limits.max_bytes,
        }
        with self._connection() as connection:
            rows = self._ask_head(connection, sql.BACKLOG, params)
        now = time.monotonic()
        messages: list[Message] = []
        epoch = bytes(rows[0][0])
        floor: int = rows[0][1]
        for _, _, number, body, audience, age, total in rows:
            if number is None or number <= floor:
                break
            if len(messages) == limits.history or total > limits.max_bytes or age >= limits.ttl:
                floor = number
                break
            messages.append(_message(name, number, now - age, body, audience))
        messages.reverse()
        return Backlog(messages, floor, epoch)

    # The tail

    def tail(self, sink: Sink) -> None:
        with self._translated():
            connection = self._connect()
            try:
                connection.execute(sql.LISTEN)
                self._follow(connection, sink)
            finally:
                self._disconnect(connection)

    def _follow(self, connection: Connection, sink: Sink) -> None:
        follows = False
        while not sink.stopped:
            more = self._fetch(connection, sink)
            if not follows:
                follows = True
                sink.connected()
            self._start_trimming()
            if not more and not self._heard(connection, sink):
                self._check_listening(connection)

    def _fetch(self, connection: Connection, sink: Sink) -> bool:
        """Delivers the next messages. Whether there may be more at once."""
        end = sink.end
        params = {"end": 0 if end is None else end.offset, "rows": ROWS}
        rows = self._ask_head(connection, sql.FETCH, params)
        head = Position(bytes(rows[0][0]), rows[0][1])
        if end is None or end.epoch != head.epoch:
            sink.begin(head)
            return True
        if head.offset < end.offset:
            connection.execute(
                sql.RENEW,
                {"fresh": _fresh_epoch(), "known_epoch": end.epoch, "known": end.offset},
            )
            return True
        messages = _messages(rows, end.offset)
        if messages:
            sink.deliver(messages)
        elif head.offset > end.offset:
            # What comes next was removed: others were quicker to forget than this process to read.
            sink.begin(head)
        return end.offset + len(messages) < head.offset

    def _heard(self, connection: Connection, sink: Sink) -> bool:
        """Waits. Whether there was a notification, and not just silence."""
        until = time.monotonic() + SILENCE
        while not sink.stopped and time.monotonic() < until:
            if connection.wait(SLICE):
                return True
        return False

    def _check_listening(self, connection: Connection) -> None:
        if not connection.execute(sql.LISTENING):
            raise ConfigurationError(
                f"The connection to {self._server} does not listen any more: a PgBouncer in transaction mode does that. "
                'Give TORNJANGO["COMET"]["DATABASE"] an alias that goes to the server directly, or in session mode.'
            )

    # Trimming

    def _start_trimming(self) -> None:
        """Now and then, in a thread of its own: the tail is not to wait for it."""
        now = time.monotonic()
        if now < self._next_trim or (self._trimmer is not None and self._trimmer.is_alive()):
            return
        # Not all processes at once.
        self._next_trim = now + random.uniform(PAUSE / 2, PAUSE)
        self._trimmer = threading.Thread(
            target=self._trim, name="tornjango-comet-trim", daemon=True
        )
        self._trimmer.start()

    def _trim(self) -> None:
        try:
            self.trim()
        except (BrokerUnavailable, ConfigurationError) as error:
            if not self._closed:
                logger.warning("Old COMET messages are not removed: %s", error)

    def trim(self, pause: float = PAUSE) -> int:
        """Removes what is beyond the limits, and how much that was; nothing if a process did in the last ``pause`` seconds.

        Where a process follows the broker, it does this all the time.
        """
        with self._connection() as connection:
            removed = trim(connection.execute, pause)
        self._removed += removed
        return removed

    # The server

    def status(self) -> dict[str, int | float | str]:
        """``connections`` are open; ``appended`` and ``removed`` count this process's messages; the last append took ``append`` seconds."""
        return {
            "database": self._alias,
            "server": self._server,
            "connections": self._open,
            "appended": self._appended,
            "append": self._append_seconds,
            "removed": self._removed,
        }

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        self._watch.close()
        for connection in idle:
            self._disconnect(connection)

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        """For a call or two; one that is there already, if it is alive."""
        with self._translated():
            connection = self._take_idle() or self._connect()
            try:
                yield connection
            except BaseException:
                self._disconnect(connection)
                raise
            self._give_back(connection)

    def _take_idle(self) -> Connection | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if connection.is_alive():
                return connection
            self._disconnect(connection)

    def _give_back(self, connection: Connection) -> None:
        with self._lock:
            if len(self._idle) < IDLE and not self._closed:
                self._idle.append(connection)
                return
        self._disconnect(connection)

    def _connect(self) -> Connection:
        connection = Connection(self._alias, self._watch, self.TIMEOUT)
        connection.open()
        with self._lock:
            self._open += 1
        try:
            self._adopt(connection)
        except BaseException:
            self._disconnect(connection)
            raise
        return connection

    def _disconnect(self, connection: Connection) -> None:
        connection.close()
        with self._lock:
            self._open -= 1

    def _ask_head(
        self, connection: Connection, statement: str, params: Mapping[str, object]
    ) -> list[Any]:
        """The rows of what has one at least, where there is a head."""
        rows = connection.execute(statement, params)
        if not rows:
            self._adopt(connection)
            rows = connection.execute(statement, params)
        return rows

    def _adopt(self, connection: Connection) -> None:
        """Sees to it that there is a head, and that its epoch is of the log that is here.

        Done at each connecting: what puts another log in its place has ended the connections.
        """
        home = {"home": "/".join((connection.execute(sql.HOME)[0][0], _timeline(connection)))}
        if not connection.execute(sql.AT_HOME, home):
            connection.execute(sql.ADOPT, {**home, "fresh": _fresh_epoch()})

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raises ours for the errors of the database."""
        try:
            yield
        except Error as error:
            raise self._translate(error) from error

    def _translate(self, error: Error) -> Exception:
        said = " ".join(str(error).split())
        state = _state(error)
        if state in _NO_TABLE:
            return ConfigurationError(
                f"Database {self._alias!r} lacks tables of COMET's: put 'tornjango' into INSTALLED_APPS and run "
                f"manage.py migrate --database={self._alias}. The server says: {said}"
            )
        if state == _NO_PERMISSION:
            return ConfigurationError(
                f"The user of database {self._alias!r} may not use COMET's tables, tornjango_comet_*: {said}"
            )
        if state in _READ_ONLY:
            said += (
                '. COMET needs the primary: TORNJANGO["COMET"]["DATABASE"] must not be a replica'
            )
        return BrokerUnavailable(f"PostgreSQL at {self._server} (database {self._alias!r}): {said}")


def _timeline(connection: Connection) -> str:
    try:
        timeline: str = connection.execute(sql.TIMELINE)[0][0]
    except NotSupportedError:
        # A server that keeps its log in a way of its own.
        return ""
    return timeline


def _state(error: Error) -> str | None:
    # psycopg2's name for it, and psycopg's.
    cause = error.__cause__
    state: str | None = getattr(cause, "pgcode", None) or getattr(cause, "sqlstate", None)
    return state


def _fresh_epoch() -> bytes:
    return secrets.token_bytes(EPOCH_BYTES)


def _messages(rows: Sequence[Any], end: int) -> list[Message]:
    """Those that follow ``end`` without a hole."""
    now = time.monotonic()
    messages: list[Message] = []
    for _, _, number, channel, body, audience, age in rows:
        if number != end + len(messages) + 1:
            break
        messages.append(_message(channel, number, now - age, body, audience))
    return messages


def _message(
    channel: str, number: int, published: float, body: str, audience: str | None
) -> Message:
    return Message(channel, number, published, body.encode(), _audience(audience))


def _audience_text(audience: Audience | None) -> str | None:
    if audience is None:
        return None
    return json.dumps([sorted(audience.users), sorted(audience.groups)])


def _audience(text: str | None) -> Audience | None:
    if text is None:
        return None
    users, groups = json.loads(text)
    return Audience(frozenset(users), frozenset(groups))
