"""The life of a request: Django answers it, the answer goes out, or the client leaves before that."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import enum
import logging
import traceback
from typing import TYPE_CHECKING, Any

from django.core import signals
from django.core.exceptions import BadRequest
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.urls import ResolverMatch, set_script_prefix
from tornado.httputil import HTTPServerRequest
from tornado.iostream import StreamClosedError
from tornado.web import RequestHandler

from tornjango import cancellation, comet
from tornjango.access import CLIENT_LEFT, Answer
from tornjango.bodies import Body
from tornjango.cancellation import Cancellation
from tornjango.conf import get_config
from tornjango.exceptions import Overloaded
from tornjango.failures import only_django_listens
from tornjango.knots import untie, untie_file
from tornjango.requests import TornadoRequest
from tornjango.sending import Sending, is_closed, refuse_on
from tornjango.websockets import WebSocket, WebSocketClosedError, WebSocketResponse

if TYPE_CHECKING:
    from tornjango.application import Application

logger = logging.getLogger("tornjango.handlers")

# RFC 6455, 7.4.1.
_GOING_AWAY = 1001, "The server is stopping."


class Cut(enum.Enum):
    """Why a request ends before its time."""

    LEFT = "its client left"
    STOPPED = "the server is stopping"


class DjangoHandler(RequestHandler):
    """Answers one request with what Django's middleware and the project's view answer.

    ``application.handler_classes`` has a subclass for each view. The view's task is cancelled when its client leaves.
    """

    application: Application
    #: The view that the URL pattern names, for logs; Django's own answers (404, redirects) have none.
    view_name = ""
    #: Whether it is cancelled when its client leaves; None where only the setting says so.
    cancels: bool | None = None
    _django_request: TornadoRequest | None = None
    _socket: WebSocket | None = None

    def __init__(self, application: Application, request: HTTPServerRequest) -> None:
        # Not Tornado's, which prepares for what Django does here, and ties knots that its own finish() undoes.
        self.application = application
        self.request = request
        self._closing = False

    def start(self, body: Body, match: ResolverMatch | None) -> None:
        """The client may have left already: Tornado then tells nobody, and nothing is begun."""
        connection: Any = self.request.connection
        if is_closed(connection):
            body.close()
            return
        self._body = body
        self._match = match
        self._cut: asyncio.Future[Cut] = asyncio.get_running_loop().create_future()
        self._sending = Sending(connection, self.request, self._cut)
        self._cancellation = Cancellation(self._cancel)
        connection.set_close_callback(self.on_connection_close)
        self.application.in_flight.add(self)
        self.task = asyncio.create_task(self._live())

    # Tornado's side

    def on_connection_close(self) -> None:
        """The client has left: what is done for it on the loop is cancelled, unless the project wants it done."""
        cancels = self.cancels if self.cancels is not None else get_config().CANCEL_ON_DISCONNECT
        self._cut_short(Cut.LEFT, cancels)

    def stop(self) -> None:
        """The server does not wait for this request any longer: it is answered 503."""
        self._cut_short(Cut.STOPPED, cancels=True)

    def _cut_short(self, why: Cut, cancels: bool) -> None:
        first = not self._cut.done()
        if first:
            self._cut.set_result(why)
        if first and self._sending.begun:
            self._cancel()
        elif cancels:
            self._cancellation.request()

    def _cancel(self) -> None:
        """What remains when everything is being closed is short, and has to be done."""
        if not self._closing:
            self.task.cancel()

    @property
    def is_answering(self) -> bool:
        """Whether its answer is on its way to the client already."""
        return self._sending.begun

    @property
    def heeds_drain(self) -> bool:
        """Whether its answer is a stream that ends by itself when the server stops (`comet.drain`)."""
        return getattr(self._django_request, "heeds_drain", False)

    # Its life

    async def _live(self) -> None:
        try:
            await self._answer()
        except Overloaded as exc:
            logger.warning("%s is answered 503: %s", self._line(), exc)
            self._answer_plainly(503, "The server is busy. Please try again in a moment.")
        except BadRequest as exc:
            # Of a request that could not be made; a view's is Django's to answer.
            logger.warning("%s is answered 400: %s", self._line(), exc)
            self._answer_plainly(400, f"Bad request: {exc}")
        except (StreamClosedError, asyncio.CancelledError) as exc:
            self._end_early(exc)
            # Where a thread had a part in it, frames hold futures, and those this very exception.
            traceback.clear_frames(exc.__traceback__)
        except Exception:  # noqa: BLE001  not the view's, which Django has answered: the server's last stand
            self._fail()
        finally:
            self._cancellation.settle()
            self.application.in_flight.discard(self)
            self._body.close()
            if self.application.observers:
                self._tell()
            if self._django_request is not None:
                untie(self._django_request)

    async def _answer(self) -> None:
        self.application.workers.enter()
        cancellation.current.set(self._cancellation)
        request = self._django_request = TornadoRequest(self.request, self._body)
        request.route_match = self._match
        comet.note_arrival(request)
        if request.script_name:  # without it, the prefix is "/" already
            set_script_prefix(f"{request.script_name}/")
        try:
            await self._start(request)
            response = await self.get_response(request)
        except BaseException:
            self._closing = True
            request.close()
            await self._finish()
            raise
        response._handler_class = type(self)  # type: ignore[attr-defined]
        try:
            if self._cut.done():  # nobody is there to take it
                raise StreamClosedError
            if isinstance(response, WebSocketResponse):
                await self._converse(request, response)
                return
            await self._sending.send(response, last=self.application.draining)
        finally:
            self._closing = True
            await self._close(response)
            untie_file(response)

    async def _converse(self, request: TornadoRequest, response: WebSocketResponse) -> None:
        """Returns when the connection is closed."""
        socket = self._socket = WebSocket(request, response.options)
        self._sending.switch(response, socket.shake_hands)
        socket.open(self.request.connection)
        socket.ended.add_done_callback(self._on_socket_end)
        if self.application.draining:
            self.close_socket()
        try:
            await self._talk(response, socket)
            socket.ended.remove_done_callback(self._on_socket_end)
            await asyncio.wait([socket.ended])  # Tornado gives the client five seconds to agree
        except asyncio.CancelledError:
            socket.close(*_GOING_AWAY)
            socket.abort()
            raise
        finally:
            self._sending.sent = socket.sent
            self._sending.finished = socket.close_code is not None

    async def _talk(self, response: WebSocketResponse, socket: WebSocket) -> None:
        try:
            await response.talk(socket)
        except WebSocketClosedError:
            pass  # as any client that leaves
        except Exception:
            logger.exception("The talk of %s failed (view: %s)", self._line(), self.view_name)
            socket.close(1011, "The server has failed.")
        socket.close()

    def _on_socket_end(self, ended: asyncio.Future[None]) -> None:
        assert self._socket is not None
        if not self._socket.expected:
            self.on_connection_close()

    def close_socket(self) -> None:
        """The server is stopping: a WebSocket hears so, unless its talk sees to that by itself."""
        if self._socket is not None and not self.heeds_drain:
            self._socket.close(*_GOING_AWAY)

    async def _start(self, request: TornadoRequest) -> None:
        """Sends ``request_started``: in a worker thread where a receiver of others might wait."""
        self._started = True
        if only_django_listens(signals.request_started):
            signals.request_started.send(sender=type(self), environ=request.META)
            return
        try:
            await signals.request_started.asend(sender=type(self), environ=request.META)
        except Overloaded:
            self._started = False
            raise

    async def _finish(self) -> None:
        """Sends ``request_finished``, for a request that has no response to be closed."""
        if not self._started:
            return
        if not only_django_listens(signals.request_finished):
            # Better a moment of the loop's time than not at all.
            with contextlib.suppress(Overloaded):
                await signals.request_finished.asend(sender=type(self))
                return
        signals.request_finished.send(sender=type(self))

    async def get_response(self, request: HttpRequest) -> HttpResponseBase:
        return await self.application.chain.get_response_async(request)

    def _end_early(self, exc: BaseException) -> None:
        """The client left, or the server stops; or else something below has raised what only these may."""
        if self._cut.done() and self._cut.result() is Cut.STOPPED:
            self._answer_plainly(503, "The server is stopping. Please try again in a moment.")
        elif not self._cut.done() and not is_closed(self.request.connection):
            self._fail()

    def _fail(self) -> None:
        logger.exception(
            "%s failed outside of Django (view: %s)", self._line(), self.view_name or "none"
        )
        self._answer_plainly(500, "Internal Server Error")

    def _answer_plainly(self, status: int, reason: str) -> None:
        connection: Any = self.request.connection
        if self._sending.finished or is_closed(connection):
            return
        if self._sending.begun:  # there is no way back but to break off
            connection.close()
        else:
            self._sending.sent = refuse_on(connection, self.request.method, status, reason)
            self._sending.status = status
            self._sending.finished = True

    async def _close(self, response: HttpResponseBase) -> None:
        """Closes what the response holds, which also sends ``request_finished``."""
        if self._sending.closes:  # in the thread that iterates it
            return
        sync_stream = response.streaming and not getattr(response, "is_async", False)
        is_file = hasattr(response, "file_to_stream")
        if only_django_listens(signals.request_finished) and (is_file or not sync_stream):
            response.close()
            return
        # Not sync_to_async: it would keep the exception that ends a request, and with it the response.
        loop, run = asyncio.get_running_loop(), contextvars.copy_context().run
        try:
            await loop.run_in_executor(self.application.workers.pool, run, response.close)
        except Overloaded:  # better a moment of the loop's time than a file left open
            response.close()

    def _line(self) -> str:
        return f"{self.request.method} {self.request.uri} {self.request.version}"

    def _tell(self) -> None:
        sending = self._sending
        self.application.answered(
            Answer(
                self.request,
                sending.status or CLIENT_LEFT,
                sending.sent,
                self.view_name,
                self._django_request,
                sending.finished,
            )
        )
