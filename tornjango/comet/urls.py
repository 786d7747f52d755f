from __future__ import annotations

from django.urls import path

from tornjango.comet import views

app_name = "comet"
urlpatterns = [
    path("poll/", views.poll, name="poll"),
    path("sse/", views.sse, name="sse"),
]
