"""``runserver``, on Tornado: the command that is installed, with another server and another handler under it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import socket
import ssl
import sys
import tempfile
from datetime import datetime
from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.conf import settings
from django.core.management.base import CommandError, CommandParser
from django.core.management.commands.runserver import Command as DjangosCommand
from django.utils import autoreload

from tornjango import __version__, checks, comet, conf, reloader  # noqa: F401  checks: where the app is not installed
from tornjango.application import Application
from tornjango.exceptions import ConfigurationError
from tornjango.management.options import add_option, given
from tornjango.server import RunserverAdapter, Server, serve, stopped_at_exit
from tornjango.sockets import on_address, raise_file_limit, tls_context

#: Apps whose own ``runserver`` puts its own server under Django's, as this one does.
SERVERS = {"tornjango", "daphne", "channels"}


def installed_command() -> type[DjangosCommand]:
    """The ``runserver`` that the project would have without this one: an app's that comes later, or Django's."""
    names = [config.name for config in apps.get_app_configs()]
    later = names[names.index("tornjango") + 1 :] if "tornjango" in names else names
    for name in later:
        command = None if name in SERVERS else _command_of(name)
        if isinstance(command, type) and issubclass(command, DjangosCommand):
            return command
    return DjangosCommand


def _command_of(app: str) -> object:
    name = f"{app}.management.commands.runserver"
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # the app has no commands
        return None
    return getattr(importlib.import_module(name), "Command", None) if found else None


if TYPE_CHECKING:
    InstalledCommand = DjangosCommand
else:
    InstalledCommand = installed_command()


class Command(InstalledCommand):
    help = "Serves this project on Tornado, with static files and autoreload in development."
    addr: str
    _raw_ipv6: bool
    tls: ssl.SSLContext | None
    #: The command line's keys of ``settings.TORNJANGO``; the others are the settings'.
    keys: tuple[str, ...] = ("CERTFILE", "KEYFILE")

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument(
            "--wsgi",
            action="store_true",
            help="Runs the server that Django has, or another app, as if tornjango were not there.",
        )
        for key in self.keys:
            add_option(parser, key)

    def handle(self, *args: Any, **options: Any) -> Any:
        if options.get("wsgi"):
            return self._without_us(**options).handle(*args, **options)
        return super().handle(*args, **options)

    def _without_us(self, **options: Any) -> DjangosCommand:
        command = InstalledCommand(
            no_color=bool(options.get("no_color")), force_color=bool(options.get("force_color"))
        )
        command.stdout, command.stderr = self.stdout, self.stderr
        return command

    def run(self, **options: Any) -> None:
        reloader.install()
        with contextlib.ExitStack() as stack:
            if (
                options["use_reloader"]
                and os.environ.get(autoreload.DJANGO_AUTORELOAD_ENV) != "true"
            ):
                # For the processes that it starts, one after another: what COMET has in memory outlives each.
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tornjango-"))
                os.environ[comet.KEPT] = os.path.join(folder, "comet")
            stack.enter_context(stopped_at_exit())
            super().run(**options)

    def inner_run(self, *args: Any, **options: Any) -> None:
        autoreload.raise_last_exception()
        try:
            self.configure(options)
        except ConfigurationError as exc:
            if not options["skip_checks"]:
                self.check()  # that says it better, where it is the settings that are wrong
            raise CommandError(str(exc)) from exc
        try:
            super().inner_run(*args, **options)
        except ConfigurationError as exc:
            raise CommandError(str(exc)) from exc

    def configure(self, options: dict[str, Any]) -> None:
        """Raises ConfigurationError."""
        self.config = conf.configure(**self.given(options))
        self.tls = tls_context(self.config.CERTFILE, self.config.KEYFILE)
        self.protocol = "http" if self.tls is None else "https"
        self.server_cls = type("Adapter", (RunserverAdapter,), {"command": self})

    def given(self, options: dict[str, Any]) -> dict[str, Any]:
        """What the command line says, as keys of ``settings.TORNJANGO``."""
        threads = {} if options.get("use_threading", True) else {"THREADS": 1}
        return threads | given(options, self.keys)

    def get_handler(self, *args: Any, **options: Any) -> Any:
        return Application(staticfiles=self._finds_static(options))

    def _finds_static(self, options: dict[str, Any]) -> bool | None:
        """Whether the files of apps are served; None leaves it to ``TORNJANGO["STATIC"]``."""
        if not options.get("use_static_handler", True):  # --nostatic
            return False
        asked = settings.DEBUG or options.get("insecure_serving", False)
        return True if asked and "use_static_handler" in options else None

    # What its adapter asks for

    def listen(self, address: str, port: int, *, ipv6: bool) -> list[socket.socket]:
        raise_file_limit()
        return on_address(address, port, ipv6=ipv6)

    def serve(self, application: Application, sockets: list[socket.socket]) -> None:
        serve(Server(application, sockets, tls=self.tls))

    def on_bind(self, server_port: int) -> None:
        address = "0.0.0.0" if self.addr == "0" else self.addr
        if self._raw_ipv6:
            address = f"[{address}]"
        self.announce(f"{self.protocol}://{address}:{server_port}/")

    def announce(self, place: str) -> None:
        quit_command = "CTRL-BREAK" if sys.platform == "win32" else "CONTROL-C"
        self.stdout.write(
            f"{datetime.now():%B %d, %Y - %X}\n"
            f"Django version {self.get_version()}, using settings {settings.SETTINGS_MODULE!r}\n"
            f"Starting tornjango {__version__} at {place}\n"
            f"Quit the server with {quit_command}."
        )
        self.stdout.flush()
