import os

from channels.routing import ProtocolTypeRouter, URLRouter
from django.core.asgi import get_asgi_application
from django.urls import path

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "bench.project.settings")
http = get_asgi_application()  # before anything of Django's is imported that needs its apps

from bench.project.comet_peers import Room  # noqa: E402

websocket = URLRouter([path("channels/socket/", Room.as_asgi())])
application = ProtocolTypeRouter({"http": http, "websocket": websocket})
