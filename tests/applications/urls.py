from __future__ import annotations

from django.conf.urls.i18n import i18n_patterns
from django.urls import include, path

from tests.applications.extra import views

urlpatterns = [
    path("", include("tests.applications.extra.urls")),
    path("accounts/", include("allauth.urls")),
    path("api/auth/", include("rest_framework.urls")),
    path("i18n/", include("django.conf.urls.i18n")),
    *i18n_patterns(path("hello/", views.hello), prefix_default_language=False),
    path("", include("mysite.urls")),
]
