from __future__ import annotations

from django.urls import path

from tornjango.comet import clients, sockets, views

app_name = "comet"
urlpatterns = [
    path("poll/", views.poll, name="poll"),
    path("sse/", views.sse, name="sse"),
    path("socket/", sockets.socket, name="socket"),
    path("publish/", clients.publish, name="publish"),
]
