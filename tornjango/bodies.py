"""Request bodies on their way in: kept, on disk if they are large, or refused."""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
from collections.abc import Awaitable
from io import BytesIO
from typing import IO, TYPE_CHECKING, Any

from django.conf import settings
from django.urls import ResolverMatch
from tornado.httputil import HTTPHeaders, HTTPMessageDelegate, HTTPServerRequest

from tornjango.access import Answer
from tornjango.conf import get_config
from tornjango.exceptions import Overloaded
from tornjango.sending import write_plainly

if TYPE_CHECKING:
    from tornjango.application import Application
    from tornjango.handlers import DjangoHandler

logger = logging.getLogger("tornjango.bodies")

#: What a client may still send of a body that is refused, before its connection is closed: closing on unread data
#: resets the answer away (RFC 9112, 9.6). In bytes, and in seconds.
DROPPED_BYTES = 4 * 1024 * 1024
DROPPED_SECONDS = 5.0


class Body:
    """A request's body as it arrives: in memory, and past Django's limit for uploads in a temporary file."""

    def __init__(self) -> None:
        self.size = 0
        self._file: IO[bytes] | None = None

    @property
    def on_disk(self) -> bool:
        """Whether the next ``write`` goes to the disk, and is better done in a worker thread."""
        return self.size > settings.FILE_UPLOAD_MAX_MEMORY_SIZE

    def write(self, chunk: bytes) -> None:
        if self._file is None:
            self._file = tempfile.SpooledTemporaryFile(  # noqa: SIM115  close() does
                max_size=settings.FILE_UPLOAD_MAX_MEMORY_SIZE or 1,  # of 0 it would make "no limit"
                mode="w+b",
                dir=settings.FILE_UPLOAD_TEMP_DIR,
            )
        self._file.write(chunk)

    def open(self) -> IO[bytes]:
        """The whole body, from its start."""
        if self._file is None:
            return BytesIO()
        self._file.seek(0)
        return self._file

    def close(self) -> None:
        """Gives back the memory, or removes the file; a second time does nothing."""
        if self._file is not None:
            self._file.close()


class BodyReceiver(HTTPMessageDelegate):
    """Takes a request's body as it comes, and starts the handler when it is there."""

    def __init__(
        self,
        application: Application,
        request: HTTPServerRequest,
        handler_class: type[DjangoHandler],
        match: ResolverMatch | None,
    ) -> None:
        self.application = application
        self.request = request
        self.handler_class = handler_class
        self.match = match
        self.body = Body()
        self._limit = get_config().MAX_BODY_SIZE
        #: Bytes that came after the request was refused; None while it is not.
        self._dropped: int | None = None
        self._arrived: asyncio.Future[None] | None = None
        #: What a worker thread is writing to the disk.
        self._writing: asyncio.Future[None] | None = None

    def headers_received(self, start_line: Any, headers: HTTPHeaders) -> None:
        if "Content-Length" not in headers and "Transfer-Encoding" not in headers:
            return
        self._arrived = asyncio.get_running_loop().create_future()
        self._arrived.add_done_callback(self.application.arriving.discard)
        self.application.arriving.add(self._arrived)
        connection: Any = self.request.connection
        connection.set_max_body_size(sys.maxsize)  # ours answers 413, Tornado's a bare 400
        declared = headers.get("Content-Length", "")
        # What is not a number, or one of thousands of digits, Tornado refuses when it reads the body.
        if declared.isdecimal() and len(declared) < 20 and int(declared) > self._limit:
            connection.set_body_timeout(DROPPED_SECONDS)
            self._refuse_size()
            if "Expect" in headers:  # it waits for a word before it sends anything
                connection.finish()

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        if self._dropped is not None:
            self._drop(chunk)
            return None
        self.body.size += len(chunk)
        if self.body.size > self._limit:
            self._refuse_size()
        elif self.body.on_disk:
            return self._write_to_disk(chunk)
        else:
            self.body.write(chunk)
        return None

    def finish(self) -> None:
        if self._dropped is None:
            handler = self.handler_class(self.application, self.request)
            handler.start(self.body, self.match)
        else:
            self._hang_up()
        self._end_arrival()

    def on_connection_close(self) -> None:
        if self._writing is None or self._writing.done():
            self.body.close()
            self._end_arrival()
        else:  # not under the thread that writes
            self._writing.add_done_callback(self._close_written)

    def _close_written(self, writing: asyncio.Future[None]) -> None:
        self.body.close()
        self._end_arrival()
        if not writing.cancelled() and (error := writing.exception()) is not None:
            logger.info("A body that nobody waits for was not written: %s", error)

    def _end_arrival(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    async def _write_to_disk(self, chunk: bytes) -> None:
        loop, pool = asyncio.get_running_loop(), self.application.workers.pool
        try:
            self._writing = loop.run_in_executor(pool, self.body.write, chunk)
            await asyncio.shield(self._writing)
        except Overloaded as exc:
            self._refuse(503, str(exc), "The server is busy. Please try again in a moment.")
        except OSError as exc:  # the disk is full, say
            reason = "The server cannot store the request body."
            self._refuse(507, f"{reason} ({exc})", reason)

    def _refuse_size(self) -> None:
        reason = f"The request body is larger than {self._limit} bytes."
        self._refuse(413, reason, reason)

    def _refuse(self, status: int, log: str, reason: str) -> None:
        self._dropped = 0
        self.body.close()
        request = self.request
        logger.warning("%s %s from %s: %s", request.method, request.path, request.remote_ip, log)
        sent = write_plainly(request.connection, request.method, status, reason)
        self.application.answered(Answer(request, status, sent, self.handler_class.view_name))

    def _drop(self, chunk: bytes) -> None:
        self._dropped = (self._dropped or 0) + len(chunk)
        if self._dropped > DROPPED_BYTES:
            self._hang_up()

    def _hang_up(self) -> None:
        connection: Any = self.request.connection
        connection.finish()
        connection.close()
