"""Views as Django's documentation has them."""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io
import json
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Any

from django import forms
from django.contrib import messages
from django.core.exceptions import PermissionDenied, SuspiciousOperation
from django.http import (
    FileResponse,
    Http404,
    HttpRequest,
    HttpResponse,
    HttpResponseNotModified,
    JsonResponse,
    StreamingHttpResponse,
)
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.template.response import TemplateResponse
from django.utils import timezone
from django.utils.translation import get_language, gettext
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import condition, require_POST
from django.views.generic import FormView, ListView

from tests.applications.extra.middleware import who
from tests.applications.extra.models import Item

ERRORS = {
    "value": ValueError("a view failed"),
    "missing": Http404("no such thing"),
    "denied": PermissionDenied("not you"),
    "suspicious": SuspiciousOperation("odd"),
    "caught": LookupError("by middleware"),
}


def _meta(request: HttpRequest) -> dict[str, str]:
    """What a client can set, or ask for."""
    names = (
        "REQUEST_METHOD",
        "QUERY_STRING",
        "PATH_INFO",
        "SCRIPT_NAME",
        "CONTENT_TYPE",
        "CONTENT_LENGTH",
    )
    return {
        key: value
        for key, value in sorted(request.META.items())
        if key in names
        or (key.startswith("HTTP_") and key not in ("HTTP_COOKIE", "HTTP_CONNECTION"))
    }


def _seen(request: HttpRequest) -> dict[str, Any]:
    return {
        "path": request.path,
        "full": request.get_full_path(),
        "absolute": request.build_absolute_uri(),
        "secure": request.is_secure(),
        "get": dict(request.GET.lists()),
        "post": dict(request.POST.lists()),
        "files": {
            name: [file.name, file.size, file.content_type, hashlib.sha256(file.read()).hexdigest()]
            for name, file in request.FILES.items()
        },
        "cookies": sorted(request.COOKIES),
        "encoding": request.encoding,
        "meta": _meta(request),
        "user": str(request.user),
        "language": get_language(),
        "zone": timezone.get_current_timezone_name(),
    }


@csrf_exempt
def echo(request: HttpRequest, rest: str = "") -> HttpResponseBase:
    return JsonResponse({**_seen(request), "rest": rest, "who": who()})


@csrf_exempt
async def echo_async(request: HttpRequest) -> HttpResponseBase:
    user = await request.auser()
    await asyncio.sleep(0)
    return JsonResponse({**_seen(request), "user": str(user)})


@csrf_exempt
def raw(request: HttpRequest) -> HttpResponseBase:
    return HttpResponse(request.body, content_type="application/octet-stream")


def error(request: HttpRequest, kind: str) -> HttpResponseBase:
    raise ERRORS[kind]


async def error_async(request: HttpRequest, kind: str) -> HttpResponseBase:
    raise ERRORS[kind]


def stream(request: HttpRequest) -> HttpResponseBase:
    def rows() -> Iterator[str]:
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        for number in range(int(request.GET.get("rows", "100"))):
            writer.writerow([number, "row"])
            yield buffer.getvalue()
            buffer.seek(0)
            buffer.truncate()

    response = StreamingHttpResponse(rows(), content_type="text/csv")
    response["Content-Disposition"] = 'attachment; filename="rows.csv"'
    return response


async def stream_async(request: HttpRequest) -> HttpResponseBase:
    async def parts() -> AsyncIterator[bytes]:
        for number in range(20):
            await asyncio.sleep(0)
            yield b"part %d\n" % number

    return StreamingHttpResponse(parts())


def download(request: HttpRequest) -> HttpResponseBase:
    content = io.BytesIO(bytes(range(256)) * 4096)
    return FileResponse(content, as_attachment=True, filename="käse.bin")


def sheet(request: HttpRequest, pk: int) -> HttpResponseBase:
    return FileResponse(Item.objects.get(pk=pk).sheet.open("rb"))


def cookies(request: HttpRequest) -> HttpResponseBase:
    response = HttpResponse("cookies")
    response.set_cookie("one", "1", max_age=60, path="/extra/")
    response.set_cookie("two", "ä b;c", httponly=True, secure=True)
    response.set_signed_cookie("three", "3", salt="x")
    response.delete_cookie("four")
    return response


def session(request: HttpRequest) -> HttpResponseBase:
    request.session["count"] = request.session.get("count", 0) + 1
    if "flush" in request.GET:
        request.session.flush()
    return JsonResponse(dict(request.session))


def status(request: HttpRequest, code: int) -> HttpResponseBase:
    return HttpResponse(
        b"" if code == 204 else b"content", status=code, reason=request.GET.get("reason")
    )


def not_modified(request: HttpRequest) -> HttpResponseBase:
    return HttpResponseNotModified(headers={"ETag": '"x"'})


@condition(
    etag_func=lambda request: '"v1"',
    last_modified_func=lambda request: datetime(2009, 1, 1, tzinfo=UTC),
)
def conditional(request: HttpRequest) -> HttpResponseBase:
    return HttpResponse("as it was")


def hello(request: HttpRequest) -> HttpResponseBase:
    return HttpResponse(f"{gettext('Yes')} {get_language()}")


def template(request: HttpRequest) -> HttpResponseBase:
    return TemplateResponse(request, "extra/items.html", {"items": Item.objects.all()})


def broken_template(request: HttpRequest) -> HttpResponseBase:
    return render(request, "extra/broken.html", {"nothing": None})


class ItemForm(forms.Form):
    name = forms.CharField(max_length=10)
    sheet = forms.FileField(required=False)


class Contact(FormView):  # type: ignore[type-arg]
    template_name = "extra/form.html"
    form_class = ItemForm
    success_url = "/extra/contact/"

    def form_valid(self, form: ItemForm) -> HttpResponse:
        messages.success(self.request, f"Thanks, {form.cleaned_data['name']}.")
        return super().form_valid(form)


class Items(ListView):  # type: ignore[type-arg]
    model = Item
    paginate_by = 2
    template_name = "extra/items.html"
    context_object_name = "items"


@require_POST
def post_only(request: HttpRequest) -> HttpResponseBase:
    return redirect("contact")


def long(request: HttpRequest) -> HttpResponseBase:
    """For GZipMiddleware."""
    return HttpResponse("compressible " * 1000)


def big_json(request: HttpRequest) -> HttpResponseBase:
    return HttpResponse(json.dumps(list(range(100_000))), content_type="application/json")
