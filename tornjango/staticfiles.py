"""Static files: those of apps, found in development; those of ``STATIC_ROOT``, in production. And media, in development.

A static file passes no middleware, as under ``runserver`` and behind nginx. In production it is no Django request either:
what is in memory is answered without a thread, a task or a signal.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from asgiref.sync import sync_to_async
from django.conf import settings
from django.conf.urls.static import static
from django.contrib.staticfiles.handlers import StaticFilesHandlerMixin
from django.contrib.staticfiles.storage import staticfiles_storage
from django.contrib.staticfiles.utils import check_settings
from django.core.handlers.base import BaseHandler
from django.core.handlers.exception import convert_exception_to_response
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.urls import ResolverMatch
from tornado.httputil import (
    HTTPHeaders,
    HTTPMessageDelegate,
    HTTPServerRequest,
    ResponseStartLine,
)

from tornjango.access import Answer
from tornjango.bodies import Body, BodyReceiver
from tornjango.exceptions import ConfigurationError
from tornjango.files import Changed, File, Folder, Memory, Reply
from tornjango.handlers import DjangoHandler
from tornjango.ranges import Part
from tornjango.reading import Reader
from tornjango.requests import path_info, script_name
from tornjango.routing import is_handler
from tornjango.sending import Sending, close_after, is_closed, stamp
from tornjango.views import view_name

if TYPE_CHECKING:
    from tornjango.application import Application

logger = logging.getLogger("tornjango.staticfiles")

T = TypeVar("T")

#: What is written at a time of content in memory, in bytes; what is no larger is written together with the headers.
AT_ONCE = 256 * 1024
#: How often a file is looked at again when it changes while it is being answered.
LOOKS = 3


def _below_script(url_path: str) -> str:
    """A URL's path as the project sees it: without its script name."""
    prefix = script_name()
    return url_path.removeprefix(prefix) if url_path.startswith(f"{prefix}/") else url_path


# In development


class StaticFiles(StaticFilesHandlerMixin, BaseHandler):  # type: ignore[misc]
    """The files of apps and of ``STATICFILES_DIRS``, found anew for each request by ``django.contrib.staticfiles``.

    Raises ``ImproperlyConfigured`` where ``STATIC_URL`` is not set.
    """

    def __init__(self) -> None:
        self.base_url = urlsplit(self.get_base_url())  # type: ignore[assignment]
        self._prefix = None if self.base_url.netloc else _below_script(self.base_url.path)

    def receiver(
        self, application: Application, request: HTTPServerRequest, path: str
    ) -> HTTPMessageDelegate | None:
        """Who answers ``path``, which is decoded and below the script name; None where that is not for this."""
        if self._prefix is None or not path.startswith(self._prefix):
            return None
        return BodyReceiver(application, request, FoundHandler, None)


class FoundHandler(DjangoHandler):
    """Finding and reading a file takes a worker thread."""

    view_name = "django.contrib.staticfiles.views.serve"

    async def get_response(self, request: HttpRequest) -> HttpResponseBase:
        static = self.application.static
        assert isinstance(static, StaticFiles)
        # A path that leads out of an app's folder is answered 400, where runserver would fail.
        serve: Any = convert_exception_to_response(static.serve)
        response: HttpResponseBase = await sync_to_async(serve)(request)
        return response


class Media:
    """Where ``DEBUG`` is on: what no URL pattern answers, as if this stood at the end of them::

        urlpatterns += static(settings.MEDIA_URL, document_root=settings.MEDIA_ROOT)

    Without ``MEDIA_ROOT``, with ``MEDIA_URL`` on another host or for all paths ("/"), there is nothing.
    """

    def __init__(self) -> None:
        url = settings.MEDIA_URL or ""
        prefix = _below_script(url)
        usable = settings.MEDIA_ROOT and prefix.strip("/")
        self._patterns = static(prefix, document_root=settings.MEDIA_ROOT) if usable else []

    def match(self, path: str) -> ResolverMatch | None:
        """The match for ``path``, which is decoded and below the script name."""
        for pattern in self._patterns:
            return pattern.resolve(path.removeprefix("/"))
        return None


# In production


class StaticRoot:
    """The files of ``STATIC_ROOT`` below the path of ``STATIC_URL``, whatever host that names (a CDN asks, say)."""

    def __init__(self, limit: int) -> None:
        """``limit`` is that of the memory for all files, in bytes. Waits for the disk. Raises ``ImproperlyConfigured``."""
        check_settings()
        self.prefix = _below_script(f"/{urlsplit(settings.STATIC_URL or '').path.lstrip('/')}")
        self.memory = Memory(limit)
        self.folder = _open_root()
        if stale := self.folder.stale:
            logger.warning(
                "%d compressed files in STATIC_ROOT are older than their originals, and are not used: %s",
                len(stale),
                ", ".join(stale[:5]) + (", ..." if len(stale) > 5 else ""),
            )

    def receiver(
        self, application: Application, request: HTTPServerRequest, path: str
    ) -> HTTPMessageDelegate | None:
        """Who answers ``path``, which is decoded and below the script name; None where that is not for this.

        Known files go before URL patterns. What is not known may have come since: it is looked for before Django is asked.
        """
        if not path.startswith(self.prefix):
            return None
        file = self.folder.files.get(path[len(self.prefix) :])
        if file is not None:
            return FileReceiver(application, request, file)
        if request.method in ("GET", "HEAD") and self._may_have_come(application, path):
            return BodyReceiver(application, request, StaticHandler, None)
        return None

    def _may_have_come(self, application: Application, path: str) -> bool:
        try:
            match = application.routes.match(path)
        except Exception:  # noqa: BLE001  a converter's own: Django meets it again, where it answers errors
            return True
        # Not for each request of a project whose STATIC_URL is the root; and a Tornado handler could not be left to later.
        return match is None or (self.prefix != "/" and not is_handler(match.func))


def _open_root() -> Folder:
    root = settings.STATIC_ROOT
    if not root:
        raise ConfigurationError(
            'TORNJANGO["STATIC"] is on, but STATIC_ROOT is not set. Set it to the folder that collectstatic is to fill.'
        )
    try:
        return Folder(os.fspath(root), _hashed_names)
    except OSError as exc:
        raise ConfigurationError(
            f'TORNJANGO["STATIC"] is on, but STATIC_ROOT cannot be read: {exc}. Has collectstatic been run?'
        ) from exc


def _hashed_names() -> Iterable[str]:
    """The names that the storage's manifest gives, as it is now; other storages than those with a manifest give none."""
    load = getattr(staticfiles_storage, "load_manifest", None)
    if load is None:
        return ()
    try:
        paths, _ = load()
    except ValueError as exc:
        raise ConfigurationError(f"The manifest in STATIC_ROOT cannot be read: {exc}") from exc
    names: Iterable[str] = paths.values()
    return names


class FileReceiver(HTTPMessageDelegate):
    """Answers with a file when the request is all there; a body, which means nothing here, goes by."""

    def __init__(self, application: Application, request: HTTPServerRequest, file: File) -> None:
        self.application = application
        self.request = request
        self.file = file

    def headers_received(self, start_line: Any, headers: HTTPHeaders) -> None:
        pass

    def data_received(self, chunk: bytes) -> None:
        pass

    def finish(self) -> None:
        StaticHandler(self.application, self.request).answer_with(self.file)

    def on_connection_close(self) -> None:
        pass


class StaticHandler(DjangoHandler):
    """Answers with a file of ``STATIC_ROOT``; where there is none (any more), as Django would without this.

    The signals ``request_started`` and ``request_finished`` are sent only where Django answers.
    """

    view_name = "tornjango.staticfiles"
    _file: File | None = None
    #: What was written at once, and the system has not yet taken.
    _written: tuple[Reply, bytes, asyncio.Future[None]] | None = None

    def answer_with(self, file: File) -> None:
        """At once, if the content is in memory and the client takes it; else as a task."""
        connection: Any = self.request.connection
        if is_closed(connection):
            return
        self._file = file
        reply = self._reply_with(file)
        content = self._at_hand(reply)
        if content is not None and len(content) <= AT_ONCE:
            written = _write_head(connection, reply, content, last=self.application.draining)
            if written.done() and written.exception() is None:
                connection.finish()
                self._tell_at_once(reply, len(content))
                return
            self._written = reply, content, written
        self.start(Body(), None)

    def _reply_with(self, file: File) -> Reply:
        return file.reply(self.request.method or "", self.request.headers)

    def _at_hand(self, reply: Reply) -> bytes | None:
        """The content that goes out, if nothing has to be read for it."""
        if reply.variant is None or reply.part is None:
            return b""
        content = self._static_root.memory.get(reply.variant)
        return None if content is None else _part_of(content, reply.part)

    def _tell_at_once(self, reply: Reply, sent: int) -> None:
        if self.application.observers:
            self.application.answered(Answer(self.request, reply.status, sent, self.view_name))

    @property
    def _static_root(self) -> StaticRoot:
        static = self.application.static
        assert isinstance(static, StaticRoot)
        return static

    # As a task

    async def _answer(self) -> None:
        self.application.workers.enter()
        sending = self._sending = FileSending(self.request.connection, self.request, self._cut)
        if self._written is not None:
            await sending.end_what_was_written(*self._written)
            return
        for look in range(LOOKS):
            file = self._file or await self._look_again()
            if file is None:
                await self._leave_to_django()
                return
            try:
                await self._send_reply(sending, self._reply_with(file))
                return
            except Changed:
                if sending.begun or look == LOOKS - 1:
                    raise
                self._file = None

    async def _look_again(self) -> File | None:
        root = self._static_root
        name = path_info(self.request.path, script_name())[len(root.prefix) :]
        return await self._in_worker(root.folder.look_again, name)

    async def _leave_to_django(self) -> None:
        await super()._answer()
        match = self._django_request.resolver_match if self._django_request is not None else None
        self.view_name = view_name(match.func) if match is not None else ""

    async def _send_reply(self, sending: FileSending, reply: Reply) -> None:
        last = self.application.draining
        content = self._at_hand(reply)
        if content is None:
            content = await self._read_whole(reply)
        if content is not None:
            await sending.send_content(reply, content, last=last)
            return
        assert reply.variant is not None
        opening = self._in_worker(reply.variant.open)
        try:
            file = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_opened)
            raise
        with file:
            await sending.send_part(reply, file, last=last)

    async def _read_whole(self, reply: Reply) -> bytes | None:
        """The content that goes out; None where the file is not kept in memory."""
        if reply.variant is None or reply.part is None:
            return b""
        reading = self._static_root.memory.read(reply.variant, self._in_worker)
        # Others may wait for the same.
        return None if reading is None else _part_of(await asyncio.shield(reading), reply.part)

    def _in_worker(self, fn: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Raises ``Overloaded``."""
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self.application.workers.pool, fn, *args)


class FileSending(Sending):
    """Sends what `File.reply` says."""

    async def send_content(self, reply: Reply, content: bytes, *, last: bool) -> None:
        """``content`` is what goes out; it is written a piece at a time, so that it is not copied for a slow client."""
        await self._begin(reply, content[:AT_ONCE], last)
        for start in range(AT_ONCE, len(content), AT_ONCE):
            await self.write(content[start : start + AT_ONCE])
        self._finish()

    async def send_part(self, reply: Reply, file: BinaryIO, *, last: bool) -> None:
        """Raises `Changed` where the file ends before its time."""
        assert reply.part is not None
        reader = Reader(file, skip=reply.part.start, length=reply.part.length)
        await self._begin(reply, await reader.read(), last)
        while chunk := await reader.read():
            await self.write(chunk)
        if self.sent < reply.part.length:
            raise Changed(f"{file.name} has become shorter while it was sent.")
        self._finish()

    async def end_what_was_written(
        self, reply: Reply, content: bytes, written: asyncio.Future[None]
    ) -> None:
        self._note(reply, content)
        await self.flushed(written)
        self._finish()

    async def _begin(self, reply: Reply, content: bytes, last: bool) -> None:
        written = _write_head(self.connection, reply, content, last=last)
        self._note(reply, content)
        await self.flushed(written)

    def _note(self, reply: Reply, content: bytes) -> None:
        self.begun, self.status, self.sent = True, reply.status, len(content)


def _write_head(
    connection: Any, reply: Reply, content: bytes, *, last: bool
) -> asyncio.Future[None]:
    headers = HTTPHeaders()
    for name, value in reply.headers:
        headers[name] = value
    stamp(headers)
    if last:
        headers["Connection"] = "close"
        close_after(connection)
    start_line = ResponseStartLine("HTTP/1.1", reply.status, HTTPStatus(reply.status).phrase)
    written: asyncio.Future[None] = connection.write_headers(start_line, headers, content)
    return written


def _part_of(content: bytes, part: Part) -> bytes:
    start, length = part
    return content if length == len(content) else content[start : start + length]


def _close_opened(opening: asyncio.Future[BinaryIO]) -> None:
    """Whoever asked for the file has left."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
