"""Plain functions, as gunicorn's threads run them. Their answers are what all the others must equal."""

from __future__ import annotations

import os
from pathlib import Path

from django.contrib.auth.decorators import login_required
from django.http import FileResponse, HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.urls import path

from bench.project.models import Blog


def greeting(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"message": "Hello, world!"})


def row(request: HttpRequest, pk: int) -> JsonResponse:
    blog = Blog.objects.get(pk=pk)
    return JsonResponse({"id": blog.pk, "title": blog.title, "pubdate": blog.pubdate})


def twenty(request: HttpRequest, pk: int) -> JsonResponse:
    blogs = [Blog.objects.get(pk=pk + n) for n in range(20)]
    return JsonResponse({"titles": [blog.title for blog in blogs]})


def year_2009(request: HttpRequest) -> HttpResponse:
    rows = Blog.objects.filter(pubdate__year=2009).exclude(tag__slug="sport")
    return render(request, "blog.html", {"rows": rows})


@login_required
def page(request: HttpRequest) -> HttpResponse:
    return render(request, "page.html")


def download(request: HttpRequest) -> FileResponse:
    """``bin/bench download`` makes the file."""
    return FileResponse(Path(os.environ["BENCH_FILE"]).open("rb"))


urlpatterns = [
    path("json/", greeting),
    path("row/<int:pk>/", row),
    path("orm/<int:pk>/", row),
    path("download/", download),
    path("twenty/<int:pk>/", twenty),
    path("2009/", year_2009),
    path("page/", page),
]
