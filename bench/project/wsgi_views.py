"""Plain functions, as gunicorn's threads run them. Their answers are what all the others must equal."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.urls import path

from bench.project.models import Blog


def greeting(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"message": "Hello, world!"})


def row(request: HttpRequest, pk: int) -> JsonResponse:
    blog = Blog.objects.get(pk=pk)
    return JsonResponse({"id": blog.pk, "title": blog.title, "pubdate": blog.pubdate})


def year_2009(request: HttpRequest) -> HttpResponse:
    rows = Blog.objects.filter(pubdate__year=2009).exclude(tag__slug="sport")
    return render(request, "blog.html", {"rows": rows})


urlpatterns = [path("json/", greeting), path("row/<int:pk>/", row), path("2009/", year_2009)]
