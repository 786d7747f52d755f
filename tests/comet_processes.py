"""Hubs, each of which is to the others as a process is, and readers of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from django.http import HttpRequest

from tests import comet_channels  # noqa: F401 (declares the channels)
from tests.loopback_broker import LoopbackBroker
from tornjango.comet import channels
from tornjango.comet.brokers.base import Broker, Draft
from tornjango.comet.hub import Hub
from tornjango.comet.log import Audience, Backlog, Channel, Position
from tornjango.comet.readers import Answer, Reader
from tornjango.conf import get_config

PATIENCE = 20.0


def channel(name: str) -> Channel:
    return channels.resolve(name).channel


def draft(name: str, value: object, audience: Audience | None = None) -> Draft:
    body = json.dumps({"channel": name, "event": None, "data": value}).encode()
    return Draft(channel(name), body, audience)


def publish(hub: Hub, *drafts: Draft) -> Position:
    return hub.send(drafts, PATIENCE).result(PATIENCE)


def data(answer: Answer) -> list[Any]:
    return [message.data for message in answer.messages]


@contextmanager
def started(*brokers: Broker) -> Iterator[list[Hub]]:
    """Processes that follow their brokers."""
    hubs = [Hub(get_config().COMET, broker) for broker in brokers]
    for hub in hubs:
        hub.start()
    try:
        yield hubs
    finally:
        for hub in hubs:
            hub.close(0)


async def reader_at(
    hub: Hub, cursor: str | None, *names: str, request: HttpRequest | None = None, **options: Any
) -> Reader:
    reader = Reader(request, transport="poll", **options)
    reader.hub = hub
    await reader.follow(names, cursor)
    return reader


async def cursor_of(hub: Hub, *names: str) -> str:
    return (await reader_at(hub, None, *names)).cursor


class FaultyBroker(LoopbackBroker):
    """A process's way to a `LoopbackServer` on which anything may happen."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        #: What is raised instead of the next calls' answers, by method; one for each call.
        self.errors: dict[str, list[Exception]] = {"append": [], "tail": [], "backlog": []}
        #: What fetched channels have, before it is answered: a test may hold it back.
        self.held = threading.Event()
        self.held.set()
        self.asked = threading.Semaphore(0)
        self.fetched: list[str] = []
        self.batches: list[bytes] = []
        self.appended = threading.Semaphore(0)

    def _fail(self, method: str) -> None:
        if self.errors[method]:
            raise self.errors[method].pop(0)

    def append(self, batch: bytes, drafts: Sequence[Draft], known: Position | None) -> Position:
        self.batches.append(batch)
        self.appended.release()
        self._fail("append")
        return super().append(batch, drafts, known)

    def tail(self, sink: Any) -> None:
        self._fail("tail")
        super().tail(sink)

    def backlog(self, channel: Channel) -> Backlog:
        if channel.name.startswith(channels.INTERNAL):
            return super().backlog(channel)
        self.fetched.append(channel.name)
        self._fail("backlog")
        backlog = super().backlog(channel)
        self.asked.release()
        assert self.held.wait(PATIENCE)
        return backlog


def in_threads(*calls: Callable[[], object]) -> None:
    """All at once; returns when all have, and raises what one of them has raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], object]) -> None:
        try:
            start.wait(PATIENCE)
            call()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=[call]) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
