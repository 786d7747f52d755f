"""The same views, once in each server's natural spelling."""

from __future__ import annotations

import os
from importlib.util import find_spec

from django.urls import URLPattern, URLResolver, include, path

urlpatterns: list[URLPattern | URLResolver] = [
    path("asgi/", include("bench.project.asgi_views")),
    path("wsgi/", include("bench.project.wsgi_views")),
]
# The peers' environment has no Tornado, and psycopg 3 in tornjango's place of psycopg2.
if find_spec("tornado"):
    urlpatterns += [
        path("tornjango/", include("bench.project.tornjango_views")),
        path("comet/", include("tornjango.comet.urls")),
    ]
elif "BENCH_REDIS" in os.environ:
    urlpatterns += [path("", include("bench.project.comet_peers"))]
