"""``serve``: what ``runserver`` is, and what production asks for; without autoreload where ``DEBUG`` is off."""

from __future__ import annotations

import io
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import CommandParser, OutputWrapper
from django.db import DatabaseError

import tornjango
from tornjango import conf, processes
from tornjango.exceptions import ConfigurationError
from tornjango.management.commands.runserver import Command as RunserverCommand
from tornjango.management.options import FIELDS
from tornjango.server import Server, serve
from tornjango.sockets import (
    SocketFile,
    from_systemd,
    on_address,
    on_descriptor,
    on_path,
    raise_file_limit,
    shown,
)

logger = logging.getLogger("tornjango.serve")


class Command(RunserverCommand):
    help = "Serves this project on Tornado."
    keys = tuple(FIELDS)
    _typed = False

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument(
            "--fd",
            type=int,
            metavar="N",
            help="serves on a socket that is open already, as this file descriptor",
        )

    def run_from_argv(self, argv: list[str]) -> None:
        self._typed = argv[2:] == sys.argv[2:]
        # Its name in messages, whatever `tornjango.cli` calls it before Django.
        super().run_from_argv([argv[0], "serve", *argv[2:]])

    def run(self, **options: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            # As the first process of a container, it would not hear it before it serves.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        self.worker = processes.this_worker()
        self.file: SocketFile | None = None
        options["use_reloader"] &= settings.DEBUG and not self._shares_sockets(options)
        if options["use_reloader"]:
            self._survive_broken_code()
        super().run(**options)

    def _survive_broken_code(self) -> None:
        """Has the autoreloader start ``manage.py`` by way of `tornjango.cli`, which says what that is good for."""
        is_program = getattr(sys.modules["__main__"], "__spec__", None) is None
        if self._typed and is_program and sys.argv[0].endswith(".py"):
            sys.argv.insert(0, str(Path(tornjango.__file__).with_name("__main__.py")))

    def _shares_sockets(self, options: dict[str, Any]) -> bool:
        """Whether it listens on what another process has opened, or will serve: Django's autoreloader opens its own."""
        if self.worker or options["fd"] is not None or "LISTEN_FDS" in os.environ:
            return True
        try:
            workers = conf.get_config().WORKERS
        except ConfigurationError:  # it is said when it is read again
            workers = 0
        return bool(workers if options["workers"] is None else options["workers"])

    def inner_run(self, *args: Any, **options: Any) -> None:
        if self.worker is not None and not options["skip_checks"]:
            self._check_silently()
            options["skip_checks"] = True
        super().inner_run(*args, **options)

    def _check_silently(self) -> None:
        """Warnings were shown when the master started; errors may be new, where it replaces workers."""
        stderr, self.stderr = self.stderr, OutputWrapper(io.StringIO())
        try:
            self.check()
        finally:
            self.stderr = stderr

    def check_migrations(self) -> None:
        """A server starts while its database does not answer, and answers when it does."""
        if self.worker is None:
            try:
                super().check_migrations()
            except DatabaseError as exc:
                logger.warning("The database does not tell of unapplied migrations: %s", exc)

    def configure(self, options: dict[str, Any]) -> None:
        super().configure(options)
        self._options = options
        if self._is_master() and not self._typed:
            raise ConfigurationError(
                "Workers are started by the command line of their master, which here is not that of serve: "
                "run manage.py serve or tornjango serve, or serve with WORKERS 0."
            )

    def _is_master(self) -> bool:
        return self.worker is None and self.config.WORKERS > 0

    def listen(self, address: str, port: int, *, ipv6: bool) -> list[socket.socket]:
        """Where the command line says; on systemd's sockets; where the settings say; or where runserver does."""
        raise_file_limit()
        listeners = self._opened_before() or self._on_path()
        self._places = [shown(listener, self.protocol) for listener in listeners]
        return listeners or on_address(address, port, ipv6=ipv6)

    def _opened_before(self) -> list[socket.socket]:
        if self.worker is not None:
            return self.worker.sockets
        if self._options["fd"] is not None:
            return [on_descriptor(self._options["fd"])]
        return from_systemd()

    def _on_path(self) -> list[socket.socket]:
        told_an_address = self._options["addrport"] and self._options["unix"] is None
        if not self.config.UNIX or told_an_address:
            return []
        path = os.path.abspath(self.config.UNIX)
        listener = on_path(path)
        self.file = SocketFile(path)
        return [listener]

    def on_bind(self, server_port: int) -> None:
        if self.worker is not None:
            return
        if self._places:
            self.announce(", ".join(self._places))
        else:
            super().on_bind(server_port)

    def get_handler(self, *args: Any, **options: Any) -> Any:
        return None if self._is_master() else super().get_handler(*args, **options)

    def serve(self, application: Any, sockets: list[socket.socket]) -> None:
        if self._is_master():
            quiet = self._options["verbosity"] == 0
            processes.supervise(sockets, self.config, file=self.file, quiet=quiet)
        server = Server(application, sockets, tls=self.tls)
        if self.worker is not None:
            self.worker.serve(server)
            return
        try:
            serve(server)
        finally:
            if self.file is not None:
                self.file.remove()
