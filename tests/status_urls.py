from django.urls import include, path

urlpatterns = [path("status/", include("tornjango.status.urls"))]
