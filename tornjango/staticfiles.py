"""The static files of apps in development, found and served by ``django.contrib.staticfiles``."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from asgiref.sync import sync_to_async
from django.contrib.staticfiles.handlers import StaticFilesHandlerMixin
from django.core.handlers.base import BaseHandler
from django.core.handlers.exception import convert_exception_to_response
from django.http import HttpRequest
from django.http.response import HttpResponseBase

from tornjango.handlers import DjangoHandler
from tornjango.requests import path_info


class StaticFiles(StaticFilesHandlerMixin, BaseHandler):  # type: ignore[misc]
    """Raises ``ImproperlyConfigured`` where ``STATIC_URL`` is not set."""

    def __init__(self) -> None:
        self.base_url = urlsplit(self.get_base_url())  # type: ignore[assignment]

    def should_handle(self, path: str) -> bool:
        """Whether this is for a request whose path, not yet decoded, is ``path``."""
        return bool(self._should_handle(path_info(path)))


class StaticHandler(DjangoHandler):
    """Finding and reading a file takes a worker thread; a static file passes no middleware, as under runserver."""

    view_name = "django.contrib.staticfiles.views.serve"

    async def get_response(self, request: HttpRequest) -> HttpResponseBase:
        static = self.application.static
        assert static is not None
        # A path that leads out of an app's folder is answered 400, where runserver would fail.
        serve: Any = convert_exception_to_response(static.serve)
        response: HttpResponseBase = await sync_to_async(serve)(request)
        return response
