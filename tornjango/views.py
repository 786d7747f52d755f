"""The three kinds of view, and how each is made into what Django's handler calls: a function that is awaited."""

from __future__ import annotations

import asyncio
import contextvars
import enum
import functools
import inspect
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, cast, overload

from asgiref.sync import iscoroutinefunction, markcoroutinefunction, sync_to_async
from django.db import connections, transaction
from django.http import FileResponse, Http404, HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.template.response import SimpleTemplateResponse
from django.utils.log import log_response

from tornjango import responses, templates
from tornjango.cancellation import in_thread, settle
from tornjango.conf import get_config
from tornjango.db.atomic import shared_atomic
from tornjango.exceptions import Overloaded
from tornjango.failures import busy
from tornjango.green import adopt, runs_green
from tornjango.green import run as run_green
from tornjango.responses import DeferredResponse

logger = logging.getLogger("tornjango.views")

View = Callable[..., Any]
SyncView = TypeVar("SyncView", bound=View)
V = TypeVar("V", bound=View)
AsyncView = Callable[..., Coroutine[Any, Any, HttpResponseBase]]


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Kind(enum.Enum):
    DEFERRED = "deferred"
    ASYNC = "async"
    SYNC = "sync"


def view_name(view: View) -> str:
    """``module.qualname``, through ``functools.partial`` and callable instances."""
    if isinstance(view, functools.partial):
        return view_name(view.func)
    view = getattr(view, "view_class", view)
    named = view if hasattr(view, "__qualname__") else type(view)
    return f"{named.__module__}.{named.__qualname__}"


def _is_marked(view: View) -> bool:
    """Whether ``@deferred`` has made it an async view already, perhaps below other decorators."""
    view = view.func if isinstance(view, functools.partial) else view
    return hasattr(view, "_deferred_view")


def _takes_response(view: View, groups: Collection[str]) -> bool:
    return not _is_marked(view) and _response_position(view, groups) is not None


def kind_of(view: View, groups: Collection[str] = ()) -> Kind:
    """How a view is called. ``groups`` are the names that its URL pattern fills.

    Deferred is a view marked with ``@deferred``, or whose second parameter is named ``response`` and filled by no group.
    """
    if _is_marked(view) or _takes_response(view, groups):
        return Kind.DEFERRED
    return Kind.ASYNC if iscoroutinefunction(view) else Kind.SYNC


def methods_of(view: View) -> dict[str, View]:
    """The functions behind the HTTP methods of a class-based view, less their ``self``; ``{}`` for any other view."""
    view_class = getattr(view, "view_class", None)
    if view_class is None:
        return {}
    return {
        name.upper(): functools.partial(method, None)
        for name in view_class.http_method_names
        if name != "options" and (method := getattr(view_class, name, None))
    }


def green(view: SyncView) -> SyncView:
    """Has a sync view run on the event loop: where it queries, the loop does something else, and no thread is held.

    Other requests run on the same thread while it waits for a query: what it, or a library that it uses, keeps in a
    ``threading.local`` is shared with them. And whatever else it waits for (another server, a file, a lock, a long
    computation) everybody waits for. So mark views that do nothing but query and render. What Django itself does
    besides (password hashing, file storage, mail, caches elsewhere) takes a worker thread by itself.

    For functions, for ``SomeView.as_view()``, and, by ``@method_decorator(green, name="dispatch")``, for classes.
    ``TORNJANGO["SYNC_VIEWS"] = "green"`` does it for all sync views but those marked `threaded`. Under any other server,
    and in Django's test client, it changes nothing. (The module ``tornjango.green`` is what this is made with.)
    """
    return _with_sync_mode(view, "green")


def threaded(view: SyncView) -> SyncView:
    """Has a sync view run in a worker thread, where ``TORNJANGO["SYNC_VIEWS"]`` is "green"; applied as `green` is."""
    return _with_sync_mode(view, "threads")


def _with_sync_mode(view: SyncView, mode: str) -> SyncView:
    """A view of its own, as Django's decorators make: somebody else may use the same one unmarked."""
    if iscoroutinefunction(view):
        raise TypeError(f"{view_name(view)} is async: it runs on the event loop as it is.")

    @functools.wraps(view)
    def marked(*args: Any, **kwargs: Any) -> Any:
        return view(*args, **kwargs)

    marked._sync_mode = mode  # type: ignore[attr-defined]
    return cast(SyncView, marked)


def cancel_on_disconnect(cancel: bool) -> Callable[[V], V]:
    """Has a view cancelled when its client leaves, or not, whatever ``TORNJANGO["CANCEL_ON_DISCONNECT"]`` says.

    A view that is not cancelled runs to its end, and its answer is dropped; a deferred one is not told by ``on_close``.
    A sync view in a worker thread runs to its end in any case, once it has begun, and a response that has begun to go out
    is broken off in any case. For functions, and by ``@method_decorator(..., name="dispatch")`` for classes.
    """

    def decorate(view: V) -> V:
        @functools.wraps(view)
        def marked(*args: Any, **kwargs: Any) -> Any:
            return view(*args, **kwargs)

        if iscoroutinefunction(view):
            marked = markcoroutinefunction(marked)
        marked._cancel_on_disconnect = cancel  # type: ignore[attr-defined]
        return cast(V, marked)

    return decorate


def is_cancelled_on_disconnect(view: View) -> bool | None:
    """None where the view does not say."""
    view = view.func if isinstance(view, functools.partial) else view
    marked: bool | None = getattr(view, "_cancel_on_disconnect", None)
    return marked


def adapt(view: View, groups: Collection[str] = (), render: bool = False) -> AsyncView:
    """What is awaited to call ``view``, in the transactions of ATOMIC_REQUESTS.

    A TemplateResponse is rendered where its view has run: by Django's handler, or, with ``render``, right after a view
    in a worker thread, which saves it another way there. Work for the start of the server: a request only calls the
    result.
    """
    aliases = _atomic_aliases(view)
    if iscoroutinefunction(view):
        call = _rendering_green(_in_transactions(view, aliases))
    else:
        call = _sync(view, aliases, render)
    methods = methods_of(view)
    deferring = {name for name, method in methods.items() if _takes_response(method, groups)}
    if deferring:
        if "GET" in deferring and "HEAD" not in methods:  # View.setup() has get() answer it
            deferring.add("HEAD")
        call = _by_method(_deferred_whole(view, aliases), call, deferring)
    elif _takes_response(view, groups):
        call = _deferred_whole(view, aliases)
    return _guarded(call, view)


def _deferred_whole(view: View, aliases: Collection[str]) -> AsyncView:
    return _rendering_green(_in_transactions(deferred(view), aliases))


def _sync(view: View, aliases: Collection[str], render: bool) -> AsyncView:
    whole = view
    for alias in aliases:
        whole = transaction.atomic(using=alias)(whole)
    if not runs_green(view):
        return in_thread(_rendering(whole) if render else whole)
    return _rendering_green(functools.partial(run_green, whole))


def _is_unrendered(response: Any) -> bool:
    return isinstance(response, SimpleTemplateResponse) and not response.is_rendered


def _rendering(view: View) -> View:
    @functools.wraps(view, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        response = view(*args, **kwargs)
        return response.render() if _is_unrendered(response) else response

    return call


def _rendering_green(view: AsyncView) -> AsyncView:
    """Django's handler renders a TemplateResponse after the view: in a thread, unless that is to be awaited."""

    async def call(*args: Any, **kwargs: Any) -> HttpResponseBase:
        response = await view(*args, **kwargs)
        if _is_unrendered(response):
            response.render = _render_green(response)  # type: ignore[attr-defined]
        return response

    return call


def _render_green(response: Any) -> Callable[[], Awaitable[SimpleTemplateResponse]]:
    render = response.render

    async def arender() -> SimpleTemplateResponse:
        del response.render  # it may be pickled, for a cache
        rendered: SimpleTemplateResponse = await run_green(render)
        return rendered

    return arender


def _atomic_aliases(view: View) -> list[str]:
    excepted = getattr(view, "_non_atomic_requests", ())
    databases = connections.settings.items()
    return [alias for alias, db in databases if db["ATOMIC_REQUESTS"] and alias not in excepted]


def _in_transactions(view: AsyncView, aliases: Collection[str]) -> AsyncView:
    """``view``, whose answer leaves the transactions committed, and whose error or time-out leaves them rolled back."""
    if not aliases:
        return view

    async def call(*args: Any, **kwargs: Any) -> HttpResponseBase:
        async with shared_atomic(aliases):
            response = await view(*args, **kwargs)
            if isinstance(response, _TimedOut):
                for alias in aliases:
                    await run_green(transaction.set_rollback, True, using=alias)
            return response

    return call


class _TimedOut(HttpResponse):
    """The answer in the place of one that did not come in time."""


def _by_method(with_response: AsyncView, without: AsyncView, deferring: set[str]) -> AsyncView:
    """A class-based view some of whose methods are deferred: ``as_view()`` hands the response through to them."""

    async def call(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        chosen = with_response if request.method in deferring else without
        return await chosen(request, *args, **kwargs)

    return call


def _guarded(call: AsyncView, view: View) -> AsyncView:
    """``call``, with a full queue answered as what it is: come back later."""

    @functools.wraps(view, updated=())
    async def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        try:
            response = await call(request, *args, **kwargs)
            settle()
            return response
        except Overloaded as exc:
            return await run_green(busy, exc, view_name(view), request)

    return guarded


def _plain(
    status: int, message: str, response_class: type[HttpResponse] = HttpResponse
) -> HttpResponse:
    return response_class(message, status=status, content_type="text/plain")


def _response_position(view: View, groups: Collection[str]) -> int | None:
    """Where a view takes its response: 1 in ``view(request, response)``, 2 in a method's signature."""
    try:
        parameters = inspect.signature(view).parameters.values()
    except (TypeError, ValueError):  # builtins have no signature
        return None
    names = [p.name for p in parameters if p.kind in _POSITIONAL]
    if "response" in groups:
        return None
    for position in (1, 2):
        if names[position : position + 1] == ["response"]:
            # A second parameter; or a third one, behind the self of a method.
            return position if position == 1 or names[0] == "self" else None
    return None


@overload
def deferred(view: View, *, timeout: float | None = None) -> AsyncView: ...
@overload
def deferred(view: None = None, *, timeout: float | None = None) -> Callable[[View], AsyncView]: ...
def deferred(
    view: View | None = None, *, timeout: float | None = None
) -> AsyncView | Callable[[View], AsyncView]:
    """Makes ``view(request, response, ...)`` an async view that answers when ``response`` is ended.

    ``timeout`` is how long that may take, in seconds (``TORNJANGO["RESPONSE_TIMEOUT"]`` unless given); after it the
    answer is 504 and the log names the view. When the client leaves, what the view still waits for is cancelled. The
    result is an ordinary async view to Django: it works in the test client and under any ASGI or WSGI server.
    """
    if view is None:
        return functools.partial(deferred, timeout=timeout)
    position = _response_position(view, ()) or 1
    name = view_name(view)

    @functools.wraps(view, updated=())
    async def wrapper(*args: Any, **kwargs: Any) -> HttpResponseBase:
        call = _Call(args[position - 1], name)
        limit = timeout if timeout is not None else get_config().RESPONSE_TIMEOUT
        arguments = (*args[:position], call.response, *args[position:])
        return await call.run(functools.partial(view, *arguments, **kwargs), limit)

    wrapper._deferred_view = view  # type: ignore[attr-defined]
    for attribute, value in vars(view).items():  # csrf_exempt and its like
        wrapper.__dict__.setdefault(attribute, value)
    return wrapper


class _Call:
    """One call of a deferred view: carries out what its response asks for, and waits for its end."""

    def __init__(self, request: HttpRequest, name: str) -> None:
        self.loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[HttpResponseBase] = self.loop.create_future()
        self.response = DeferredResponse(request, self, view_name=name)

    async def run(self, view: Callable[[], Any], seconds: float) -> HttpResponseBase:
        """Raises what the view, or one of its callbacks, raised."""
        timer = self.loop.call_later(seconds, self._expire, seconds)
        try:
            self._returned(self.response.context.run(view))
            return await self.answer
        except asyncio.CancelledError:
            self.response.close()
            raise
        except Exception as exc:
            if not self.response.ended:  # raised by the view itself: end what it has set going
                self.response.fail(exc)
                self.answer.exception()
            raise
        finally:
            timer.cancel()
            self.response.release()
            del self.answer  # and the exception in it, whose traceback leads here
            _bring_back(self.response.context)

    def _returned(self, result: Any) -> None:
        """A view may hand back a response after all, as decorators do that turn a request away."""
        if inspect.isawaitable(result):
            self._start(_awaited(result), self._returned)
        elif isinstance(result, HttpResponseBase):
            self.response.finish(result)
        elif result is not None:
            raise TypeError(
                f"{self.response.view_name} is a deferred view and returned {type(result).__name__}. "
                "It must end its response, or return an HttpResponse, or None to end it later."
            )

    def _start(self, work: Coroutine[Any, Any, Any], done: Callable[[Any], None]) -> None:
        task = self.loop.create_task(work, context=self.response.context)
        adopt(task)
        self.response.track(task)
        task.add_done_callback(functools.partial(self._done, done), context=self.response.context)

    def _done(self, done: Callable[[Any], None], task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            if not self.response.ended:
                self.response.fail(RuntimeError(f"{self.response.view_name} cancelled itself."))
            return
        try:
            done(task.result())
        except Exception as exc:  # noqa: BLE001  the view's own, whatever it is
            self.response.fail(exc)

    def _expire(self, seconds: float) -> None:
        if self.response.ended:
            return
        answer = _plain(504, "The server did not answer in time.", _TimedOut)
        text = "%s did not end its response within %g s; it is answered 504"
        arguments = (self.response.view_name, seconds)
        request = self.response.request
        log_response(text, *arguments, response=answer, request=request, logger=logger)
        self.response.expire(answer)

    # What a DeferredResponse asks of its driver

    def deliver(self, response: HttpResponseBase) -> None:
        if not self.answer.done():
            self.answer.set_result(response)

    def fail(self, exc: BaseException) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)

    def start(self, work: Coroutine[Any, Any, HttpResponseBase]) -> None:
        self._start(work, self.response.complete)

    async def render(
        self, template: str | Iterable[str], context: Mapping[str, Any] | None, using: str | None
    ) -> str:
        names = template if isinstance(template, str) else list(template)
        return await templates.arender(names, context, self.response.request, using=using)

    async def open_file(self, path: str | PathLike[str], **options: Any) -> HttpResponseBase:
        try:
            file = await sync_to_async(lambda: Path(path).open("rb"))()  # noqa: SIM115  FileResponse closes it
        except (FileNotFoundError, IsADirectoryError) as exc:
            raise Http404(f"There is no file {path}.") from exc
        return FileResponse(file, **options)


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _bring_back(context: contextvars.Context) -> None:
    """Gives the caller what the view set in its context, a language activated in the view, say, as asgiref does."""
    for variable, value in context.items():
        if variable is responses.current:
            continue
        if variable.get(None) is not value:
            variable.set(value)
