"""Clients that go on asking while a test does something to the server."""

from __future__ import annotations

import http.client
import threading
from collections import Counter
from collections.abc import Callable
from typing import Self

#: Between two requests of a client, in seconds: workers that start need the processor, too.
PAUSE = 0.01


class Load:
    """Asks for "/" until the end of a ``with`` block: half of its clients on connections that they keep."""

    def __init__(self, port: int, clients: int = 4) -> None:
        self.port = port
        #: How often each answer came.
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask_on, args=(number % 2 == 0,))
            for number in range(clients)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, 20), (self.answers, self.failures)

    def _ask_on(self, keeps: bool) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        while not self._over.wait(PAUSE):
            self._ask(connection)
            if not keeps:
                connection.close()
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection) -> None:
        try:
            connection.request("GET", "/")
            response = connection.getresponse()
            answer, failure = response.read().decode(), None
            if response.status != 200:
                failure = f"{response.status} {answer}"
        except (OSError, http.client.HTTPException) as exc:
            connection.close()
            failure = repr(exc)
        with self._changed:
            if failure is None:
                self.answers[answer] += 1
            else:
                self.failures.append(failure)
            self._changed.notify_all()
