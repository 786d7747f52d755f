"""From the URLconf to a ``tornado.web.Application``."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import django
from django.apps import apps
from django.conf import settings
from django.urls import NoReverseMatch, reverse
from django.utils.module_loading import autodiscover_modules
from tornado.httputil import (
    HTTPHeaders,
    HTTPInputError,
    HTTPMessageDelegate,
    HTTPServerRequest,
    RequestStartLine,
)
from tornado.routing import AnyMatches, Router, Rule
from tornado.web import Application as TornadoApplication
from tornado.web import RequestHandler, _HandlerDelegate

from tornjango import access, templates
from tornjango.access import Answer, Unread
from tornjango.bodies import BodyReceiver
from tornjango.conf import Config, get_config
from tornjango.db import pools
from tornjango.handlers import DjangoHandler
from tornjango.middleware import Chain
from tornjango.monitoring import Monitor
from tornjango.proxies import Proxies
from tornjango.requests import ServerRequest, path_info, script_name
from tornjango.routing import Route, Routes, is_handler
from tornjango.sending import refuse_on
from tornjango.staticfiles import Media, StaticFiles, StaticRoot
from tornjango.views import is_cancelled_on_disconnect, view_name
from tornjango.workers import Workers

logger = logging.getLogger("tornjango.application")

#: How long requests may take to notice that they are ended, in seconds.
END_TIMEOUT = 1.0


class Application(TornadoApplication):
    """A Django project as a Tornado application: handlers are built from its URL patterns.

    ``handlers`` are Tornado routes of the program's own; they are asked before the URLconf. Whoever makes an
    application by hand closes it with ``await application.close()``, on the loop that served it.
    """

    def __init__(
        self,
        handlers: Any = None,
        default_host: str | None = None,
        transforms: Any = None,
        *,
        staticfiles: bool | None = None,
        **settings: Any,
    ) -> None:
        """With ``staticfiles`` the files of apps are found and served, as in development; with False, no static files.

        Without it, those of ``STATIC_ROOT`` are, if ``TORNJANGO["STATIC"]`` says so and ``DEBUG`` is off. Raises what
        importing the URLconf raises, and ``ConfigurationError`` for a wrong setting.
        """
        if not apps.ready:
            django.setup()
        config = get_config()
        super().__init__(handlers, default_host, transforms, **settings)
        self.proxies = (
            Proxies(config.TRUSTED_PROXIES, config.PROXY_HEADERS)
            if config.TRUSTED_PROXIES
            else None
        )
        #: What is told of each answer: the access log, and the metrics.
        self.observers = [log] if (log := access.make(config)) else []
        #: What is told to whoever watches the server, if anything.
        self.monitor = Monitor(self, config)
        self.draining = False
        #: The requests that are being answered.
        self.in_flight: set[DjangoHandler] = set()
        #: The requests whose bodies are on their way; each is done when its handler starts, or its client leaves.
        self.arriving: set[asyncio.Future[None]] = set()
        #: What Tornado handlers of the project's own are doing; for a WebSocket, as long as it is open.
        self.native: dict[asyncio.Future[None], RequestHandler] = {}
        self.workers = Workers(config.THREADS, config.THREADS_QUEUE)
        try:
            self._load(staticfiles, config)
        except BaseException:
            self.workers.close()
            raise

    def _load(self, staticfiles: bool | None, config: Config) -> None:
        """What is made of the project: all that may be wrong in it shows here."""
        self.static = _static_files(staticfiles, config)
        self.media = Media()
        self.routes = Routes()
        views = [route for route in self.routes if not route.is_handler]
        self.chain = Chain({route.callback: route.groups for route in views})
        #: A handler class for each view of the URLconf.
        self.handler_classes = HandlerClasses(views)
        self.problems = templates.registry.fill()
        for problem in self.problems:
            logger.error("Template problem: %s", problem)
        autodiscover_modules("channels")  # where the app is installed, it has done so
        pools.open()
        rules = self.monitor.rules
        self.wildcard_router.add_rules([*rules, Rule(AnyMatches(), DjangoRouter(self))])

    def start_request(self, server_conn: object, request_conn: Any) -> HTTPMessageDelegate:
        return RequestReceiver(self, server_conn, request_conn)

    def get_handler_delegate(self, *args: Any, **kwargs: Any) -> NativeDelegate:
        return NativeDelegate(self, *args, **kwargs)

    def answered(self, answer: Answer) -> None:
        for observer in self.observers:
            observer(answer)

    def refused(
        self, context: Any, start_line: RequestStartLine | None, status: int, sent: int
    ) -> None:
        """What could not be read, or not be taken, was answered without a handler."""
        self.answered(Answer(Unread(context.remote_ip, *(start_line or ())), status, sent))

    def log_request(self, handler: RequestHandler) -> None:
        """Tornado's: for its own handlers, when their answer is out. Django's tell of theirs by themselves."""
        if "log_function" in self.settings:
            super().log_request(handler)
        status, size = handler.get_status(), handler._headers.get("Content-Length")
        bodyless = handler.request.method == "HEAD" or status in (101, 204, 304)
        sent = 0 if bodyless else None if size is None else int(size)
        self.answered(Answer(handler.request, status, sent, view_name(type(handler))))

    def reverse_url(self, name: str, *args: Any) -> str:
        """The URL of a named Tornado route, or of a named URL pattern of Django's. Raises ``KeyError``."""
        try:
            return super().reverse_url(name, *args)
        except KeyError:
            try:
                return reverse(name, args=args)
            except NoReverseMatch as exc:
                raise KeyError(str(exc)) from exc

    async def close(self) -> None:
        """Ends requests still in flight with 503, closes the pools, gives back the threads; harmless a second time.

        A request whose view is in a worker thread cannot be ended: it is not waited for longer than ``END_TIMEOUT``.
        """
        if self.in_flight:
            tasks = [handler.task for handler in self.in_flight]
            for handler in list(self.in_flight):
                handler.stop()
            await asyncio.wait(tasks, timeout=END_TIMEOUT)
        await pools.close()
        self.workers.close()


def _static_files(found: bool | None, config: Config) -> StaticFiles | StaticRoot | None:
    if found:
        return StaticFiles()
    in_root = found is None and config.STATIC and not settings.DEBUG
    return StaticRoot(config.STATIC_CACHE) if in_root else None


class HandlerClasses(dict[Any, type[DjangoHandler]]):
    """By view: made when it is asked for first. Views that were not in the URLconf at start have one for all."""

    def __init__(self, routes: Iterable[Route]) -> None:
        super().__init__()
        self._patterns = {route.callback: route.pattern for route in routes}

    def __missing__(self, view: Any) -> type[DjangoHandler]:
        if view not in self._patterns:
            return DjangoHandler
        name = view_name(view)
        attributes = {
            "view_name": name,
            "cancels": is_cancelled_on_disconnect(view),
            "__doc__": f"Answers {self._patterns[view]} with {name}.",
        }
        made = type(f"{name.rpartition('.')[2]}_handler", (DjangoHandler,), attributes)
        self[view] = made
        return made


class DjangoRouter(Router):
    """Finds the handler for a path where Django's resolver finds the view."""

    def __init__(self, application: Application) -> None:
        self.application = application

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> HTTPMessageDelegate:
        application = self.application
        path = path_info(request.path, script_name())
        if application.static is not None:
            receiver = application.static.receiver(application, request, path)
            if receiver is not None:
                return receiver
        match = application.routes.match(path)
        if match is None and (media := application.media.match(path)) is not None:
            return BodyReceiver(application, request, DjangoHandler, media)
        if match is None:  # Django's middleware may know better, and its 404 page says more
            return BodyReceiver(application, request, DjangoHandler, None)
        if is_handler(match.func):
            return self._native(request, match)
        handler_class = application.handler_classes[match.func]
        known = None if application.routes.vary else match
        return BodyReceiver(application, request, handler_class, known)

    def _native(self, request: HTTPServerRequest, match: Any) -> HTTPMessageDelegate:
        """Tornado's way: what the path captures goes to the method as strings, the rest to ``initialize``."""
        captured = match.captured_kwargs or {}
        return self.application.get_handler_delegate(
            request,
            match.func,
            target_kwargs=match.extra_kwargs or {},
            path_args=[str(argument) for argument in match.args],
            path_kwargs={name: str(value) for name, value in captured.items()},
        )


class NativeDelegate(_HandlerDelegate):
    """Tornado's own way with a handler of the project's own, of which the application knows until it is done."""

    def __init__(
        self,
        application: Application,
        request: HTTPServerRequest,
        target_class: type[RequestHandler],
        target_kwargs: dict[str, Any] | None = None,
        path_args: list[bytes] | None = None,
        path_kwargs: dict[str, bytes] | None = None,
    ) -> None:
        super().__init__(application, request, target_class, target_kwargs, path_args, path_kwargs)
        self._class = target_class
        self._native = application.native
        self.handler_class = self._make  # type: ignore[assignment]

    def _make(self, *args: Any, **kwargs: Any) -> RequestHandler:
        handler = self._class(*args, **kwargs)
        # Not the handler itself: it would never be freed but by the garbage collector.
        handler._execute = partial(self._run, weakref.ref(handler))  # type: ignore[method-assign,assignment]
        return handler

    def _run(
        self, reference: weakref.ref[RequestHandler], *args: Any, **kwargs: Any
    ) -> asyncio.Future[None]:
        handler = reference()
        assert handler is not None  # execute() has it
        task = asyncio.ensure_future(self._class._execute(handler, *args, **kwargs))
        self._native[task] = handler
        task.add_done_callback(self._native.pop)
        return task


class RequestReceiver(HTTPMessageDelegate):
    """Makes a request of its line and headers, and finds who answers it; what is not a request is refused."""

    def __init__(self, application: Application, server_conn: object, request_conn: Any) -> None:
        self.application = application
        self.server_conn = server_conn
        self.request_conn = request_conn
        self.delegate: HTTPMessageDelegate | None = None

    def headers_received(self, start_line: Any, headers: HTTPHeaders) -> Any:
        try:
            request = ServerRequest(
                self.request_conn,
                start_line,
                headers,
                self.server_conn,
                self.application.proxies,
            )
        except HTTPInputError as exc:
            logger.warning("Bad request from %s: %s", self.request_conn.context, exc)
            sent = refuse_on(self.request_conn, start_line.method, 400, f"Bad request: {exc}")
            self.application.refused(self.request_conn.context, start_line, 400, sent)
            return None
        self.delegate = self.application.find_handler(request)
        return self.delegate.headers_received(start_line, headers)

    def data_received(self, chunk: bytes) -> Any:
        return self.delegate.data_received(chunk) if self.delegate else None

    def finish(self) -> None:
        if self.delegate:
            self.delegate.finish()

    def on_connection_close(self) -> None:
        if self.delegate:
            self.delegate.on_connection_close()
