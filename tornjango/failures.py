"""What Django does about an exception, for async views on the loop: error pages, logs and ``got_request_exception``.

Django sends all of it to a thread, since it may query and the project's own code may be called. Here Django's own part is
green code, and what a project has put into it has a worker thread for itself: its ``handler404`` and the like, unless it
has sync views run green; the receivers of the signal; and mail to ADMINS, with the report that it is made of.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from django.conf import settings
from django.core.handlers import exception
from django.core.signals import got_request_exception
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.middleware import csrf
from django.template import TemplateDoesNotExist, loader
from django.template.response import SimpleTemplateResponse
from django.urls import URLResolver
from django.utils.log import AdminEmailHandler, log_response
from django.views import defaults
from django.views.csrf import csrf_failure

from tornjango import green
from tornjango.exceptions import Overloaded

logger = logging.getLogger("tornjango.failures")

Page = Callable[..., HttpResponseBase]

#: Django's own pages, for when no thread is free for the project's.
PAGES: dict[int, Page] = {
    400: defaults.bad_request,
    403: defaults.permission_denied,
    404: defaults.page_not_found,
    500: defaults.server_error,
}


def busy(exc: Overloaded, what: str, request: HttpRequest) -> HttpResponse:
    """The answer where a bounded queue is full, logged: 503 with ``Retry-After``."""
    text = "The server is busy. Please try again in a moment."
    response = HttpResponse(text, status=503, content_type="text/plain")
    response["Retry-After"] = str(exc.retry_after)
    message = "%s is answered 503: %s"
    log_response(message, what, exc, response=response, request=request, logger=logger)
    return response


class _Loader:
    """Django's template loader for its own pages: a template that is not there leaves no knot of frames behind."""

    @staticmethod
    def get_template(name: str) -> Any:
        try:
            return loader.get_template(name)
        except TemplateDoesNotExist as exc:
            for part in exc.chain:
                _without_frames(part)
            raise


def _without_frames(exc: BaseException | None) -> None:
    # No further: behind them is the exception that the page is for, and its traceback is yet to be logged.
    while isinstance(exc, TemplateDoesNotExist):
        exc.__traceback__ = None
        exc = exc.__cause__ or exc.__context__


def replacements() -> Iterator[tuple[Any, str, Any]]:
    """Owner, name, and what is to be there while tornjango serves."""
    yield exception, "response_for_exception", _response_for_exception
    yield URLResolver, "resolve_error_handler", _resolve_error_handler
    yield defaults, "loader", _Loader
    yield csrf, "_get_failure_view", _get_failure_view
    yield got_request_exception, "send", _send
    yield AdminEmailHandler, "handle", _handle


def is_djangos(fn: Callable[..., Any]) -> bool:
    return (getattr(fn, "__module__", None) or "").startswith("django.")


_before = exception.response_for_exception


def _response_for_exception(request: HttpRequest, exc: Exception) -> HttpResponseBase:
    if isinstance(exc, Overloaded):
        return busy(exc, request.path, request)
    return _before(request, exc)


_resolve = URLResolver.resolve_error_handler


def _resolve_error_handler(resolver: URLResolver, view_type: int) -> Page:
    return _where_it_runs(_resolve(resolver, view_type), PAGES[view_type])


_find_failure_view: Callable[[], Page] = csrf._get_failure_view  # type: ignore[attr-defined]


def _get_failure_view() -> Page:
    return _where_it_runs(_find_failure_view(), csrf_failure)


def _where_it_runs(page: Page, default: Page) -> Page:
    if not green.active() or is_djangos(page) or green.runs_green(page):
        return page
    return functools.partial(_in_thread, page, default)


def _in_thread(page: Page, default: Page, *args: Any, **kwargs: Any) -> HttpResponseBase:
    try:
        return green.aside(_rendered, page, *args, **kwargs)
    except Overloaded as exc:
        logger.warning("%s has no thread, and Django's own page is the answer: %s", page, exc)
    return default(*args, **kwargs)


def _rendered(page: Page, *args: Any, **kwargs: Any) -> HttpResponseBase:
    response = page(*args, **kwargs)
    return response.render() if isinstance(response, SimpleTemplateResponse) else response


def _send(sender: Any, **named: Any) -> list[tuple[Any, Any]]:
    """Receivers, like those that report errors elsewhere, may wait; they find the exception in ``sys.exc_info()``."""
    send = functools.partial(type(got_request_exception).send, got_request_exception, sender)
    if not green.active() or only_django_listens(got_request_exception):
        return send(**named)
    try:
        return green.aside(send, **named)
    except Overloaded:
        pass  # better a moment of the loop's time than an error that nobody hears of
    # Out here, the exception that is being handled is that of the request.
    return send(**named)


def only_django_listens(signal: Any) -> bool:
    for entry in signal.receivers:
        receiver = entry[1]
        receiver = receiver() if hasattr(receiver, "__callback__") else receiver
        if receiver is not None and not is_djangos(receiver):
            return False
    return True


def _handle(handler: AdminEmailHandler, record: logging.LogRecord) -> Any:
    """All of it, the handler's lock included: whoever waits for that on the loop would hold up everybody."""
    handle = functools.partial(logging.Handler.handle, handler, record)
    sends = settings.ADMINS or type(handler).send_mail is not AdminEmailHandler.send_mail
    if not green.active() or not sends:
        return handle()
    try:
        return green.aside(handle)
    except Overloaded as exc:
        if record.name != logger.name:
            logger.warning("An error was not mailed to ADMINS: %s", exc)
        return False
