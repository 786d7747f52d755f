"""Views that wait on the loop for what Django does: sessions, users, forms, transactions, templates."""

from __future__ import annotations

import threading
from typing import Any

from django import forms
from django.contrib import messages
from django.contrib.auth import aauthenticate, alogin, alogout
from django.contrib.auth.decorators import login_required, permission_required
from django.contrib.auth.models import User
from django.db import connection
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import aget_object_or_404, render
from django.template.response import TemplateResponse
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View
from django.views.decorators.csrf import csrf_exempt
from django.views.generic import ListView

from tests.app.models import Author, Blog, Entry
from tornjango import DeferredResponse, db
from tornjango import forms as async_forms
from tornjango.shortcuts import arender
from tornjango.views import green, threaded


def where() -> str:
    return threading.current_thread().name


async def count(request: HttpRequest) -> HttpResponse:
    number = await request.session.aget("count", 0) + 1
    await request.session.aset("count", number)
    return HttpResponse(str(number))


async def greet(request: HttpRequest) -> HttpResponse:
    messages.info(request, "hello")
    return HttpResponse()


async def greetings(request: HttpRequest) -> HttpResponse:
    return await arender(request, "tests/messages.html")


@csrf_exempt
async def log_in(request: HttpRequest) -> HttpResponse:
    user = await aauthenticate(request, username="ann", password=request.POST["password"])
    if user is None:
        return HttpResponse("no", status=403)
    await alogin(request, user)
    return HttpResponse("in")


async def enter(request: HttpRequest) -> HttpResponse:
    """A log-in without a password."""
    user = await User.objects.aget(username="ann")
    await alogin(request, user, "django.contrib.auth.backends.ModelBackend")
    return HttpResponse("in")


async def log_out(request: HttpRequest) -> HttpResponse:
    await alogout(request)
    return HttpResponse("out")


@login_required
@permission_required("app.add_blog")
async def members(request: HttpRequest) -> HttpResponse:
    return await arender(request, "tests/user.html")


async def entry(request: HttpRequest, pk: int) -> HttpResponse:
    found = await aget_object_or_404(Entry, pk=pk)
    return await arender(request, "tests/relations.html", {"entry": found})


def deferred_entry(request: HttpRequest, response: DeferredResponse, pk: int) -> None:
    def done(entries: list[Entry]) -> None:
        response.render("tests/relations.html", {"entry": entries[0]})

    db.execute_async(Entry.objects.filter(pk=pk), done)


async def transfer(request: HttpRequest) -> HttpResponse:
    async with db.atomic():
        blog = await Blog.objects.select_for_update().afirst()
        assert blog is not None
        blog.name += "!"
        await blog.asave()
        async with db.atomic():
            await Blog.objects.acreate(name="another")
    return HttpResponse(blog.name)


class EntryForm(forms.ModelForm):
    class Meta:
        model = Entry
        fields = ["blog", "authors", "tag", "title"]


@csrf_exempt
async def create(request: HttpRequest) -> HttpResponse:
    form = EntryForm(request.POST)
    if not await async_forms.is_valid(form):
        return JsonResponse(form.errors)
    entry = await async_forms.save(form)
    return HttpResponse(str(entry.pk))


@green
def green_function(request: HttpRequest) -> HttpResponse:
    found = Entry.objects.get()
    request.session["count"] = 1
    page = render(request, "tests/relations.html", {"entry": found})
    page["X-Thread"] = where()
    return page


@method_decorator(green, name="dispatch")
class GreenList(ListView):
    model = Author
    template_name = "tests/authors.html"

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        return super().get_context_data(**kwargs, thread=where())


class Threads(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(f"{where()} {Author.objects.count()}")


def plain(request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"{where()} {Author.objects.count()}")


@green
def green_sleep(request: HttpRequest) -> HttpResponse:
    with connection.cursor() as cursor:
        cursor.execute("select pg_sleep(60) /* green sleep */")
    return HttpResponse()


@threaded
def opted_out(request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"{where()} {Author.objects.count()}")


def template_response(request: HttpRequest) -> HttpResponse:
    return TemplateResponse(request, "tests/authors.html", {"author_list": Author.objects.all()})


urlpatterns = [
    path("count/", count),
    path("greet/", greet),
    path("greetings/", greetings),
    path("login/", log_in),
    path("enter/", enter),
    path("logout/", log_out),
    path("members/", members),
    path("entry/<int:pk>/", entry),
    path("deferred-entry/<int:pk>/", deferred_entry),
    path("transfer/", transfer),
    path("create/", create),
    path("green/", green_function),
    path("green-list/", GreenList.as_view()),
    path("green-sleep/", green_sleep),
    path("green-class/", green(Threads.as_view())),
    path("class/", Threads.as_view()),
    path("plain/", plain),
    path("opted-out/", opted_out),
    path("template-response/", template_response),
]
