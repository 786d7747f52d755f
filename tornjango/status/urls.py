"""``path("status/", include("tornjango.status.urls"))``: the page, for staff, and its numbers as JSON."""

from __future__ import annotations

from django.urls import include, path

from tornjango import status
from tornjango.status import views

status.declare()

app_name = "status"
urlpatterns = [
    path("", views.page, name="page"),
    path("json/", views.numbers, name="json"),
    path("comet/", include("tornjango.comet.urls")),
]
