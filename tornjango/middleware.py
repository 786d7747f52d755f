"""Django's middleware chain, built once by Django's ``BaseHandler``, run on the loop.

Under ASGI, ``MiddlewareMixin`` sends every ``process_request`` and ``process_response`` through a thread, because it
cannot know whether they wait. Django's own are known: ``WAITS`` says of each when it would, and then it runs green. So
its queries need no thread. What else it may wait for (a cache or a session store elsewhere, mail, a large form) takes one
by itself: see ``tornjango.blocking``, which decides by the class that SESSION_ENGINE, CACHES and the like name.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from asgiref.sync import iscoroutinefunction, sync_to_async
from django.conf import settings
from django.core.handlers.base import BaseHandler
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.urls import ResolverMatch
from django.utils.deprecation import MiddlewareMixin

from tornjango import green, routing
from tornjango.requests import PARSED_ON_THE_LOOP
from tornjango.views import AsyncView, View, adapt

Waits = Callable[..., bool]


def _never(*args: Any) -> bool:
    return False


def _always(*args: Any) -> bool:
    return True


def _csrf_in_session(*args: Any) -> bool:
    return bool(settings.CSRF_USE_SESSIONS)


def _csrf_reads_body(request: HttpRequest, *args: Any) -> bool:
    return _csrf_in_session() or getattr(request, "body_size", 0) > PARSED_ON_THE_LOOP


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
    "django.middleware.csrf.CsrfViewMiddleware.process_view": _csrf_reads_body,
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
        return sync_to_async(hook)

    async def call(*args: Any) -> Any:
        return await green.run(hook, *args) if waits(*args) else hook(*args)

    return call


def keep_on_loop(middleware: MiddlewareMixin) -> None:
    """Replaces what ``MiddlewareMixin`` does under ASGI, for this instance: hooks that never wait are simply called."""
    before, before_async = _in_two_ways(getattr(middleware, "process_request", None))
    after, after_async = _in_two_ways(getattr(middleware, "process_response", None))
    get_response: AsyncView = middleware.get_response  # type: ignore[assignment]

    async def acall(request: HttpRequest) -> HttpResponseBase:
        response = None
        if before is not None:
            response = before(request)
        elif before_async is not None:
            response = await before_async(request)
        response = response or await get_response(request)
        if after is not None:
            response = after(request, response)
        elif after_async is not None:
            response = await after_async(request, response)
        return response

    middleware.__acall__ = acall  # type: ignore[method-assign]


def _in_two_ways(hook: Callable[..., Any] | None) -> tuple[Any, Any]:
    """A hook to be called, or one to be awaited, or neither."""
    if hook is None:
        return None, None
    return (hook, None) if waits_of(hook) is _never else (None, on_loop(hook))


class Chain(BaseHandler):
    """Django's request handling, from the first middleware to the view and back."""

    def __init__(self, views: dict[View, AsyncView]) -> None:
        """``views`` holds what to await for each view, made at start; others are adapted when they are met."""
        super().__init__()
        self._views = views
        self.load_middleware(is_async=True)

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
            return adapt(view)
