"""Paths that begin with a language, and a 404 page of the project's own."""

from __future__ import annotations

from django.conf.urls.i18n import i18n_patterns
from django.http import HttpRequest, HttpResponse
from django.urls import path

from tests import views


def not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    return HttpResponse("our 404", status=404)


handler404 = not_found
urlpatterns = [
    path("fixed/", views.language),
    *i18n_patterns(path("where/", views.language)),
]
