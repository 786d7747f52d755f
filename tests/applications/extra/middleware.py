"""Middleware as third parties write it: a sync function, and a class of the old kind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.utils.deprecation import MiddlewareMixin

_state = threading.local()


def who() -> str:
    """What a library makes of `threading.local`: the request's user, for code that has no request."""
    return str(_state.user)


def visits(get_response: Callable[[HttpRequest], HttpResponseBase]) -> Any:
    def middleware(request: HttpRequest) -> HttpResponseBase:
        _state.user = request.user
        try:
            response = get_response(request)
        finally:
            del _state.user
        count = int(request.COOKIES.get("visits", "0"))
        response.set_cookie("visits", str(count + 1), samesite="Lax")
        return response

    return middleware


class Timing(MiddlewareMixin):
    def process_request(self, request: HttpRequest) -> None:
        request.META["extra.seen"] = "yes"

    def process_view(
        self, request: HttpRequest, view: Any, args: Any, kwargs: Any
    ) -> HttpResponseBase | None:
        return HttpResponse("by middleware") if "short" in request.GET else None

    def process_exception(self, request: HttpRequest, exc: Exception) -> HttpResponseBase | None:
        if isinstance(exc, LookupError):
            return HttpResponse(f"caught {exc}", status=418)
        return None

    def process_response(
        self, request: HttpRequest, response: HttpResponseBase
    ) -> HttpResponseBase:
        response["X-Seen"] = request.META["extra.seen"]
        return response
