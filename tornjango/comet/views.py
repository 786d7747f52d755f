from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from django.db import connections, transaction
from django.http import HttpRequest, HttpResponse, JsonResponse, QueryDict
from django.views.decorators.csrf import csrf_exempt

from tornjango import comet
from tornjango.exceptions import CometError

# An answer is for one reader, once; and a proxy that collects it before passing it on would hold it back.
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


View = TypeVar("View", bound=Callable[..., Any])


def _in_no_transaction(view: View) -> View:
    """With ATOMIC_REQUESTS, a parked request would keep the connection that its authoriser has asked."""
    for alias in connections:
        view = transaction.non_atomic_requests(using=alias)(view)
    return view


@_in_no_transaction
@csrf_exempt  # It changes nothing, and what it answers another site cannot read.
async def poll(request: HttpRequest) -> HttpResponse:
    """The long-poll: ``channel`` (repeated) and ``cursor``, in the query of a GET or the form of a POST."""
    if request.method not in ("GET", "POST"):
        return _refuse(
            405, f"{request.method} is not for polls; use GET or POST.", Allow="GET, POST"
        )
    asked: QueryDict = request.GET if request.method == "GET" else request.POST
    try:
        answer = await comet.wait(request, asked.get("cursor"), *asked.getlist("channel"))
    except CometError as error:
        return _refuse(error.status, str(error))
    return HttpResponse(answer.json(), content_type="application/json", headers=_HEADERS)


def _refuse(status: int, reason: str, **headers: str) -> HttpResponse:
    return JsonResponse({"error": reason}, status=status, headers=_HEADERS | headers)
