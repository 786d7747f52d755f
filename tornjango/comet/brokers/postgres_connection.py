from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from django.db import connections
from django.db.backends.postgresql.psycopg_any import is_psycopg3
from django.db.utils import OperationalError, load_backend

#: Seconds between two looks at what is overdue.
TICK = 0.25

# What Django's settings have for one database, but for what is ours to say.
_SESSION = """
SELECT set_config('default_transaction_isolation', 'read committed', false),
       set_config('statement_timeout', %(timeout)s, false),
       set_config('jit', 'off', false),
       -- Or a message that was read would be lost when the server crashes.
       set_config(
           'synchronous_commit',
           CASE current_setting('synchronous_commit') WHEN 'off' THEN 'local' ELSE current_setting('synchronous_commit') END,
           false
       )
"""


class Watch:
    """Has no call on a connection last longer than it may.

    psycopg2 waits for a server for ever, and cannot be told otherwise. But libpq gives up when the socket is shut down,
    whichever thread does it; here, one for all the connections of a broker.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._due: dict[Connection, float] = {}
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def over(self, connection: Connection, seconds: float) -> Iterator[None]:
        """Inside, ``connection`` is cut after so many seconds, and its call fails."""
        due = time.monotonic() + seconds
        with self._lock:
            if self._closed.is_set():
                raise OperationalError("the broker is closed")
            self._due[connection] = due
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="tornjango-comet-watch", daemon=True
                )
                self._thread.start()
        try:
            yield
        except OperationalError as error:
            if time.monotonic() >= due:
                raise OperationalError(f"no answer in {seconds:g} seconds") from error
            raise
        finally:
            # The socket is not closed before this: its number may be another one's then.
            with self._lock:
                del self._due[connection]

    def _run(self) -> None:
        while not self._closed.wait(TICK):
            with self._lock:
                now = time.monotonic()
                for connection, due in self._due.items():
                    if now >= due:
                        connection.cut()

    def close(self) -> None:
        """All calls fail, at once."""
        with self._lock:
            self._closed.set()
            for connection in self._due:
                connection.cut()


class Connection:
    """One to the database of an alias, as Django would make it, that is neither a request's nor any thread's.

    For one thread at a time. Each call takes ``timeout`` seconds at most. Raises the errors of ``django.db.utils``, and is
    of no use after any but an IntegrityError.
    """

    def __init__(self, alias: str, watch: Watch, timeout: float) -> None:
        self._watch = watch
        self._timeout = timeout
        self._heard = False
        settings = _settings(alias, timeout)
        self._wrapper = load_backend(settings["ENGINE"]).DatabaseWrapper(settings, alias)
        self._wrapper.inc_thread_sharing()

    def open(self) -> None:
        try:
            with self._watch.over(self, self._timeout), self._wrapper.wrap_database_errors:
                self._wrapper.connect()
            if is_psycopg3:
                self._driver.add_notify_handler(self._hear)
            self.execute(_SESSION, {"timeout": str(round(self._timeout * 1000))})
        except BaseException:
            self.close()
            raise

    @property
    def _driver(self) -> Any:
        return self._wrapper.connection

    def execute(self, sql: str, params: Mapping[str, object] | None = None) -> list[Any]:
        """The rows, if it has any."""
        # The driver's own cursor: Django's would keep what is published, for its log of queries, where DEBUG is on.
        with (
            self._watch.over(self, self._timeout),
            self._wrapper.wrap_database_errors,
            self._driver.cursor() as cursor,
        ):
            cursor.execute(sql, params)
            return cursor.fetchall() if cursor.description else []

    def wait(self, seconds: float) -> bool:
        """Whether there was a notification since the last call. Returns as soon as there is one."""
        if not self._listen():
            self._readable(seconds)
            self._listen()
        heard, self._heard = self._heard, False
        return heard

    def _listen(self) -> bool:
        with self._wrapper.wrap_database_errors:
            if is_psycopg3:
                self._driver.pgconn.consume_input()
                while (notification := self._driver.pgconn.notifies()) is not None:
                    self._hear(notification)
            else:
                self._driver.poll()
                while self._driver.notifies:
                    self._hear(self._driver.notifies.pop())
        return self._heard

    def _hear(self, notification: object) -> None:
        self._heard = True

    def _readable(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._driver.fileno(), select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def is_alive(self) -> bool:
        """Whether it can be used, as far as can be told without asking the server."""
        # A server that has nothing to answer says nothing but good-bye.
        return not self._readable(0)

    def cut(self) -> None:
        """Has the call fail that another thread makes. Nothing, while there is no socket: connecting has its own time-out."""
        driver = self._driver
        if driver is None:
            return
        with (
            # It may be at its end already.
            suppress(OSError),
            socket.socket(fileno=os.dup(driver.fileno())) as sock,
        ):
            sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closing twice is harmless."""
        driver, self._wrapper.connection = self._wrapper.connection, None
        if driver is not None:
            driver.close()


def _settings(alias: str, timeout: float) -> dict[str, Any]:
    # Not a copy made once: a test runner renames its databases.
    settings = connections.settings[alias]
    options = dict(settings["OPTIONS"])
    # Django's pool is for its own threads; the isolation level is ours.
    options.pop("pool", None)
    options.pop("isolation_level", None)
    # libpq takes whole seconds, and for 1 it takes 2.
    most = max(2, round(timeout))
    options["connect_timeout"] = min(int(options.get("connect_timeout", most)), most)
    return {**settings, "OPTIONS": options, "AUTOCOMMIT": True}
