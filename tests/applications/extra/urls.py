from __future__ import annotations

from django.urls import include, path, re_path

from tests.applications.extra import api, views

urlpatterns = [
    path("extra/echo/", views.echo),
    re_path(r"^extra/echo/(?P<rest>.+)$", views.echo),
    path("extra/echo-async/", views.echo_async),
    path("extra/raw/", views.raw),
    path("extra/error/<kind>/", views.error),
    path("extra/error-async/<kind>/", views.error_async),
    path("extra/stream/", views.stream),
    path("extra/stream-async/", views.stream_async),
    path("extra/download/", views.download),
    path("extra/sheet/<int:pk>/", views.sheet),
    path("extra/cookies/", views.cookies),
    path("extra/session/", views.session),
    path("extra/status/<int:code>/", views.status),
    path("extra/not-modified/", views.not_modified),
    path("extra/conditional/", views.conditional),
    path("extra/template/", views.template),
    path("extra/broken-template/", views.broken_template),
    path("extra/contact/", views.Contact.as_view(), name="contact"),
    path("extra/items/", views.Items.as_view()),
    path("extra/post-only/", views.post_only),
    path("extra/long/", views.long),
    path("extra/big/", views.big_json),
    path("api/", include(api.router.urls)),
    path("api/upload/<filename>", api.Upload.as_view()),
    path("api/throttled/", api.throttled),
]
