from django.urls import path, re_path

from . import importing, views, wall

urlpatterns = [
    path("", views.index, name="index"),
    path("2009/", views.my_async_view, name="2009"),
    re_path("^year/(?P<year>[12][0-9]{3})/$", views.by_year, name="year"),
    path("tag/<slug:slug>/", views.by_tag, name="tag"),
    path("author/<slug:slug>/", views.by_author, name="author"),
    path("search/", views.search, name="search"),
    path("entry/<slug:slug>/", views.entry, name="entry"),
    path("entry/<slug:slug>/comment/", views.comment, name="comment"),
    path("anywhere/", views.anywhere, name="anywhere"),
    path("about/", views.about, name="about"),
    path("feed.json", views.feed, name="feed"),
    path("wall/", wall.page, name="wall"),
    path("wall/brush/", wall.brush, name="brush"),
    path("import/", importing.page, name="import"),
]
