"""The clients that park: ``python -m bench.pollers`` with :class:`Polls` as JSON on the first line of stdin.

Each further line is a command, answered with a line of JSON: ``park`` (every connection sends a poll), ``publish``
(returns when every poll has its answer), ``hang up`` (closes all). Connections stay open between polls.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from collections.abc import Awaitable, Callable
from urllib.parse import quote

from bench.wire import Answer, WireError, parse, request_bytes

# The kernel has some 28,000 ports for one source address.
PER_ADDRESS = 10_000
CONNECTING_AT_ONCE = 100
TIMEOUT = 120.0


@dataclasses.dataclass(frozen=True)
class Polls:
    port: int
    count: int
    cursor: str
    poll: str
    """The path, with the cursor to come at its end."""
    publish: str
    aside: str = ""
    """The path of a poll on another channel, its cursor to come at its end; empty where there are no channels."""
    aside_cursor: str = ""
    publish_aside: str = ""
    greet: str = ""
    """A path that is answered at once."""


class Poller(asyncio.Protocol):
    """One connection, with at most one poll under way."""

    transport: asyncio.Transport

    def __init__(self, fleet: Fleet | None) -> None:
        self.fleet = fleet
        self.buffer = b""
        self.answer: Answer | None = None
        self.answered: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def send(self, path: str) -> None:
        self.answer = None
        self.transport.write(request_bytes(path))

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        self.answer = parse(self.buffer)
        if self.answer:
            self.buffer = b""
            if self.fleet:
                self.fleet.answered()
            elif self.answered and not self.answered.done():
                self.answered.set_result(self.answer)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.fleet:
            self.fleet.lost(exc)


class Fleet:
    """All the connections, and the one that publishes."""

    def __init__(self, polls: Polls) -> None:
        self.polls = polls
        self.pollers: list[Poller] = []
        self.cursor = polls.cursor
        self.aside_cursor = polls.aside_cursor
        #: What tornjango gives besides, and wants to see again: the clients all look alike to it.
        self.grant = ""
        self.missing = 0
        self.leaving = False
        self.all_answered: asyncio.Future[None] | None = None

    async def park(self) -> dict[str, object]:
        if not self.pollers:
            limit = asyncio.Semaphore(CONNECTING_AT_ONCE)
            await asyncio.gather(*(self._connect(n, limit) for n in range(self.polls.count)))
        self.missing = len(self.pollers)
        self.all_answered = asyncio.get_running_loop().create_future()
        grant = f"&grant={quote(self.grant)}" if self.grant else ""
        for poller in self.pollers:
            poller.send(self.polls.poll + quote(self.cursor) + grant)
        return {"parked": self.missing}

    async def _connect(self, number: int, limit: asyncio.Semaphore) -> None:
        source = (f"127.0.0.{2 + number // PER_ADDRESS}", 0)
        async with limit:
            _, poller = await asyncio.get_running_loop().create_connection(
                lambda: Poller(self), "127.0.0.1", self.polls.port, local_addr=source
            )
        self.pollers.append(poller)

    async def publish(self) -> dict[str, object]:
        """Seconds from the publisher's request to the last poll's answer, and to that of a message published right after it,
        to a reader of another channel."""
        loop = asyncio.get_running_loop()
        if self.all_answered is None or self.missing != len(self.pollers):
            raise WireError(f"{len(self.pollers) - self.missing} polls were answered before time")
        _, publisher = await loop.create_connection(
            lambda: Poller(None), "127.0.0.1", self.polls.port
        )
        aside = await self._aside() if self.polls.aside else None
        start = loop.time()
        publisher.send(self.polls.publish)
        async with asyncio.timeout(TIMEOUT):
            aside_at = await aside() if aside is not None else start
            await self.all_answered
        seconds = loop.time() - start
        publisher.transport.close()
        self._check()
        return {"seconds": seconds, "aside": aside_at - start}

    async def _aside(self) -> Callable[[], Awaitable[float]]:
        """Has a poll on another channel wait. The function publishes there, and tells when the poll was answered."""
        loop = asyncio.get_running_loop()
        reader, publisher = [
            (await loop.create_connection(lambda: Poller(None), "127.0.0.1", self.polls.port))[1]
            for _ in range(2)
        ]
        reader.answered, publisher.answered = loop.create_future(), loop.create_future()
        reader.send(self.polls.aside + quote(self.aside_cursor))
        # The server takes what comes in order, and so has the poll when it has answered something else.
        publisher.send(self.polls.greet)
        await publisher.answered

        async def publish() -> float:
            publisher.send(self.polls.publish_aside)
            assert reader.answered is not None
            answer = await reader.answered
            now = loop.time()
            self.aside_cursor = json.loads(answer.body)["cursor"]
            for poller in (reader, publisher):
                poller.transport.close()
            return now

        return publish

    def _check(self) -> None:
        answers = [json.loads(body) for body in {self._body(it.answer) for it in self.pollers}]
        # Grants say when they were given.
        self.grant = [answer.pop("grant", self.grant) for answer in answers][-1]
        answer = answers[0]
        # A reader that is answered later may stand further: behind what another channel was told meanwhile.
        told = [{**each, "cursor": "", "at": {}} for each in answers]
        if any(other != told[0] for other in told):
            shown = "; ".join(str(each)[:300] for each in answers[:3])
            raise WireError(f"polls of one channel have {len(answers)} different answers: {shown}")
        if len(answer["messages"]) != 1 or "something happened" not in json.dumps(answer):
            raise WireError(f"a poll's answer is not the one message: {answer}")
        self.cursor = answer["cursor"]

    def _body(self, answer: Answer | None) -> bytes:
        if answer is None or answer.status != 200 or not answer.keep_alive:
            raise WireError(f"a poll is answered {answer}")
        return answer.body

    async def hang_up(self) -> dict[str, object]:
        self.leaving = True
        for poller in self.pollers:
            poller.transport.close()
        return {"hung up": len(self.pollers)}

    def answered(self) -> None:
        self.missing -= 1
        if not self.missing and self.all_answered and not self.all_answered.done():
            self.all_answered.set_result(None)

    def lost(self, exc: Exception | None) -> None:
        if not self.leaving and self.all_answered and not self.all_answered.done():
            self.all_answered.set_exception(WireError(f"a connection broke: {exc or 'closed'}"))


async def main() -> None:
    loop = asyncio.get_running_loop()
    fleet = Fleet(Polls(**json.loads(sys.stdin.readline())))
    commands = {"park": fleet.park, "publish": fleet.publish, "hang up": fleet.hang_up}
    while command := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
        try:
            answer = await commands[command]()
        except TimeoutError:
            answer = {"error": f"{fleet.missing} polls had no answer in {TIMEOUT:.0f} s"}
        except (WireError, OSError, ValueError, KeyError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
