"""Follows channels of a tornjango site from another program: a worker, a script, a display. It needs no settings.

    async for event in Client("https://example.com/comet/").follow("room:7"):
        if isinstance(event, Gap): ...  # messages were lost: fetch the room's state afresh
        else: print(event.data)

The same with a plain ``for``, where no event loop runs. It polls, which gets through whatever proxy there is.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest, HTTPResponse
from tornado.simple_httpclient import HTTPTimeoutError

from tornjango.exceptions import CometError

__all__ = ["Client", "Following", "Gap", "Message", "Refused"]

logger = logging.getLogger("tornjango.comet.client")

# Seconds; of the pause after the first failure, and of the longest.
FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0

# Some proxies take no longer line; a form has no such bound.
LONGEST_QUERY = 1500

# Statuses below 500 that pass by themselves.
PASSING = frozenset({408, 425, 429})


@dataclass(frozen=True, slots=True)
class Message:
    """One published message, as its publisher gave it."""

    channel: str
    data: Any
    event: str | None = None


@dataclass(frozen=True, slots=True)
class Gap:
    """In place of messages that were missed for good: fetch the channel's state afresh."""

    channel: str


class Refused(CometError):
    """The site does not take a request, and would not if it came again; ``status`` is its answer's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Unanswered(Exception):
    """What may pass: the network, or a server in trouble, which may say when to come back, in seconds."""

    def __init__(self, message: str, retry_after: float = 0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Client:
    """A site's channels, at the address where its project has ``tornjango.comet.urls``."""

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        cookies: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> None:
        """``headers`` (``Authorization``) and ``cookies`` (``sessionid``) go with every request: they say who this is.

        ``timeout`` is in seconds: more than the site's ``POLL_TIMEOUT``. Raises ValueError for a URL without a scheme.
        """
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is no address: it begins with http:// or https://.")
        self.url = url.rstrip("/") + "/"
        self._headers = dict(headers or {})
        self._cookies = dict(cookies or {})
        self._timeout = timeout

    def follow(self, *channels: str, cursor: str | None = None) -> Following:
        """What is published to these channels, from ``cursor`` on, or from now: see `Following`. Nothing is sent yet."""
        return Following(self, channels, cursor)

    async def publish(self, channel: str, data: Any, event: str | None = None) -> None:
        """Publishes where the channel lets clients; returns when no later reader can miss the message.

        Raises Refused, and ConnectionError where the site cannot be reached or is in trouble: the message may be out, or
        not, so nothing is sent again.
        """
        body = json.dumps({"channel": channel, "event": event, "data": data})
        # Django compares a cookie with a header: that a client can set both shows that it is no page of another site.
        token = self._cookies.get("csrftoken") or secrets.token_hex(16)
        cookies = self._cookies | {"csrftoken": token}
        headers = {"Content-Type": "application/json", "X-CSRFToken": token, "Referer": self.url}
        try:
            await self._fetch("publish/", "POST", body, headers=headers, cookies=cookies)
        except _Unanswered as error:
            raise ConnectionError(f"Publishing to {channel!r} has failed: {error}") from error

    async def poll(self, fields: list[tuple[str, str]]) -> dict[str, Any]:
        query = urlencode(fields)
        if len(query) > LONGEST_QUERY:
            form = {"Content-Type": "application/x-www-form-urlencoded"}
            return await self._fetch("poll/", "POST", query, headers=form)
        return await self._fetch(f"poll/?{query}")

    async def _fetch(
        self,
        path: str,
        method: str = "GET",
        body: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        cookies: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The JSON object that is answered. Raises Refused and _Unanswered."""
        sent = {"Accept": "application/json", **self._headers, **(headers or {})}
        if shown := self._cookies if cookies is None else cookies:
            sent["Cookie"] = "; ".join(f"{name}={value}" for name, value in shown.items())
        request = HTTPRequest(
            self.url + path,
            method,
            sent,
            body,
            connect_timeout=self._timeout,
            request_timeout=self._timeout,
        )
        # Its own: the loop's shared one makes ten requests at a time, and polls are long.
        client = AsyncHTTPClient(force_instance=True)
        try:
            response = await client.fetch(request, raise_error=False)
        except (HTTPTimeoutError, HTTPClientError, OSError) as error:
            raise _Unanswered(f"{self.url} cannot be reached: {error}") from error
        finally:
            client.close()
        return self._read(response)

    def _read(self, response: HTTPResponse) -> dict[str, Any]:
        try:
            answer = json.loads(response.body)
        except ValueError:
            answer = None
        reason = answer.get("error") if isinstance(answer, dict) else None
        told = f"{self.url} answers {response.code}: {reason or response.reason}"
        if response.code >= 500 or response.code in PASSING:
            raise _Unanswered(told, _seconds(response.headers.get("Retry-After")))
        if response.code != 200:
            raise Refused(told, response.code)
        if not isinstance(answer, dict):
            raise _Unanswered(
                f"{self.url} answers what is no JSON: is this where the channels are?"
            )
        return answer


class Following:
    """An iterator, async or plain, over what comes: each `Message` of the channels, in order and once, and each `Gap`.

    It ends only with Refused, where the site says no. While it cannot be reached, it tries again: after pauses that grow,
    up to half a minute, at random, or as the site asks; that is logged. ``cursor`` is where to go on after what it has
    given last; keep it, to miss nothing from one run of a program to the next. It stands after a whole answer: whoever
    stops in the middle of one has a few messages twice.
    """

    def __init__(self, client: Client, channels: tuple[str, ...], cursor: str | None) -> None:
        self.cursor = cursor
        self._client = client
        self._channels = channels
        self._grant: str | None = None
        self._name = secrets.token_urlsafe(12)
        self._failures = 0
        self._lost: list[str] = []

    async def __aiter__(self) -> AsyncIterator[Message | Gap]:
        while True:
            try:
                answer = await self._ask()
            except _Unanswered as error:
                await self._pause(error)
                continue
            self._failures = 0
            self._grant = answer.get("grant", self._grant)
            events = self._events(answer)
            for event in events[:-1]:
                yield event
            self.cursor = answer["cursor"]
            for event in events[-1:]:
                yield event
            await asyncio.sleep(answer["retry"] / 1000)

    def __iter__(self) -> Iterator[Message | Gap]:
        """On an event loop of its own, in this thread. Raises RuntimeError where one runs."""
        if asyncio._get_running_loop() is not None:
            raise RuntimeError("A running event loop cannot wait for another: use async for.")
        with asyncio.Runner() as runner:
            events = aiter(self)

            async def step() -> Message | Gap:
                return await anext(events)

            while True:
                yield runner.run(step())

    async def _ask(self) -> dict[str, Any]:
        try:
            return await self._client.poll(self._fields())
        except Refused as error:
            if error.status != 400 or self.cursor is None:
                raise
        # The cursor is of another time (a changed secret key), unless the site says the same without it.
        cursor, self.cursor, self._grant = self.cursor, None, None
        try:
            answer = await self._client.poll(self._fields())
        except (Refused, _Unanswered):
            self.cursor = cursor
            raise
        self._lost = list(self._channels)
        return answer

    def _fields(self) -> list[tuple[str, str]]:
        fields = [("channel", channel) for channel in self._channels] + [("client", self._name)]
        given = {"cursor": self.cursor, "grant": self._grant}
        return fields + [(name, value) for name, value in given.items() if value]

    def _events(self, answer: dict[str, Any]) -> list[Message | Gap]:
        lost, self._lost = self._lost, []
        gaps = [Gap(channel) for channel in dict.fromkeys([*lost, *answer["gaps"]])]
        return [*gaps, *(Message(**message) for message in answer["messages"])]

    async def _pause(self, error: _Unanswered) -> None:
        # Full jitter: clients that lost a server together do not come back together.
        longest = min(LONGEST_DELAY, FIRST_DELAY * 2**self._failures)
        pause = error.retry_after + random.uniform(0, longest)
        self._failures += 1
        logger.warning("%s Trying again in %.1f s.", error, pause)
        await asyncio.sleep(pause)


def _seconds(retry_after: str | None) -> float:
    """RFC 9110, 10.2.3; a date is not what tornjango sends."""
    return float(retry_after) if retry_after and retry_after.isdecimal() else 0.0
