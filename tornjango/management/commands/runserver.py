"""``runserver``, on Tornado: Django's own command, with another server and another handler under it."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Any

from django.apps import apps
from django.conf import settings

if apps.is_installed("django.contrib.staticfiles"):
    from django.contrib.staticfiles.management.commands.runserver import Command as BaseCommand
else:
    from django.core.management.commands.runserver import Command as BaseCommand  # type: ignore[assignment]

from tornjango import __version__, checks, reloader  # noqa: F401  checks: where the app is not installed
from tornjango.application import Application
from tornjango.server import RunserverAdapter


class Command(BaseCommand):
    help = "Serves this project on Tornado, with static files and autoreload in development."
    server_cls = RunserverAdapter  # type: ignore[assignment]
    addr: str
    _raw_ipv6: bool

    def get_handler(self, *args: Any, **options: Any) -> Any:
        reloader.install()
        static = options.get("use_static_handler", False)
        return Application(
            staticfiles=static and (settings.DEBUG or options.get("insecure_serving", False))
        )

    def on_bind(self, server_port: int) -> None:
        address = "0.0.0.0" if self.addr == "0" else self.addr
        if self._raw_ipv6:
            address = f"[{address}]"
        quit_command = "CTRL-BREAK" if sys.platform == "win32" else "CONTROL-C"
        self.stdout.write(
            f"{datetime.now():%B %d, %Y - %X}\n"
            f"Django version {self.get_version()}, using settings {settings.SETTINGS_MODULE!r}\n"
            f"Starting tornjango {__version__} at {self.protocol}://{address}:{server_port}/\n"
            f"Quit the server with {quit_command}."
        )
        self.stdout.flush()
