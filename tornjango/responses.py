"""The deferred response: what a view is handed so that it can answer later.

Two rules. A response goes through the states of ``TRANSITIONS`` and no others. And it does nothing by itself: whatever
takes time (rendering, opening a file) it asks of its :class:`Driver`, so that it can be tested without socket or loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import logging
import weakref
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextvars import ContextVar
from os import PathLike
from typing import Any, Protocol

from django.core.serializers.json import DjangoJSONEncoder
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, JsonResponse
from django.http.response import HttpResponseBase
from django.shortcuts import resolve_url

from tornjango.exceptions import ResponseStateError

logger = logging.getLogger("tornjango.responses")

# Weak, since the response holds the context.
current: ContextVar[weakref.ref[DeferredResponse] | None] = ContextVar(
    "tornjango_response", default=None
)


def running() -> DeferredResponse | None:
    """The deferred response of the request whose view or callback is running, if it has one."""
    response = current.get()
    return None if response is None else response()


class State(enum.Enum):
    OPEN = "open"
    PREPARING = "being prepared"  # rendering, or opening a file
    FINISHED = "finished"
    FAILED = "failed"
    EXPIRED = "timed out"
    CLOSED = "left by its client"


class Event(enum.Enum):
    PREPARE = "prepare"
    COMPLETE = "complete"
    FINISH = "finish"
    FAIL = "fail"
    EXPIRE = "expire"
    CLOSE = "close"


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.OPEN: {
        Event.PREPARE: State.PREPARING,
        Event.FINISH: State.FINISHED,
        Event.FAIL: State.FAILED,
        Event.EXPIRE: State.EXPIRED,
        Event.CLOSE: State.CLOSED,
    },
    State.PREPARING: {
        Event.COMPLETE: State.FINISHED,
        Event.FAIL: State.FAILED,
        Event.EXPIRE: State.EXPIRED,
        Event.CLOSE: State.CLOSED,
    },
    State.FINISHED: {},
    State.FAILED: {},
    State.EXPIRED: {},
    # Nobody reads any more: a view that did not notice may go on, and is not told off for it.
    State.CLOSED: dict.fromkeys(Event, State.CLOSED),
}


class Driver(Protocol):
    """Who carries out what a deferred response asks for."""

    def deliver(self, response: HttpResponseBase) -> None:
        """The answer is complete."""

    def fail(self, exc: BaseException) -> None:
        """The view is to end as if it had raised ``exc``."""

    def start(self, work: Coroutine[Any, Any, HttpResponseBase]) -> None:
        """Runs ``work`` and gives its outcome to ``complete`` or ``fail`` of the response."""

    async def render(
        self, template: str | Iterable[str], context: Mapping[str, Any] | None, using: str | None
    ) -> str:
        """Renders a template, its querysets fetched first."""

    async def open_file(self, path: str | PathLike[str], **options: Any) -> HttpResponseBase:
        """Opens a file, without blocking the loop."""


class DeferredResponse:
    """An answer that is given later, from wherever the view's callbacks lead.

    Headers, cookies and status are those of Django's ``HttpResponse``. It is ended once, by ``finish``, ``render``,
    ``json``, ``redirect``, ``send_file`` or ``fail``; a second time raises ``ResponseStateError``, which names the view.
    After its client has left, all of these do nothing.
    """

    def __init__(
        self,
        request: HttpRequest,
        driver: Driver,
        *,
        view_name: str,
        context: contextvars.Context | None = None,
    ) -> None:
        self.request = request
        self.view_name = view_name
        #: The view and all its callbacks run in this context.
        self.context = context if context is not None else contextvars.copy_context()
        self.context.run(current.set, weakref.ref(self))
        self.state = State.OPEN
        self._driver = driver
        self._response = HttpResponse()
        self._tasks: set[asyncio.Future[Any]] = set()
        self._close_callbacks: list[Callable[[], object]] = []

    def __repr__(self) -> str:
        return f"<DeferredResponse of {self.view_name}: {self.state.value}>"

    # What an HttpResponse has

    @property
    def status_code(self) -> int:
        return self._response.status_code

    @status_code.setter
    def status_code(self, status: int) -> None:
        self._response.status_code = status

    @property
    def reason_phrase(self) -> str:
        return self._response.reason_phrase

    @reason_phrase.setter
    def reason_phrase(self, reason: str) -> None:
        self._response.reason_phrase = reason

    @property
    def headers(self) -> Any:
        return self._response.headers

    @property
    def cookies(self) -> Any:
        return self._response.cookies

    def __setitem__(self, header: str, value: str | bytes) -> None:
        self._response[header] = value

    def __getitem__(self, header: str) -> str:
        return self._response[header]

    def __delitem__(self, header: str) -> None:
        del self._response[header]

    def __contains__(self, header: str) -> bool:
        return header in self._response

    def set_cookie(self, key: str, value: str = "", **options: Any) -> None:
        """As ``HttpResponse.set_cookie``."""
        self._response.set_cookie(key, value, **options)

    def set_signed_cookie(self, key: str, value: str, salt: str = "", **options: Any) -> None:
        """As ``HttpResponse.set_signed_cookie``."""
        self._response.set_signed_cookie(key, value, salt=salt, **options)

    def delete_cookie(self, key: str, **options: Any) -> None:
        """As ``HttpResponse.delete_cookie``."""
        self._response.delete_cookie(key, **options)

    def write(self, content: str | bytes) -> None:
        """Adds to the body. Raises ``ResponseStateError`` once the response is being ended."""
        if self.state is State.CLOSED:
            return
        if self.state is not State.OPEN:
            raise self._error("write to")
        self._response.write(content)

    # Ending it

    @property
    def ended(self) -> bool:
        """Whether nothing can be added any more."""
        return self.state not in (State.OPEN, State.PREPARING)

    def finish(self, content: str | bytes | HttpResponseBase = b"") -> None:
        """Ends the response: with what was written and ``content``, or with a response made elsewhere."""
        if isinstance(content, HttpResponseBase):
            self._end_with(content)
            return
        if content and self.state is State.OPEN:
            self._response.write(content)
        self._end_with(self._response)

    def json(self, data: Any, *, encoder: type[Any] = DjangoJSONEncoder, **dumps: Any) -> None:
        """Ends the response with ``data`` as JSON, by Django's encoder: any value that JSON can hold at its top."""
        self._end_with(
            self._dressed(JsonResponse(data, encoder, safe=False, json_dumps_params=dumps or None))
        )

    def redirect(self, to: Any, *args: Any, permanent: bool = False, **kwargs: Any) -> None:
        """Ends the response with a redirect, ``to`` as for Django's ``redirect``: model, view name or URL."""
        redirect = HttpResponseRedirect(resolve_url(to, *args, **kwargs))
        self.status_code = 301 if permanent else 302
        self._end_with(self._dressed(redirect))

    def render(
        self,
        template: str | Iterable[str],
        context: Mapping[str, Any] | None = None,
        *,
        using: str | None = None,
    ) -> None:
        """Ends the response with a rendered template; querysets in ``context`` are fetched first, side by side.

        Returns at once. An error in fetching or rendering is answered as one in the view would be.
        """
        if self._step(Event.PREPARE, "render"):
            self._driver.start(self._rendered(template, context, using))

    async def _rendered(
        self,
        template: str | Iterable[str],
        context: Mapping[str, Any] | None,
        using: str | None,
    ) -> HttpResponseBase:
        self._response.write(await self._driver.render(template, context, using))
        return self._response

    def send_file(
        self,
        path: str | PathLike[str],
        *,
        as_attachment: bool = False,
        filename: str = "",
        content_type: str | None = None,
    ) -> None:
        """Ends the response with a file's content, opened and read in worker threads while the client takes it.

        Returns at once. A file that is not there is answered 404. ``path`` is trusted: check what clients send.
        """
        if self._step(Event.PREPARE, "send a file with"):
            options = {"as_attachment": as_attachment, "filename": filename}
            if content_type is not None:
                options["content_type"] = content_type
            self._driver.start(self._opened(path, options))

    async def _opened(self, path: str | PathLike[str], options: dict[str, Any]) -> HttpResponseBase:
        return self._dressed(await self._driver.open_file(path, **options))

    def fail(self, exc: BaseException) -> None:
        """Ends the response as if the view had raised ``exc``: middleware, log, signal and 500 page are the same.

        Never raises: on a response that has ended, ``exc`` is logged with the view's name.
        """
        if self.ended:
            logger.error(
                "%s failed after its response was %s",
                self.view_name,
                self.state.value,
                exc_info=exc,
                extra={"request": self.request},
            )
            return
        self._step(Event.FAIL, "fail")
        self._driver.fail(exc)
        self._cancel_tasks()

    # For whoever drives it

    def complete(self, response: HttpResponseBase) -> None:
        """What was being prepared is there."""
        if not self.ended:
            self._step(Event.COMPLETE, "complete")
            self._driver.deliver(response)

    def expire(self, response: HttpResponseBase) -> None:
        """Time is up: ``response`` is the answer, unless there is one; what is under way is cancelled."""
        if not self.ended:
            self._step(Event.EXPIRE, "expire")
            self._driver.deliver(response)
            self._cancel_tasks()

    def close(self) -> None:
        """The client has left: its callbacks are called, and everything still under way is cancelled."""
        if self.ended:
            return
        self._step(Event.CLOSE, "close")
        for callback in self._close_callbacks:
            try:
                self.context.run(callback)
            except Exception:  # the others are to be called all the same
                logger.exception("A function given to on_close by %s failed", self.view_name)
        self._cancel_tasks()

    def on_close(self, callback: Callable[[], object]) -> None:
        """Calls ``callback`` once, if the client leaves before the response has ended; at once if it left already."""
        if self.state is State.CLOSED:
            callback()
        else:
            self._close_callbacks.append(callback)

    def track(self, task: asyncio.Future[Any]) -> None:
        """Has ``task`` cancelled if the response fails, times out, or is left by its client.

        After an ordinary end it runs on: what a view has set going is not lost because it answered early.
        """
        if self.ended and self.state is not State.FINISHED:
            task.cancel()
        else:
            self._tasks.add(task)
            task.add_done_callback(self._untrack)

    def _untrack(self, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)

    def release(self) -> None:
        """For its driver, when it has ended: nothing more is asked of that."""
        del self._driver

    def _step(self, event: Event, verb: str) -> bool:
        """Goes to the next state; False where there is nobody left to answer."""
        following = TRANSITIONS[self.state].get(event)
        if following is None:
            raise self._error(verb)
        self.state = following
        return following is not State.CLOSED

    def _end_with(self, response: HttpResponseBase) -> None:
        if self._step(Event.FINISH, "finish"):
            self._driver.deliver(response)

    def _dressed(self, response: HttpResponseBase) -> HttpResponseBase:
        """``response`` with the headers, the cookies and the status that were set on this one."""
        default = HttpResponse().headers["Content-Type"]
        for header, value in self._response.items():
            if header != "Content-Type" or value != default:
                response[header] = value
        response.cookies.update(self._response.cookies)
        if self._response.status_code != 200:
            response.status_code = self._response.status_code
        return response

    def _cancel_tasks(self) -> None:
        """Cancels what is still under way, save the task that calls this."""
        try:
            running = asyncio.current_task()
        except RuntimeError:  # no loop in this thread
            running = None
        for task in list(self._tasks):
            if task is not running:
                task.cancel()

    def _error(self, verb: str) -> ResponseStateError:
        return ResponseStateError(
            f"{self.view_name} tried to {verb} a response that is already {self.state.value}. "
            "A deferred response is ended once, by one of finish, render, json, redirect, send_file or fail."
        )
