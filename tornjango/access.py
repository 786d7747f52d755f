"""The access log: a line for each answer, when it is out.

``TORNJANGO["ACCESS_LOG"]`` says how it is written. "runserver" goes to Django's logger ``django.server`` and looks as it
does there. "common" is Apache's combined format, "json" an object with the keys of `_json`: both go to the logger
``tornjango.access``, and from there to standard output, unless LOGGING has a word on that logger or on ``tornjango``.

The status is the one that was sent. Where the client left before anything was, it is 499 (nginx's); where it left in the
middle, the bytes are those that were sent, and "complete" is false in the JSON. Streams are logged at their end. What the
client sent is escaped: nothing of it begins a line of its own, or ends a field.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from django.conf import settings
from django.http import HttpRequest
from django.utils.functional import LazyObject, empty
from django.utils.log import log_message
from tornado.httputil import HTTPHeaders

from tornjango.conf import Config

#: The status of a request whose client left before it was answered.
CLIENT_LEFT = 499

server_log = logging.getLogger("django.server")
access_log = logging.getLogger("tornjango.access")


class Unread:
    """In the place of a request that was refused before it was one: what is known of it."""

    def __init__(
        self, client: str, method: str | None = None, uri: str = "", version: str = ""
    ) -> None:
        self.remote_ip, self.method, self.uri, self.version = client, method or "", uri, version
        self.headers: Mapping[str, str] = HTTPHeaders()
        self._start_time = time.time()

    def request_time(self) -> float:
        return time.time() - self._start_time


class Answer(NamedTuple):
    """What is known of a request when its answer is out."""

    #: Tornado's request, or an `Unread`.
    request: Any
    status: int
    #: Bytes of content that were sent; None where nobody counted, as in a stream of a Tornado handler's.
    sent: int | None
    #: The view's name, or a Tornado handler's; empty where there was none.
    view: str = ""
    django_request: HttpRequest | None = None
    #: Whether the client had all of it.
    complete: bool = True

    @property
    def line(self) -> str:
        """The request line."""
        request = self.request
        return f"{request.method} {request.uri} {request.version}".rstrip()

    @property
    def user(self) -> str:
        """The name of the user, if something has asked for the user already; this asks no database."""
        values = vars(self.django_request) if self.django_request is not None else {}
        user = values.get("user")
        if isinstance(user, LazyObject):
            user = vars(user)["_wrapped"]
        if user is None or user is empty:
            user = values.get("_acached_user")  # which auser() keeps
        # Not get_username(), for which a field may be loaded.
        return str(vars(user).get(getattr(user, "USERNAME_FIELD", ""), "")) if user else ""


Observer = Callable[[Answer], None]


def make(config: Config) -> Observer | None:
    """What writes a line for an answer; None where none are wanted."""
    kind = config.ACCESS_LOG
    if kind == "auto":
        kind = "runserver" if settings.DEBUG else "off"
    if kind == "off":
        return None
    if kind == "runserver":
        return _log_as_runserver
    _to_stdout_unless_configured()
    return _logs(_common if kind == "common" else _json)


def _log_as_runserver(answer: Answer) -> None:
    log_message(
        server_log,
        '"%s" %s %s',
        answer.line,
        str(answer.status),
        "-" if answer.sent is None else str(answer.sent),
        request=answer.request,
        status_code=answer.status,
        server_time=time.strftime("%d/%b/%Y %H:%M:%S"),
    )


def _logs(formatted: Callable[[Answer], str]) -> Observer:
    def log(answer: Answer) -> None:
        if access_log.isEnabledFor(logging.INFO):
            # Not info(): it walks the stack to find its caller, which says nothing here, and takes as long as the rest.
            record = access_log.makeRecord(
                access_log.name, logging.INFO, __file__, 0, formatted(answer), (), None
            )
            record.status_code, record.request = answer.status, answer.request
            access_log.handle(record)

    return log


def _to_stdout_unless_configured() -> None:
    """Its own level and handler, where LOGGING leaves the logger as it was made."""
    loggers = (access_log, logging.getLogger("tornjango"))
    if any(logger.handlers or logger.level != logging.NOTSET for logger in loggers):
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access_log.addHandler(handler)
    access_log.setLevel(logging.INFO)
    access_log.propagate = False
    access_log.disabled = False  # LOGGING disables what it does not name, unless it says otherwise


# Formats


def _common(answer: Answer) -> str:
    headers = answer.request.headers
    sent = "-" if answer.sent is None else answer.sent
    return (
        f"{_word(answer.request.remote_ip)} - {_word(_utf8(answer.user))} "
        f"[{_clf_time(int(answer.request._start_time))}] "
        f'"{_escaped(answer.line or "-")}" {answer.status} {sent} '
        f'"{_escaped(headers.get("Referer") or "-")}" "{_escaped(headers.get("User-Agent") or "-")}"'
    )


def _json(answer: Answer) -> str:
    request, seconds = answer.request, answer.request.request_time()
    path, _, query = request.uri.partition("?")
    second, part = divmod(request._start_time, 1)
    fields: dict[str, Any] = {
        "time": f"{_rfc_3339(int(second))}.{int(part * 1000):03}Z",
        "client": request.remote_ip,
        "method": request.method,
        "path": path,
        "query": query,
        "status": answer.status,
        "bytes": answer.sent,
        "duration_ms": round(seconds * 1000, 2),
        "view": answer.view,
        "user_agent": request.headers.get("User-Agent", ""),
        "complete": answer.complete,
    }
    if request_id := request.headers.get("X-Request-ID"):
        fields["request_id"] = request_id
    if user := answer.user:
        fields["user"] = user
    return _encode(fields)


_encode = json.JSONEncoder(check_circular=False).encode


@lru_cache(16)
def _rfc_3339(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@lru_cache(16)
def _clf_time(second: int) -> str:
    # Not %b, which is the month in the language of the process's locale.
    at = time.localtime(second)
    return time.strftime(f"%d/{_MONTHS[at.tm_mon - 1]}/%Y:%H:%M:%S %z", at)


_UNSAFE = re.compile(r"[^ !#-\[\]-~]")
_UNSAFE_IN_WORD = re.compile(r"[^!#-\[\]-~]")


def _escaped(text: str) -> str:
    r"""As Apache does: ``\"``, ``\\``, and ``\xhh`` for what is not printable ASCII."""
    return _UNSAFE.sub(_escape, text) if _UNSAFE.search(text) else text


def _word(text: str | None) -> str:
    """For a field without quotes."""
    return _UNSAFE_IN_WORD.sub(_escape, text) if text else "-"


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    return f"\\{character}" if character in '"\\' else f"\\x{ord(character):02x}"


def _utf8(text: str) -> str:
    """Its bytes as characters, which is how Tornado has what came over the wire."""
    return text.encode("utf-8", "surrogateescape").decode("latin-1")
