"""Coroutines with the ORM's async methods, as Django's documentation spells them for an ASGI server."""

from __future__ import annotations

from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.urls import path

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


urlpatterns = [
    path("json/", greeting),
    path("row/<int:pk>/", row),
    path("twenty/<int:pk>/", twenty),
    path("2009/", year_2009),
    path("page/", page),
]
