"""Knots that Django ties, so that only the garbage collector would free a request, some time; its end unties them.

``request.user``, ``auser`` and the messages lead back to their request: whoever holds that still, a task that it has set
going, say, is given a user made anew, as ``AuthenticationMiddleware`` makes it. A response that sends a file leads back
to itself, and so does a template's context.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.template.backends import django as backend
from django.template.context import Context, ContextDict, make_context
from django.utils.functional import SimpleLazyObject

_UNTIED = "_tornjango_untied"
_AUTH = "django.contrib.auth.middleware"
_MESSAGES = "django.contrib.messages."


def untie(request: HttpRequest) -> None:
    """For a request that has been answered, and its response closed: its messages are stored, or never will be."""
    held = request.__dict__
    if _is_djangos_user(held.get("user")):
        del held["user"]
        held.pop("auser", None)
        held[_UNTIED] = True
    if type(held.get("_messages")).__module__.startswith(_MESSAGES):
        del held["_messages"]


def untie_file(response: HttpResponseBase) -> None:
    """For a response that is closed: what would read its file is a function that holds the response."""
    if getattr(response, "file_to_stream", None) is not None:
        response.streaming_content = ()  # type: ignore[attr-defined]


def replacements() -> Iterator[tuple[Any, str, Any]]:
    """Owner, name, and what is to be there while tornjango serves."""
    yield backend, "make_context", _make_context


def _make_context(*args: Any, **kwargs: Any) -> Context:
    context = make_context(*args, **kwargs)
    for layer in context.dicts:
        if isinstance(layer, ContextDict):
            layer.context = weakref.proxy(context)
    return context


def _is_djangos_user(user: object) -> bool:
    if type(user) is not SimpleLazyObject:
        return False
    setup = object.__getattribute__(user, "__dict__").get("_setupfunc")
    return getattr(setup, "__module__", None) == _AUTH


class Retied:
    """An attribute of requests: what the middleware sets goes before it, and after `untie` it makes the same again."""

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self.name = name

    def __get__(self, request: Any, owner: type[Any]) -> Any:
        if request is None:
            return self
        if _UNTIED not in request.__dict__:
            raise AttributeError(f"{owner.__name__!r} object has no attribute {self.name!r}")
        # It cannot be imported where its app is not installed.
        from django.contrib.auth.middleware import AuthenticationMiddleware

        AuthenticationMiddleware(lambda request: None).process_request(request)  # type: ignore[arg-type]
        return request.__dict__[self.name]
