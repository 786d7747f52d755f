"""The views in tornjango's spelling, the last one as in the 2009 message, and what ``bin/bench parked`` asks."""

from __future__ import annotations

from django.http import HttpRequest, JsonResponse
from django.urls import path

from bench.project.models import Blog
from tornjango import DeferredResponse, comet, db


async def greeting(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"message": "Hello, world!"})


async def row(request: HttpRequest, pk: int) -> JsonResponse:
    blog = (await db.fetch(Blog.objects.filter(pk=pk)))[0]
    return JsonResponse({"id": blog.pk, "title": blog.title, "pubdate": blog.pubdate})


def year_2009(request: HttpRequest, response: DeferredResponse) -> None:
    query = Blog.objects.filter(pubdate__year=2009).exclude(tag__slug="sport")

    def done(rows: list[Blog]) -> None:
        response.render("blog.html", {"rows": rows})

    db.execute_async(query, done)


async def cursor(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"cursor": comet.cursor("bench")})


async def publish(request: HttpRequest) -> JsonResponse:
    comet.publish("bench", {"text": "something happened"}, now=True)
    return JsonResponse({})


async def status(request: HttpRequest) -> JsonResponse:
    return JsonResponse(comet.status())


urlpatterns = [
    path("json/", greeting),
    path("row/<int:pk>/", row),
    path("2009/", year_2009),  # type: ignore[arg-type]  # django-stubs knows no deferred views
    path("cursor/", cursor),
    path("publish/", publish),
    path("status/", status),
]
