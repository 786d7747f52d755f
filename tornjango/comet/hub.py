"""What a process knows of COMET, in one place: its logs, its readers, and the threads that keep both up to date.

With the memory broker a message is in the logs when it is published. With another one it goes into the outbox, from there
to the broker, and comes back to every process by the broker's tail, into the logs. Readers only ever read the logs; what
those do not reach back to is fetched from the broker, once for all who ask.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from operator import attrgetter
from typing import Any

from tornjango.comet import brokers, channels
from tornjango.comet.attendance import FAREWELLS, PRESENCE, Presence
from tornjango.comet.brokers.base import Broker, Draft
from tornjango.comet.brokers.memory import MemoryBroker
from tornjango.comet.handover import Inheritance, Successor, read, write
from tornjango.comet.log import Channel, Limits, Logs, Message, Position, Reading, Snapshot
from tornjango.comet.outbox import FIRST_PAUSE, LAST_PAUSE, Outbox
from tornjango.comet.roll import Member
from tornjango.comet.waiters import Waiters
from tornjango.conf import CometConfig, get_config
from tornjango.exceptions import BrokerUnavailable, ConfigurationError

logger = logging.getLogger("tornjango.comet")

Listener = Callable[[Message], None]

#: The internal channel on which `Hub.revoke` tells all processes.
REVOKED = Channel(
    f"{channels.INTERNAL}revoked", Limits(history=100_000, ttl=24 * 3600, max_bytes=32 << 20)
)

#: Channels whose last revocation a process remembers; a grant older than the oldest of them is asked for again.
REVOCATIONS = 10_000

#: Threads in which a broker is asked for what the logs do not reach back to.
FETCHERS = 4

#: What readers that stand in the same place are told is read once for so many places, and for so many seconds.
READINGS, READING_LASTS = 8, 0.05

#: What a channel's rate is of, in seconds.
MINUTE = 60.0


class Hub:
    """One for each process. Its methods may be called in any thread, but for those that are coroutines."""

    def __init__(self, config: CometConfig, broker: Broker | None) -> None:
        self.waiters = Waiters()
        self.broker = broker
        self._memory = MemoryBroker() if broker is None else None
        self._lock = threading.Lock()
        # Around it, where messages are numbered here: listeners hear them in their order, and may publish themselves.
        self._telling = threading.RLock()
        self._logs = Logs(
            max_channels=config.MAX_CHANNELS,
            max_bytes=config.MAX_MEMORY,
            broker=broker is not None,
        )
        self._listeners: dict[str, tuple[Limits, list[Listener]]] = {}
        self._readings: dict[object, tuple[Reading, float]] = {}
        self._begun = threading.Event()
        self._stopping = threading.Event()
        self._tail: threading.Thread | None = None
        self._fetches: set[str] = set()
        self._fetch_pause = FIRST_PAUSE
        # Not the workers: those may all be busy with what waits for this.
        self._fetchers = ThreadPoolExecutor(FETCHERS, "tornjango-backlog")
        self._revoked: OrderedDict[str, int] = OrderedDict()
        self._revoked_floor = self._last_revocation = 0
        self._losses: dict[str, tuple[str, float]] = {}
        self._tail_pause = FIRST_PAUSE
        #: How long the newest message took from the broker to here, in seconds.
        self.lag = 0.0
        self._config = config
        self._outbox: Outbox | None = None
        self._successor: Successor | None = None
        if self._memory is not None:
            self._logs.restart(self._memory.end)
            self._begun.set()
        if broker is not None:
            self._outbox = Outbox(
                broker,
                most=config.PUBLISH_QUEUE,
                known=self._known,
                report=partial(self._report, "publish"),
            )
        self.listen(REVOKED, self._tell_revocation)
        self.presence = Presence(
            self.send, alone=broker is None, is_lost=lambda: self.lost is not None
        )
        self.listen(PRESENCE, self.presence.hear)
        self.listen(FAREWELLS, self.presence.hear)

    # Publishing

    def send(self, drafts: Sequence[Draft], wait: float) -> Future[Position]:
        """Publishes; the future has the position of the last, when no later reader can miss any of them.

        It fails with BrokerUnavailable after ``wait`` seconds. Raises Overloaded when too many messages wait already.
        """
        end = self._publish_here(drafts)
        if end is None:
            assert self._outbox is not None
            return self._outbox.put(drafts, wait)
        done: Future[Position] = Future()
        done.set_result(end)
        return done

    def _publish_here(self, drafts: Sequence[Draft]) -> Position | None:
        """None where a broker numbers the messages, or the process that has taken over."""
        if self._outbox is not None:
            return None
        with self._telling:
            with self._lock:
                if self._outbox is not None:
                    return None
                messages, end = self._number(drafts), self._logs.end
            self._tell(messages)
        return end

    def _number(self, drafts: Sequence[Draft]) -> list[Message]:
        assert self._memory is not None
        messages = self._memory.number(drafts)
        self._append(messages)
        return messages

    def listen(self, channel: Channel, listener: Listener) -> None:
        """Has ``listener`` called with each message of an internal channel, from any process, as it is delivered.

        In any thread; it has to be quick, and the channel's readers are woken after it.
        """
        _, listeners = self._listeners.setdefault(channel.name, (channel.limits, []))
        listeners.append(listener)

    def unlisten(self, channel: Channel, listener: Listener) -> None:
        """Undoes `listen`."""
        self._listeners[channel.name][1].remove(listener)

    def _append(self, messages: Iterable[Message]) -> None:
        for message in messages:
            self._logs.append(self._limits(message.channel), message)
            if message.channel == REVOKED.name:
                self._remember_revocation(message)

    def _limits(self, name: str) -> Limits:
        internal = self._listeners.get(name)
        return channels.limits(name) if internal is None else internal[0]

    def _tell(self, messages: Sequence[Message]) -> None:
        for message in messages:
            for listener in self._listeners.get(message.channel, (None, ()))[1]:
                try:
                    listener(message)
                except Exception:
                    logger.exception("A listener to %r failed", message.channel)
            if message.channel.endswith(channels.COMPANION):
                self.presence.hear_state(message)
        self.waiters.notify({message.channel for message in messages})

    # Reading

    async def ready(self) -> None:
        """Returns once the logs stand at some end of the broker's. Raises BrokerUnavailable if that takes too long."""
        if self._begun.is_set():
            return
        self.start()
        deadline = time.monotonic() + Broker.TIMEOUT
        while not self._begun.is_set():
            if self.broker is not None and time.monotonic() > deadline:
                raise self._unavailable()
            await asyncio.sleep(0.02)

    @property
    def is_ready(self) -> bool:
        return self._begun.is_set()

    def present(self) -> Position:
        """Where a reader stands that wants what comes from now on. Asks the broker where this process does not follow it.

        Blocks then; on an event loop that is not `ready` yet it raises BrokerUnavailable instead.
        """
        if self._begun.is_set():
            with self._lock:
                return self._logs.end
        if asyncio._get_running_loop() is not None:
            raise BrokerUnavailable(
                "This process does not follow the COMET broker yet: await comet.ready() before."
            )
        if self.broker is not None:
            return self.broker.head()
        self._begun.wait()
        return self.present()

    async def read(self, since: Mapping[Channel, Position]) -> Reading:
        """What came after the given positions. Waits for nothing but the first `begin`.

        The broker is asked for what is ``missing``; when it has answered, or could not, the readers of that channel are
        woken. Until then they stand where they stood, as if there were nothing new.
        """
        await self.ready()
        with self._lock:
            reading = self._read_logs(since)
            if reading.missing:
                for channel in since:
                    if channel.name in reading.missing:
                        self._begin_fetch(channel)
        return reading

    def _read_logs(self, since: Mapping[Channel, Position]) -> Reading:
        """One reading for all of a crowd that stand in the same place: nobody may change it."""
        config = get_config().COMET
        count, size = config.MESSAGES_PER_ANSWER, config.BYTES_PER_ANSWER
        now = time.monotonic()
        # What lies between two positions never changes: it is only forgotten, and that may be a moment later.
        asked = tuple(since.items()), self._logs.end, count, size
        reading, until = self._readings.get(asked, (None, 0.0))
        if reading is None or now >= until:
            reading = self._logs.read(since, now=now, count=count, size=size)
            if len(self._readings) >= READINGS:
                self._readings.clear()
            if not reading.missing:
                self._readings[asked] = reading, now + READING_LASTS
        return reading

    def _begin_fetch(self, channel: Channel) -> None:
        """One for all readers that come back to a channel at once, wherever they stood."""
        if channel.name not in self._fetches and not self._stopping.is_set():
            self._fetchers.submit(self._run_fetch, channel)
            self._fetches.add(channel.name)

    def _run_fetch(self, channel: Channel) -> None:
        try:
            self._fetch(channel)
        except BrokerUnavailable as error:
            self._pause_fetches(error)
        except Exception as error:
            logger.exception("Fetching %r from the COMET broker failed", channel.name)
            self._pause_fetches(BrokerUnavailable(str(error)))
        finally:
            with self._lock:
                self._fetches.discard(channel.name)
            self.waiters.notify({channel.name})

    def _fetch(self, channel: Channel) -> None:
        assert self.broker is not None
        with self._lock:
            asked = self._logs.end
        backlog = self.broker.backlog(channel)
        with self._lock:
            self._logs.fill(channel, backlog, asked, time.monotonic())
        self._fetch_pause = FIRST_PAUSE
        self._report("backlog", None)

    def _pause_fetches(self, error: BrokerUnavailable) -> None:
        """In its thread: woken readers ask again at once."""
        self._report("backlog", error)
        pause = self._fetch_pause
        self._fetch_pause = min(pause * 2, LAST_PAUSE)
        self._stopping.wait(random.uniform(pause / 2, pause))

    # Revoking

    def revoked(self, granted: Iterable[tuple[str, Position]]) -> set[str]:
        """The channels for which a grant has ended that was given when the logs stood there."""
        with self._lock:
            return {name for name, position in granted if self._is_revoked(name, position)}

    def _is_revoked(self, name: str, granted: Position) -> bool:
        if granted.epoch != self._logs.epoch:
            return True
        if granted.offset >= self._last_revocation:
            return False
        # Who may not read a channel may not read who is there.
        names = name, name.removesuffix(channels.COMPANION)
        return any(granted.offset < self._revoked.get(it, self._revoked_floor) for it in names)

    def _remember_revocation(self, message: Message) -> None:
        """In one step with its append: no reader has what was published after it, and does not know of it."""
        name = str(message.data)
        self._revoked[name] = self._last_revocation = message.offset
        self._revoked.move_to_end(name)
        if len(self._revoked) > REVOCATIONS:
            self._revoked_floor = self._revoked.popitem(last=False)[1]

    def _tell_revocation(self, message: Message) -> None:
        name = str(message.data)
        self.waiters.notify({name, name + channels.COMPANION})

    def _remember_revocations(self, floor: int, messages: Iterable[Message]) -> None:
        self._revoked.clear()
        self._revoked_floor = self._last_revocation = floor
        for message in messages:
            self._remember_revocation(message)

    def members(self, name: str) -> list[Member]:
        """Who follows a presence channel: as this process hears, or else as its companion has told last."""
        if self.presence.takes_part:
            return self.presence.members(name)
        assert self.broker is not None
        if asyncio._get_running_loop() is not None:
            raise BrokerUnavailable(
                "This process does not hear who is present: ask for it in a thread, not on the event loop."
            )
        companion = channels.resolve(name + channels.COMPANION).channel
        told = self.broker.backlog(companion).messages[-1:]
        return [Member(**member) for message in told for member in message.data["members"]]

    # The broker's tail

    def start(self) -> None:
        """Follows the broker from now on; needs doing once, and does not wait."""
        if self.broker is None:
            return
        with self._lock:
            if self._tail is None and not self._stopping.is_set():
                self._tail = threading.Thread(
                    target=self._follow, name="tornjango-comet", daemon=True
                )
                self._tail.start()

    def _follow(self) -> None:
        assert self.broker is not None
        while not self._stopping.is_set():
            try:
                self.broker.tail(self)
            except BrokerUnavailable as error:
                self._report("tail", error)
            except ConfigurationError as error:
                self._report("tail", BrokerUnavailable(str(error)))
            except Exception as error:
                logger.exception("Following the %s broker failed", self.broker.name)
                self._report("tail", BrokerUnavailable(str(error)))
            pause = self._tail_pause
            self._tail_pause = min(pause * 2, LAST_PAUSE)
            self._stopping.wait(random.uniform(pause / 2, pause))

    @property
    def lost(self) -> tuple[str, float] | None:
        """Why the broker cannot be reached, and since when (of the monotonic clock); None while it can."""
        with self._lock:
            return next(iter(self._losses.values()), None)

    def _report(self, part: str, error: BrokerUnavailable | None) -> None:
        """Of the tail, the outbox and what is fetched each has connections of its own: lost is what one of them has lost."""
        assert self.broker is not None
        with self._lock:
            first = not self._losses
            if error is not None:
                self._losses.setdefault(part, (str(error), time.monotonic()))
                loss = None
            else:
                loss = self._losses.pop(part, None)
            last = not self._losses
        if error is not None and first:
            logger.error(
                "COMET has lost the %s broker; readers wait until it is back. %s",
                self.broker.name,
                error,
            )
        if loss is not None and last:
            away = time.monotonic() - loss[1]
            logger.warning("COMET has the %s broker back, after %.1f s", self.broker.name, away)

    def _known(self) -> Position | None:
        """What the tail has brought, or the outbox has stored, whichever is newer: both have been shown to somebody."""
        assert self._outbox is not None
        end, stored = self.end, self._outbox.stored
        if end is None or (stored is not None and stored.epoch == end.epoch):
            return max(filter(None, (end, stored)), default=None)
        return end

    def _unavailable(self) -> BrokerUnavailable:
        assert self.broker is not None
        lost = self.lost
        reason = "It has not answered yet." if lost is None else lost[0]
        return BrokerUnavailable(f"The {self.broker.name} broker is not there. {reason}")

    # What it is to the tail: a Sink

    @property
    def end(self) -> Position | None:
        with self._lock:
            return self._logs.end if self._begun.is_set() else None

    def begin(self, end: Position) -> None:
        assert self.broker is not None
        revocations = self.broker.backlog(REVOKED)
        with self._lock:
            epoch = self._logs.epoch
            self._logs.restart(end)
            self._remember_revocations(revocations.floor, revocations.messages)
        self._begun.set()
        if channels.has_presence():
            farewells = self.broker.backlog(FAREWELLS).messages
            self.presence.begin(farewells, anew=epoch != end.epoch)
        # Whoever is parked stands somewhere else now.
        self.waiters.notify(None)

    def deliver(self, messages: Sequence[Message]) -> None:
        if messages:
            self.lag = max(time.monotonic() - messages[-1].published, 0.0)
        with self._lock:
            self._append(messages)
        self._tell(messages)

    def connected(self) -> None:
        self._tail_pause = FIRST_PAUSE
        # Before the broker counts as back: else the others would be gone that could not be heard.
        self.presence.resume()
        self._report("tail", None)

    @property
    def stopped(self) -> bool:
        return self._stopping.is_set()

    # The memory's, where one process takes over from another

    def hand_over(self, line: socket.socket) -> None:
        """Gives all there is to the process at the other end, which numbers from now on what is published here, too."""
        self.presence.close(self.waiters.spread())
        with self._lock:
            self._successor = Successor(line, self._logs.snapshot())
            self._outbox = Outbox(
                self._successor,
                most=self._config.PUBLISH_QUEUE,
                known=lambda: None,
                report=lambda error: None,
            )

    def expect(self, line: socket.socket) -> None:
        """Has readers wait until the process at the other end has handed over what it has, or has not."""
        self._begun.clear()
        Inheritance(line, self._inherit, lambda drafts: self.send(drafts, 0).result())

    def save(self, path: str) -> None:
        """As `hand_over`, to a process that comes later."""
        self.presence.close(self.waiters.spread())
        with self._lock, open(path, "wb") as file:
            write(self._logs.snapshot(), file)

    def load(self, path: str) -> None:
        """What `save` has written, once, if it has."""
        with suppress(FileNotFoundError), open(path, "rb") as file:
            os.unlink(path)
            self._inherit(read(file))

    def _inherit(self, snapshot: Snapshot | None) -> None:
        if snapshot is not None:
            with self._lock:
                assert self._memory is not None
                meanwhile = [
                    it for _, _, messages in self._logs.snapshot().channels for it in messages
                ]
                self._logs.restore(snapshot, self._limits)
                self._memory.end = snapshot.end
                for name, floor, messages in snapshot.channels:
                    if name == REVOKED.name:
                        self._remember_revocations(floor, messages)
                meanwhile.sort(key=attrgetter("offset"))
                self._number([self._draft_again(message) for message in meanwhile])
            for name, _, messages in snapshot.channels:
                if name == FAREWELLS.name:
                    self.presence.hear_all(messages)
        self._begun.set()
        self.waiters.notify(None)

    def _draft_again(self, message: Message) -> Draft:
        channel = Channel(message.channel, self._limits(message.channel))
        return Draft(channel, message.body, message.audience)

    # Its end

    @property
    def has_threads(self) -> bool:
        return self._outbox is not None or self._tail is not None

    def close(self, wait: float) -> None:
        """Publishes what waits to be, for as many seconds, and follows the broker no longer."""
        self.presence.close(self.waiters.spread(), silently=not wait)
        with self._lock:
            self._stopping.set()
        if self._outbox is not None and (left := self._outbox.close(wait)):
            logger.error("%d messages were not published: the broker does not take them", left)
        # What the broker is being asked takes its TIMEOUT at most, all of it at the same time.
        self._fetchers.shutdown(wait=True, cancel_futures=True)
        if self._tail is not None:
            self._tail.join(Broker.TIMEOUT)
        if self.broker is not None:
            self.broker.close()
        if self._successor is not None:
            self._successor.close()

    def status(self) -> dict[str, Any]:
        """Numbers of this process: broker, channels, messages and bytes kept, published in all, polls parked."""
        with self._lock:
            numbers = self._logs.status()
        lost = self.lost
        return {
            "broker": brokers.MEMORY if self.broker is None else self.broker.name,
            **numbers,
            "parked": self.waiters.count(),
            "readers": self.waiters.transports(),
            "unpublished": 0 if self._outbox is None else self._outbox.waiting,
            "lag": round(self.lag, 4),
            "lost": 0.0 if lost is None else time.monotonic() - lost[1],
        }

    def newest(self, most: int) -> list[dict[str, Any]]:
        """The channels with the newest messages: readers here, messages in the last minute, bytes, seconds since the last."""
        now = time.monotonic()
        with self._lock:
            found = [
                (name, log.count_since(now - MINUTE), log.size, now - log.touched)
                for name, log in self._logs.newest(most + len(self._listeners))
            ]
        return [
            {
                "name": name,
                "readers": self.waiters.count_of(name),
                "rate": rate,
                "bytes": size,
                "age": round(age, 1),
            }
            for name, rate, size, age in found
            if not name.startswith(channels.INTERNAL)
        ][:most]


_hub: tuple[object, Hub] | None = None
_making = threading.Lock()


def get_hub() -> Hub:
    """The process's hub, made at first use, and anew when the settings name another broker (in tests)."""
    global _hub
    config = get_config()
    key = brokers.key(config)
    if _hub is not None and _hub[0] == key:
        return _hub[1]
    with _making:
        if _hub is not None and _hub[0] != key:
            _hub[1].close(0)
            _hub = None
        if _hub is None:
            _hub = key, Hub(config.COMET, brokers.make(config))
        return _hub[1]


def close(wait: float) -> None:
    """Ends what the process's hub does in threads; the memory's logs stay."""
    global _hub
    with _making:
        if _hub is not None and _hub[1].has_threads:
            _hub[1].close(wait)
            _hub = None


async def aclose(wait: float) -> None:
    """As `close`, beside the event loop; not in a worker, for those may all be busy."""
    if _hub is not None:
        _hub[1].presence.timer.stop()
    if _hub is None or not _hub[1].has_threads:
        return
    closed: Future[None] = Future()

    def run() -> None:
        try:
            close(wait)
        except Exception as error:  # noqa: BLE001 - raised where it is awaited
            closed.set_exception(error)
        else:
            closed.set_result(None)

    threading.Thread(target=run, name="tornjango-close", daemon=True).start()
    await asyncio.shield(asyncio.wrap_future(closed))


def _forget() -> None:
    global _hub, _making
    _hub, _making = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    # Two processes that went on numbering under one epoch would take each other's cursors for their own.
    os.register_at_fork(after_in_child=_forget)
