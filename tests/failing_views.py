"""What tests of error pages serve: views that fail, of every kind, and handlers of the project's."""

from __future__ import annotations

import sys
import threading
from typing import Any

from django.core.exceptions import (
    BadRequest,
    PermissionDenied,
    SuspiciousOperation,
)
from django.http import Http404, HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import path
from django.utils import translation
from django.views.decorators.csrf import csrf_exempt

from tests.app.models import Author
from tests.views import seen
from tornjango import DeferredResponse
from tornjango.exceptions import Overloaded
from tornjango.views import green

RAISED: dict[str, Any] = {
    "not-found": Http404,
    "denied": PermissionDenied,
    "bad": BadRequest,
    "suspicious": SuspiciousOperation,
    "value": ValueError,
    "busy": Overloaded,
}
STATUS = {"not-found": 404, "denied": 403, "bad": 400, "suspicious": 400, "value": 500, "busy": 503}


@csrf_exempt
async def asynchronous(request: HttpRequest, kind: str) -> HttpResponse:
    translation.activate("de")
    authors = Author.objects.order_by("pk")  # noqa: F841 - shown by the technical page
    raise RAISED[kind](f"in the view: {kind}")


def deferred(request: HttpRequest, response: DeferredResponse, kind: str) -> None:
    translation.activate("de")
    response.fail(RAISED[kind](f"in the view: {kind}"))


@green
def green_view(request: HttpRequest, kind: str) -> HttpResponse:
    translation.activate("de")
    raise RAISED[kind](f"in the view: {kind}")


async def template(request: HttpRequest) -> TemplateResponse:
    return TemplateResponse(request, "tests/authors.html", {"author_list": Author.objects.all()})


async def bad_template(request: HttpRequest) -> TemplateResponse:
    return TemplateResponse(request, "tests/not-there.html")


urlpatterns = [
    path("async/<kind>/", asynchronous),
    path("deferred/<kind>/", deferred),
    path("green/<kind>/", green_view),
    path("template/", template),
    path("bad-template/", bad_template),
]


def note(name: str) -> None:
    seen.append((name, threading.current_thread().name, translation.get_language()))


def page(request: HttpRequest, exception: Exception) -> HttpResponse:
    note(type(sys.exc_info()[1]).__name__)
    return TemplateResponse(request, "tests/user.html", status=404)


def server_error(request: HttpRequest) -> HttpResponse:
    note(f"{type(sys.exc_info()[1]).__name__}: {sys.exc_info()[1]}")
    return HttpResponse("the project's 500", status=500)


class OwnHandlers:
    """A URLconf, for ROOT_URLCONF takes any object."""

    urlpatterns = urlpatterns
    handler404 = staticmethod(page)
    handler500 = staticmethod(server_error)


class GreenHandlers(OwnHandlers):
    handler404 = staticmethod(green(page))
    handler500 = staticmethod(green(server_error))
