"""A URLconf for requests whose path is what a test is about."""

from __future__ import annotations

from django.urls import re_path

from tests.http_views import whole

urlpatterns = [re_path(r"", whole)]
