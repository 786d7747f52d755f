"""Coroutines with the ORM's async methods, as Django's documentation spells them for an ASGI server."""

from __future__ import annotations

import asyncio

from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.urls import path

from bench.project import wsgi_views
from bench.project.models import Blog


async def greeting(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"message": "Hello, world!"})


async def row(request: HttpRequest, pk: int) -> JsonResponse:
    blog = await Blog.objects.aget(pk=pk)
    return JsonResponse({"id": blog.pk, "title": blog.title, "pubdate": blog.pubdate})


async def twenty(request: HttpRequest, pk: int) -> JsonResponse:
    blogs = [await Blog.objects.aget(pk=pk + n) for n in range(20)]
    return JsonResponse({"titles": [blog.title for blog in blogs]})


async def year_2009(request: HttpRequest) -> HttpResponse:
    query = Blog.objects.filter(pubdate__year=2009).exclude(tag__slug="sport")
    return render(request, "blog.html", {"rows": [blog async for blog in query]})


@login_required
async def page(request: HttpRequest) -> HttpResponse:
    return render(request, "page.html", {"user": await request.auser()})


class Waiting:
    """Who waits for the next publication."""

    polls: set[asyncio.Future[None]] = set()


async def poll(request: HttpRequest) -> JsonResponse:
    future = asyncio.get_running_loop().create_future()
    Waiting.polls.add(future)
    try:
        await future
    finally:
        Waiting.polls.discard(future)
    return JsonResponse({"messages": [{"data": {"text": "something happened"}}], "cursor": "1"})


async def publish(request: HttpRequest) -> JsonResponse:
    for future in list(Waiting.polls):
        if not future.done():
            future.set_result(None)
    return JsonResponse({})


async def cursor(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"cursor": "0"})


async def status(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"parked": len(Waiting.polls)})


urlpatterns = [
    path("orm/<int:pk>/", wsgi_views.row),
    path("download/", wsgi_views.download),
    path("poll/", poll),
    path("publish/", publish),
    path("cursor/", cursor),
    path("status/", status),
    path("json/", greeting),
    path("row/<int:pk>/", row),
    path("twenty/<int:pk>/", twenty),
    path("2009/", year_2009),
    path("page/", page),
]
