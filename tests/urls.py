from __future__ import annotations

from django.contrib import admin
from django.urls import include, path, re_path
from django.views.decorators.csrf import csrf_exempt

from tests import views

more = (
    [
        path("<slug:slug>/", views.asynchronous, name="entry"),
        re_path(r"^(?P<year>[0-9]{4})/(?:page-(?P<page>[0-9]+)/)?$", views.sync, name="year"),
    ],
    "blog",
)

urlpatterns = [
    path("sync/", views.sync),
    path("sync/<int:pk>/", views.sync, name="sync-named"),
    path("async/<uuid:pk>/", views.asynchronous),
    path("deferred/<int:pk>/", views.by_name, {"extra": "yes"}),
    path("marked/", views.marked),
    path("async-deferred/", views.async_deferred),
    path("group/<response>/", views.group_named_response),
    path("mixed/<int:pk>/", csrf_exempt(views.Mixed.as_view())),
    path("marked-methods/", csrf_exempt(views.Marked.as_view())),
    path("own-head/", views.OwnHead.as_view()),
    path("turned-away/", views.turned_away),
    path("dressed/", views.dressed),
    path("rendered/", views.rendered),
    path("redirected/", views.redirected),
    path("sent-file/", views.sent_file),
    path("finishes-twice/", views.finishes_twice),
    path("fails-in-view/", views.fails_in_view),
    path("fails-in-callback/", views.fails_in_callback),
    path("fails-by-hand/", views.fails_by_hand),
    path("never-ends/", views.never_ends),
    path("returns-nonsense/", views.returns_nonsense),
    path("parks/", views.parks),
    path("parks-async/", views.parks_async),
    path("sleeps-in-database/", views.sleeps_in_database),
    path("sets-language/", views.sets_language),
    path("overloaded/", views.overloaded),
    path("echo/", views.echo),
    re_path(r"^echo/.*$", views.echo),
    path("body/", csrf_exempt(views.body)),
    path("form/", csrf_exempt(views.form)),
    path("protected-form/", views.form),
    path("streams-async/", views.streams_async),
    path("streams-sync/", views.streams_sync),
    path("file/", views.file),
    path("status/<int:code>/", views.status),
    path("cookies/", views.cookies),
    path("session/", views.session),
    path("language/", views.language),
    path("tornado/<int:name>/", views.Plain, {"greeting": "good day"}),
    path("socket/", views.Socket),
    path("blog/", include(more, namespace="journal")),
    path("user/", views.user),
    path("user-async/", views.user_async),
    path("creates-and-fails/", views.creates_and_fails),
    path("admin/", admin.site.urls),
]
