"""The WebSocket transport: follow, leave and publish on one socket, in JSON; the answers are those of the other transports.

From the client:  {"follow": [names], "cursor": "..", "grant": ".."}    {"leave": [names]}
                  {"publish": {"channel": "..", "event": "..", "data": ..}, "id": 1}
From the server:  answers, one at once after each follow      {"error": "..", "status": 403, "channels": [names]}
                  {"published": 1}                           {"error": "..", "status": 403, "published": 1}

Two tasks have the socket: one reads and obeys, one delivers what the log has. Neither waits for the other: messages go on
while an authoriser thinks. A client that is slow to take an answer finds the next ones in the log, so at most one answer
waits for it; a client that sends much is read slowly. What closes a socket is in `Close`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.views.decorators.csrf import csrf_exempt

from tornjango import websockets
from tornjango.comet.clients import ROOM, Refusal, checked, load_json, publish_for, refusal
from tornjango.comet.readers import Reader
from tornjango.comet.views import in_no_transaction, refuse
from tornjango.conf import get_config
from tornjango.exceptions import BrokerUnavailable, ChannelForbidden, CometError
from tornjango.rates import Bucket
from tornjango.websockets import WebSocket, WebSocketClosedError

logger = logging.getLogger("tornjango.comet")

#: Frames a client may send in a second, of whatever kind: more are read later.
FRAMES_PER_SECOND = 50

#: Frames that say nothing, or nonsense, before the socket is closed.
MISTAKES = 5

#: What a client may call a message it publishes, in characters.
MAX_ID_LENGTH = 64

# Sockets that were opened together should not all speak together.
_EARLIEST_HEARTBEAT = 0.8


class Close(IntEnum):
    """RFC 6455, 7.4, and the registry that it begins; 1009, for a frame that is too large, is the protocol's own."""

    TEXT_ONLY = 1003
    MISUSED = 1008
    STOPPING = 1012
    LATER = 1013
    SUPERSEDED = 4000


@in_no_transaction
@csrf_exempt  # a GET, of which the origin is checked
async def socket(request: HttpRequest) -> HttpResponse:
    """The WebSocket: ``channel``, ``cursor``, ``grant`` and ``client`` in the query are a first follow.

    What is wrong with those is told over the socket, for pages do not see why a handshake failed.
    """
    try:
        conversation = Conversation(request)
    except CometError as error:
        return refuse(error.status, str(error))
    request.heeds_drain = True  # type: ignore[attr-defined]
    return websockets.accept(
        request,
        conversation.talk,
        max_message=get_config().COMET.MAX_MESSAGE + ROOM,
        frames_per_second=FRAMES_PER_SECOND,
        ping=0,
    )


class _Mistake(Exception):
    """A frame that makes no sense."""


_COMMANDS = {"follow": {"cursor", "grant"}, "leave": set[str](), "publish": {"id"}}


class Conversation:
    """One client, as long as its socket is open."""

    #: For the watchdog: whose the task is that delivers.
    view_name = f"{__name__}.socket"

    def __init__(self, request: HttpRequest) -> None:
        """Raises CometError for a ``client`` that is too long."""
        asked = request.GET
        self._request = request
        self._reader = Reader(
            request, transport="websocket", grant=asked.get("grant"), client=asked.get("client")
        )
        self._first: dict[str, Any] = {}
        if names := asked.getlist("channel"):
            self._first = {"follow": names, "cursor": asked.get("cursor")}
        most = get_config().COMET.CHANNELS_PER_CLIENT
        # As often as a client that comes back again and again could have its authorisers asked by other transports.
        self._changes = Bucket(most, 2 * most)
        self._mistakes = 0

    async def talk(self, socket: WebSocket) -> None:
        async with asyncio.TaskGroup() as tasks:
            delivery = tasks.create_task(self._deliver(socket))
            await self._listen(socket)
            delivery.cancel()

    # What comes from the client

    async def _listen(self, socket: WebSocket) -> None:
        if self._first:
            await self._hear(socket, lambda: self._first)
        async for frame in socket:
            if isinstance(frame, bytes):
                socket.close(Close.TEXT_ONLY, "Frames are text here: JSON.")
                return
            await self._hear(socket, partial(_command, frame))

    async def _hear(self, socket: WebSocket, read: Callable[[], dict[str, Any]]) -> None:
        try:
            await self._obey(socket, read())
        except _Mistake as mistake:
            await self._tell(socket, Refusal(400, str(mistake)))
            self._mistakes += 1
            if self._mistakes == MISTAKES:
                socket.close(Close.MISUSED, f"{MISTAKES} frames made no sense.")

    async def _obey(self, socket: WebSocket, command: dict[str, Any]) -> None:
        if "publish" in command:
            await self._publish(socket, command["publish"], _id(command))
        elif "follow" in command:
            await self._follow(socket, _names(command["follow"]), command)
        else:
            names = _names(command["leave"])
            await self._pace(names)
            self._reader.leave(names)

    async def _follow(self, socket: WebSocket, names: list[str], command: dict[str, Any]) -> None:
        cursor, grant = _text(command, "cursor"), _text(command, "grant")
        await self._pace(names)
        try:
            await self._reader.follow(names, cursor, grant)
        except Exception as error:  # noqa: BLE001  also the project's, which end no socket
            await self._tell(socket, self._refusal(error), channels=names)
        else:
            self._reader.prompt()

    async def _publish(self, socket: WebSocket, message: Any, name: int | str | None) -> None:
        try:
            await publish_for(self._request, **checked(message))
        except Exception as error:  # noqa: BLE001  as above
            await self._tell(socket, self._refusal(error), published=name)
        else:
            await self._send(socket, json.dumps({"published": name}).encode())

    async def _pace(self, names: list[str]) -> None:
        """A client that follows and leaves without end is not read for as long as that is too often."""
        if seconds := self._changes.draw(len(names)):
            await asyncio.sleep(seconds)

    def _refusal(self, error: Exception) -> Refusal:
        told = refusal(error)
        if told is None:
            logger.error("A function of a channel failed", exc_info=error)
            return Refusal(500, "The server has failed.")
        return told

    async def _tell(self, socket: WebSocket, told: Refusal, **about: Any) -> None:
        error = {"error": told.reason, "status": told.status, **about}
        if told.retry_after:
            error["retry"] = told.retry_after * 1000
        await self._send(socket, json.dumps(error).encode())

    # What goes to the client

    async def _deliver(self, socket: WebSocket) -> None:
        """Until the socket is closing."""
        loop = asyncio.get_running_loop()
        beat = loop.time() + _heartbeat()
        socket.heard = True  # the handshake
        with self._reader.parked():
            while not socket.closing:
                await self._deliver_next(socket, beat - loop.time())
                if loop.time() >= beat:
                    self._check(socket)
                    beat = loop.time() + _heartbeat()

    async def _deliver_next(self, socket: WebSocket, timeout: float) -> None:  # noqa: ASYNC109
        reader = self._reader
        try:
            answer = await reader.next(timeout)
        except ChannelForbidden as error:
            told = Refusal(error.status, str(error))
            await self._tell(socket, told, channels=list(error.channels))
            return
        except BrokerUnavailable as error:
            logger.warning("A socket is closed: %s", error)
            socket.close(Close.LATER, "The channels cannot be reached at the moment.")
            return
        if reader.superseded:
            socket.close(Close.SUPERSEDED, "A newer connection of the same client is there.")
            return
        await self._send(socket, answer.json())
        if answer.retry:
            socket.close(Close.STOPPING, "The server is stopping.")

    def _check(self, socket: WebSocket) -> None:
        """Ends the socket of a client that has answered nothing since it was last asked, and asks again."""
        if not socket.heard and not socket.busy:
            socket.abort()
            return
        socket.heard = False
        socket.ping()

    async def _send(self, socket: WebSocket, data: bytes) -> None:
        """Returns when the system has taken it, or the client is closed for being too slow, or is gone."""
        config = get_config().COMET
        if socket.waiting and socket.waiting + len(data) > config.BYTES_WAITING:
            self._give_up(socket)
            return
        try:
            async with asyncio.timeout(config.HEARTBEAT):
                await socket.send(data)
        except TimeoutError:
            self._give_up(socket)
        except WebSocketClosedError:
            pass  # whoever reads it hears so, too

    def _give_up(self, socket: WebSocket) -> None:
        socket.close(Close.LATER, "Too slow: come back with the cursor.")


def _heartbeat() -> float:
    return get_config().COMET.HEARTBEAT * random.uniform(_EARLIEST_HEARTBEAT, 1)


# Frames


def _command(frame: str) -> dict[str, Any]:
    try:
        command = load_json(frame)
    except CometError as error:
        raise _Mistake(str(error)) from error
    if isinstance(command, dict):
        for name, options in _COMMANDS.items():
            if name in command and command.keys() <= {name, *options}:
                return command
    raise _Mistake('A frame is an object with "follow", "leave" or "publish"; see the protocol.')


def _names(names: Any) -> list[str]:
    most = get_config().COMET.CHANNELS_PER_CLIENT
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _Mistake("Channels are named in a list of strings.")
    if len(names) > most:
        raise _Mistake(f"{len(names)} channels are too many at once; the most is {most}.")
    return names


def _text(command: dict[str, Any], name: str) -> str | None:
    value = command.get(name)
    if not isinstance(value, str | None):
        raise _Mistake(f'"{name}" is a string.')
    return value


def _id(command: dict[str, Any]) -> int | str | None:
    value = command.get("id")
    if not isinstance(value, int | str | None) or len(str(value)) > MAX_ID_LENGTH:
        raise _Mistake(f'"id" is a number, or a string of {MAX_ID_LENGTH} characters at most.')
    return value
