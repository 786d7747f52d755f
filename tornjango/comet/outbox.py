from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from tornjango.comet.brokers.base import Appender, Broker, Draft
from tornjango.comet.log import Position
from tornjango.exceptions import BrokerUnavailable, Overloaded

logger = logging.getLogger("tornjango.comet")

# What goes to the broker in one call: more messages a second than one by one, and no call takes long.
BATCH_MESSAGES = 500
BATCH_BYTES = 1024 * 1024

STOPPED = "the server has stopped."

# Pauses between attempts, in seconds.
FIRST_PAUSE = 0.05
LAST_PAUSE = 2.0


class _Letter(NamedTuple):
    """The messages of one `Outbox.put`, which are stored together."""

    drafts: Sequence[Draft]
    size: int
    deadline: float
    future: Future[Position]


class Outbox:
    """What a process publishes and the broker does not have yet: in order, in batches, again and again until it has.

    ``known`` tells the newest position of this process. ``report`` is told of each failure, and None when it went well.
    """

    def __init__(
        self,
        broker: Appender,
        *,
        most: int,
        known: Callable[[], Position | None],
        report: Callable[[BrokerUnavailable | None], None],
    ) -> None:
        self._broker = broker
        self._most = most
        self._known = known
        self._report = report
        self._changed = threading.Condition()
        self._letters: deque[_Letter] = deque()
        self._waiting = 0
        self._closed = False
        self._given_up = threading.Event()
        self._thread: threading.Thread | None = None
        #: The last position that the broker has given.
        self.stored: Position | None = None

    @property
    def waiting(self) -> int:
        """Messages that the broker does not have yet."""
        return self._waiting

    def put(self, drafts: Sequence[Draft], wait: float) -> Future[Position]:
        """Takes messages on, in any thread; the future has the position of the last, once the broker has them all.

        It fails with BrokerUnavailable when that is not so within ``wait`` seconds: as soon as the broker has failed for the
        next time, which takes Broker.TIMEOUT at most. What the broker raises else, is raised of the future, and concerns
        these messages only. It cannot be cancelled. Raises Overloaded when too many wait.
        """
        letter = _Letter(
            drafts,
            sum(len(draft.body) for draft in drafts),
            time.monotonic() + wait,
            Future(),
        )
        letter.future.set_running_or_notify_cancel()
        with self._changed:
            if self._closed:
                raise BrokerUnavailable(f"Nothing can be published any more: {STOPPED}")
            if self._waiting + len(drafts) > self._most and self._waiting:
                raise Overloaded(
                    f"{self._waiting} messages wait for the {self._broker.name} broker already "
                    '(TORNJANGO["COMET"]["PUBLISH_QUEUE"]).'
                )
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="tornjango-publish", daemon=True)
                thread.start()
                self._thread = thread
            self._waiting += len(drafts)
            self._letters.append(letter)
            self._changed.notify_all()
        return letter.future

    def close(self, wait: float) -> int:
        """Takes no more; returns when the broker has all, or after ``wait`` seconds, with how many it has not.

        Those fail with BrokerUnavailable at once, but for what the broker is being given at this moment: for that it waits, for
        Broker.TIMEOUT at most.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(wait)
        left = self._waiting
        self._given_up.set()
        with self._changed:
            letters = list(self._letters)
            self._letters.clear()
            self._waiting -= sum(len(letter.drafts) for letter in letters)
        self._fail(
            letters, BrokerUnavailable(f"The {self._broker.name} broker was away: {STOPPED}")
        )
        if thread is not None:
            thread.join(Broker.TIMEOUT)
        return left

    def _run(self) -> None:
        while letters := self._next():
            try:
                self._deliver(letters)
            except Exception as error:  # noqa: BLE001 - raised where it was published
                self._deliver_apart(letters, error)
            with self._changed:
                self._waiting -= sum(len(letter.drafts) for letter in letters)

    def _deliver_apart(self, letters: list[_Letter], error: Exception) -> None:
        """Something in these the broker cannot store: that is no reason to lose the rest."""
        if len(letters) == 1:
            self._fail(letters, error)
            return
        for letter in letters:
            try:
                self._deliver([letter])
            except Exception as its_own:  # noqa: BLE001 - raised where it was published
                self._fail([letter], its_own)

    def _next(self) -> list[_Letter]:
        with self._changed:
            while not self._letters and not self._closed:
                self._changed.wait()
            letters: list[_Letter] = []
            messages = size = 0
            while self._letters:
                letter = self._letters[0]
                messages += len(letter.drafts)
                size += letter.size
                if letters and (messages > BATCH_MESSAGES or size > BATCH_BYTES):
                    break
                letters.append(self._letters.popleft())
            return letters

    def _deliver(self, letters: list[_Letter]) -> None:
        """Until the broker has them or nobody waits for them any longer. They stay together: a batch may have arrived."""
        batch = secrets.token_bytes(16)
        drafts = [draft for letter in letters for draft in letter.drafts]
        pause, refused = FIRST_PAUSE, False
        while True:
            try:
                end = self._broker.append(batch, drafts, self._known())
            except BrokerUnavailable as error:
                self._report(error)
                self._expire(letters, error)
                if all(letter.future.done() for letter in letters):
                    return
                if self._given_up.wait(random.uniform(pause / 2, pause)):
                    self._fail(letters, error)
                    return
                pause = min(pause * 2, LAST_PAUSE)
            except Exception:
                # Once more: if it has arrived all the same, the broker knows the batch.
                if refused:
                    raise
                refused = True
            else:
                self._report(None)
                self._settle(letters, end, len(drafts))
                return

    def _expire(self, letters: list[_Letter], error: BrokerUnavailable) -> None:
        now = time.monotonic()
        late = [letter for letter in letters if now >= letter.deadline]
        with self._changed:
            queued = [letter for letter in self._letters if now >= letter.deadline]
            if queued:
                self._letters = deque(it for it in self._letters if now < it.deadline)
                self._waiting -= sum(len(letter.drafts) for letter in queued)
        self._fail([*late, *queued], error)

    def _fail(self, letters: list[_Letter], error: Exception) -> None:
        for letter in letters:
            if not letter.future.done():
                letter.future.set_exception(error)

    def _settle(self, letters: list[_Letter], end: Position, count: int) -> None:
        self.stored = end
        offset = end.offset - count
        for letter in letters:
            offset += len(letter.drafts)
            if not letter.future.done():
                letter.future.set_result(Position(end.epoch, offset))
