"""The views in tornjango's spellings, one of them as in the 2009 message, and what ``bin/bench parked`` asks."""

from __future__ import annotations

from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path

from bench.project import wsgi_views
from bench.project.asgi_views import row, twenty
from bench.project.models import Blog
from tornjango import DeferredResponse, comet, db
from tornjango.shortcuts import arender
from tornjango.views import green

by_pk = db.prepare(lambda pk: Blog.objects.filter(pk=pk))


async def greeting(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"message": "Hello, world!"})


async def fetched(request: HttpRequest, pk: int) -> JsonResponse:
    blog = (await db.fetch(Blog.objects.filter(pk=pk)))[0]
    return JsonResponse({"id": blog.pk, "title": blog.title, "pubdate": blog.pubdate})


async def prepared(request: HttpRequest, pk: int) -> JsonResponse:
    blog = await by_pk.get(pk=pk)
    return JsonResponse({"id": blog.pk, "title": blog.title, "pubdate": blog.pubdate})


def year_2009(request: HttpRequest, response: DeferredResponse) -> None:
    query = Blog.objects.filter(pubdate__year=2009).exclude(tag__slug="sport")

    def done(rows: list[Blog]) -> None:
        response.render("blog.html", {"rows": rows})

    db.execute_async(query, done)


@login_required
async def page(request: HttpRequest) -> HttpResponse:
    return await arender(request, "page.html")


async def cursor(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"cursor": comet.cursor(request.GET.get("channel", "bench"))})


async def publish(request: HttpRequest) -> JsonResponse:
    await comet.apublish(request.GET.get("channel", "bench"), {"text": "something happened"})
    return JsonResponse({})


async def say(request: HttpRequest) -> JsonResponse:
    await comet.apublish(request.GET["channel"], {"at": float(request.GET["at"])})
    return JsonResponse({})


async def status(request: HttpRequest) -> JsonResponse:
    return JsonResponse(comet.status())


urlpatterns = [
    path("json/", greeting),
    # Django's async methods, spelled as for any server.
    path("row/<int:pk>/", row),
    path("twenty/<int:pk>/", twenty),
    path("fetch/<int:pk>/", fetched),
    path("prepared/<int:pk>/", prepared),
    # Functions as for any server: in a worker thread, and on the loop.
    path("orm/<int:pk>/", wsgi_views.row),
    path("green/<int:pk>/", green(wsgi_views.row)),
    path("download/", wsgi_views.download),
    path("page/", page),
    path("2009/", year_2009),  # type: ignore[arg-type]  # django-stubs knows no deferred views
    path("cursor/", cursor),
    path("publish/", publish),
    path("say/", say),
    path("status/", status),
]
