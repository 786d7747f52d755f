from __future__ import annotations

from django.urls import include, path

from tests import comet_channels  # noqa: F401 (declares the channels)

urlpatterns = [path("comet/", include("tornjango.comet.urls"))]
