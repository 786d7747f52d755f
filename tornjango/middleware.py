"""Django's middleware chain, built once by Django's ``BaseHandler``, run on the loop.

Under ASGI, ``MiddlewareMixin`` sends every ``process_request`` and ``process_response`` through a thread, because it
cannot know whether they wait. Django's own are known: ``WAITS`` says of each when it would, and then it runs green. So
its queries need no thread. What else it may wait for (a cache or a session store elsewhere, mail, a large form) takes one
by itself: see ``tornjango.blocking``, which decides by the class that SESSION_ENGINE, CACHES and the like name.

Sync code of others has a worker thread. Django runs sync middleware together with all that is around it and can be sync:
one stretch, in one thread (``tornjango.stretches``). ``LOOP_MIDDLEWARE`` names what runs green instead.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from asgiref.sync import async_to_sync, iscoroutinefunction
from django.conf import settings
from django.core.handlers import base, exception
from django.core.handlers.base import BaseHandler
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.urls import ResolverMatch
from django.utils.deprecation import MiddlewareMixin

from tornjango import cancellation, green, routing, stretches
from tornjango.conf import get_config
from tornjango.exceptions import ConfigurationError
from tornjango.views import AsyncView, View, adapt

Waits = Callable[..., bool]


def _never(*args: Any) -> bool:
    return False


def _always(*args: Any) -> bool:
    return True


def _csrf_in_session(*args: Any) -> bool:
    return bool(settings.CSRF_USE_SESSIONS)


def _csrf_checks(request: HttpRequest, *args: Any) -> bool:
    """It may read a large form, and its page for who is turned away may query."""
    return _csrf_in_session() or request.method not in ("GET", "HEAD", "OPTIONS", "TRACE")


def _saves_session(request: HttpRequest, response: HttpResponseBase) -> bool:
    session = getattr(request, "session", None)
    return session is not None and bool(session.modified or settings.SESSION_SAVE_EVERY_REQUEST)


def _stores_messages(request: HttpRequest, response: HttpResponseBase) -> bool:
    storage = getattr(request, "_messages", None)
    return storage is not None and bool(storage.used or storage.added_new)


def _not_found(request: HttpRequest, response: HttpResponseBase) -> bool:
    return response.status_code == 404


def _is_head(request: HttpRequest, *args: Any) -> bool:
    return request.method == "HEAD"


# By the name of the function: a subclass that overrides it has another, is not known, and goes to a thread. Names, since
# some of these modules cannot be imported where their app is not installed.
WAITS: dict[str, Waits] = {
    "django.contrib.admindocs.middleware.XViewMiddleware.process_view": _is_head,
    "django.contrib.auth.middleware.AuthenticationMiddleware.process_request": _never,
    "django.contrib.auth.middleware.LoginRequiredMiddleware.process_view": _always,
    "django.contrib.flatpages.middleware.FlatpageFallbackMiddleware.process_response": _not_found,
    "django.contrib.messages.middleware.MessageMiddleware.process_request": _never,
    "django.contrib.messages.middleware.MessageMiddleware.process_response": _stores_messages,
    "django.contrib.redirects.middleware.RedirectFallbackMiddleware.process_response": _not_found,
    "django.contrib.sessions.middleware.SessionMiddleware.process_request": _never,
    "django.contrib.sessions.middleware.SessionMiddleware.process_response": _saves_session,
    "django.contrib.sites.middleware.CurrentSiteMiddleware.process_request": _always,
    "django.middleware.cache.FetchFromCacheMiddleware.process_request": _always,
    "django.middleware.cache.UpdateCacheMiddleware.process_response": _always,
    "django.middleware.clickjacking.XFrameOptionsMiddleware.process_response": _never,
    "django.middleware.common.BrokenLinkEmailsMiddleware.process_response": _not_found,
    "django.middleware.common.CommonMiddleware.process_request": _never,
    "django.middleware.common.CommonMiddleware.process_response": _never,
    "django.middleware.csp.ContentSecurityPolicyMiddleware.process_request": _never,
    "django.middleware.csp.ContentSecurityPolicyMiddleware.process_response": _never,
    "django.middleware.csrf.CsrfViewMiddleware.process_request": _csrf_in_session,
    "django.middleware.csrf.CsrfViewMiddleware.process_view": _csrf_checks,
    "django.middleware.csrf.CsrfViewMiddleware.process_response": _csrf_in_session,
    "django.middleware.http.ConditionalGetMiddleware.process_response": _never,
    "django.middleware.locale.LocaleMiddleware.process_request": _never,
    "django.middleware.locale.LocaleMiddleware.process_response": _never,
    "django.middleware.security.SecurityMiddleware.process_request": _never,
    "django.middleware.security.SecurityMiddleware.process_response": _never,
}


def waits_of(hook: Callable[..., Any]) -> Waits | None:
    """When ``hook`` would wait; None where that is not known, and it has to be supposed."""
    function = getattr(hook, "__func__", hook)
    owner = type(getattr(hook, "__self__", None))
    # A subclass inherits the hook, but may override what the hook calls.
    if not owner.__module__.startswith("django."):
        return None
    return WAITS.get(f"{function.__module__}.{function.__qualname__}")


def on_loop(hook: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    """``hook`` as a coroutine function: green when it would wait; in a worker thread where nothing is known of it."""
    waits = waits_of(hook)
    if waits is None:
        return cancellation.in_thread(hook)

    async def call(*args: Any) -> Any:
        return await green.run(hook, *args) if waits(*args) else hook(*args)

    return call


class _Hook(NamedTuple):
    """``process_request`` or ``process_response``: called where it does not wait, and awaited as ``aside`` where it would."""

    waits: Waits
    call: Callable[..., Any]
    aside: Callable[..., Awaitable[Any]]

    @classmethod
    def of(cls, middleware: MiddlewareMixin, name: str) -> _Hook | None:
        hook = getattr(middleware, name, None)
        if hook is None:
            return None
        waits = waits_of(hook)
        if waits is None:
            return cls(_always, hook, cancellation.in_thread(hook))
        return cls(waits, hook, functools.partial(green.run, hook))


class _Layers:
    """Middleware one inside the other, each with an exception becoming a response around it: as Django runs them, in one coroutine.

    Django's own way is two for each, which a request that waits for hours keeps all the while.
    """

    def __init__(
        self, layers: Sequence[tuple[_Hook | None, _Hook | None]], get_response: AsyncView
    ) -> None:
        self.layers = layers
        self.get_response = get_response

    async def run(self, request: HttpRequest) -> HttpResponseBase:
        """Raises what the outermost raises: Django has its own around that."""
        response: HttpResponseBase
        response, depth = await self._inwards(request)
        for index in range(depth, -1, -1):
            after = self.layers[index][1]
            if after is None:
                continue
            try:
                waits = after.waits(request, response)
                handle: Any = after.aside if waits else after.call
                response = await handle(request, response) if waits else handle(request, response)
            except Exception as exc:
                if not index:
                    raise
                response = await _response_for(request, exc)
        return response

    async def _inwards(self, request: HttpRequest) -> tuple[Any, int]:
        """A response, and the index of the innermost layer that it passes on its way out."""
        index, response = -1, None
        try:
            for before, _ in self.layers:
                index += 1
                if before is not None:
                    waits = before.waits(request)
                    response = await before.aside(request) if waits else before.call(request)
                if response:
                    return response, index
            return await self.get_response(request), index
        except Exception as exc:
            if not index:
                raise
            return await _response_for(request, exc), index - 1


async def _response_for(request: HttpRequest, exc: Exception) -> HttpResponseBase:
    """As ``convert_exception_to_response`` makes it."""
    make: Any = exception.sync_to_async(  # type: ignore[attr-defined]
        exception.response_for_exception, thread_sensitive=False
    )
    response: HttpResponseBase = await make(request, exc)
    return response


def keep_on_loop(middleware: MiddlewareMixin) -> None:
    """Replaces what ``MiddlewareMixin`` does under ASGI, for this instance: hooks that never wait are simply called."""
    own = _Hook.of(middleware, "process_request"), _Hook.of(middleware, "process_response")
    get_response: AsyncView = middleware.get_response  # type: ignore[assignment]
    inner = _layers_of(get_response)
    if inner is None:
        layers = _Layers([own], get_response)
    else:
        layers = _Layers([own, *inner.layers], inner.get_response)
    middleware.__acall__ = layers.run  # type: ignore[method-assign]


def _layers_of(get_response: Any) -> _Layers | None:
    """Those of the middleware that this is, if Django has put nothing around it but what makes exceptions responses."""
    middleware = getattr(get_response, "__wrapped__", None)
    if getattr(get_response, "__code__", None) is not _CONVERTING:
        return None
    if not isinstance(middleware, MiddlewareMixin):
        return None
    if type(middleware).__call__ is not MiddlewareMixin.__call__:
        return None
    layers = getattr(middleware.__acall__, "__self__", None)
    return layers if isinstance(layers, _Layers) else None


async def _nothing(request: HttpRequest) -> HttpResponseBase:
    raise NotImplementedError


#: What ``convert_exception_to_response`` puts around async middleware.
_CONVERTING = exception.convert_exception_to_response(_nothing).__code__


def is_sync_inside(middleware: Any) -> bool:
    """Whether it only looks async: ``MiddlewareMixin`` would hand each of its hooks to a thread, for itself.

    What such a hook keeps in a ``threading.local`` is meant for the view, and for the hooks to come.
    """
    if _believes_headers(middleware):
        return True
    if not isinstance(middleware, type) or not issubclass(middleware, MiddlewareMixin):
        return False
    if middleware.__module__.startswith("django."):
        return False
    if middleware.__acall__ is not MiddlewareMixin.__acall__:
        return False
    own_call: Any = middleware.__call__
    if own_call is not MiddlewareMixin.__call__:
        return not iscoroutinefunction(own_call)
    hooks = (getattr(middleware, name, None) for name in ("process_request", "process_view"))
    return any(hook is not None and not iscoroutinefunction(hook) for hook in hooks)


def _believes_headers(middleware: Any) -> bool:
    """Whether it is ``RemoteUserMiddleware`` of Django 5.2, for which the header ``Remote-User``, which anybody can send, is
    ``REMOTE_USER`` where it is async; sync, it asks ``META`` for what its ``header`` says."""
    # It cannot be imported where its app is not installed.
    module = sys.modules.get("django.contrib.auth.middleware")
    if module is None or hasattr(module.RemoteUserMiddleware, "get_username"):
        return False
    return isinstance(middleware, type) and issubclass(middleware, module.RemoteUserMiddleware)


def put_on_loop(middleware: Any) -> Any:
    """A factory of what does the same as sync ``middleware``, in green code."""

    def factory(get_response: Any) -> Any:
        instance = middleware(async_to_sync(get_response))
        if instance is None:
            return None

        @functools.wraps(middleware, updated=())
        async def call(request: HttpRequest) -> HttpResponseBase:
            response: HttpResponseBase = await green.run(instance, request)
            return response

        for name in ("process_view", "process_template_response"):
            if (hook := getattr(instance, name, None)) is not None:
                setattr(call, name, _green_hook(hook))
        if (hook := getattr(instance, "process_exception", None)) is not None:
            call.process_exception = _on_loop_already(hook)  # type: ignore[attr-defined]
        return call

    factory.sync_capable = False  # type: ignore[attr-defined]
    factory.async_capable = True  # type: ignore[attr-defined]
    return factory


def _green_hook(hook: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    async def call(*args: Any) -> Any:
        return await green.run(hook, *args)

    call.__self__ = getattr(hook, "__self__", hook)  # type: ignore[attr-defined]  # Django asks for it
    return call


def _on_loop_already(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Django calls it sync, together with the others of its kind."""

    def call(*args: Any) -> Any:
        return hook(*args)

    call.on_loop = True  # type: ignore[attr-defined]
    return call


class _Importer:
    """What Django's handler imports middleware with: each comes with what Django is to take it for."""

    def __init__(self, import_string: Callable[[str], Any]) -> None:
        self.import_string = import_string
        self.green = set(get_config().LOOP_MIDDLEWARE)
        if unknown := self.green.difference(settings.MIDDLEWARE):
            raise ConfigurationError(
                'TORNJANGO["LOOP_MIDDLEWARE"] names what is not in MIDDLEWARE: '
                f"{', '.join(sorted(unknown))}."
            )
        sync = [path in self.green or not self._is_sync(path) for path in settings.MIDDLEWARE]
        outermost = sync.index(False) if False in sync else 0
        #: Outside of all stretches: Django would take those into the outermost one which can be sync.
        self.outside = set(settings.MIDDLEWARE[:outermost])

    def _is_sync(self, path: str) -> bool:
        middleware = self.import_string(path)
        return not getattr(middleware, "async_capable", False) or is_sync_inside(middleware)

    def __call__(self, path: str) -> Any:
        middleware = self.import_string(path)
        if path in self.green:
            return put_on_loop(middleware) if self._is_sync(path) else middleware
        taken: Any = functools.partial(middleware)
        if path in self.outside:
            taken.async_capable, taken.sync_capable = True, False
            return taken
        # A partial says nothing, and that is to be sync.
        return taken if is_sync_inside(middleware) else middleware


@contextmanager
def _imported_by(find: Callable[[str], Any]) -> Iterator[None]:
    """Inside, Django's handler imports middleware with ``find``."""
    module: Any = base
    before, module.import_string = module.import_string, find
    try:
        yield
    finally:
        module.import_string = before


class Chain(BaseHandler):
    """Django's request handling, from the first middleware to the view and back."""

    def __init__(self, views: Mapping[View, Collection[str]]) -> None:
        """``views`` are those of the URLconf, with the groups that their patterns fill; others are adapted when met.

        Raises ``ConfigurationError`` for a name in ``LOOP_MIDDLEWARE`` that ``MIDDLEWARE`` has not.
        """
        super().__init__()
        self.load_middleware(is_async=True)
        #: Nobody wants to see a response before it is rendered.
        self._render = not self._template_response_middleware  # type: ignore[attr-defined]
        self._views = {view: adapt(view, groups, self._render) for view, groups in views.items()}

    def load_middleware(self, is_async: bool = False) -> None:
        with _imported_by(_Importer(base.import_string)):  # type: ignore[attr-defined]
            super().load_middleware(is_async)
        stretches.find_locals()

    def adapt_method_mode(
        self,
        is_async: bool,
        method: Any,
        method_is_async: bool | None = None,
        debug: bool = False,
        name: str | None = None,
    ) -> Any:
        # load_middleware hands every middleware through here twice: as an instance wrapped by
        # convert_exception_to_response, and for its process_view and process_template_response.
        instance = getattr(method, "__wrapped__", None)
        if (
            isinstance(instance, MiddlewareMixin)
            and instance.async_mode
            and type(instance).__acall__ is MiddlewareMixin.__acall__
        ):
            keep_on_loop(instance)
        if is_async and method_is_async is None and not iscoroutinefunction(method):
            return on_loop(method)
        if is_async and method_is_async is False:
            return cancellation.in_thread(stretches.stretch(method))
        if not is_async and method_is_async:
            method = cancellation.from_thread(method)
        return super().adapt_method_mode(is_async, method, method_is_async, debug, name)

    def resolve_request(self, request: HttpRequest) -> ResolverMatch:
        """Uses the match that routing has found already, where the resolver would find the same again."""
        match: ResolverMatch | None = getattr(request, "route_match", None)
        if match is None or request.path_info != request.routed_path or hasattr(request, "urlconf"):  # type: ignore[attr-defined]
            routing.indexed(getattr(request, "urlconf", None))
            return super().resolve_request(request)
        request.resolver_match = match
        return match

    def make_view_atomic(self, view: View) -> AsyncView:  # type: ignore[override]
        """The last step before a view is called. Its name is Django's; `adapt` has made the transaction."""
        try:
            return self._views[view]
        except (KeyError, TypeError):  # not in the URLconf, or not hashable
            return adapt(view, (), self._render)
