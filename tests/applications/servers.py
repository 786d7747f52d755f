"""The project of these tests, made once, and its servers."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.postgres import Postgres

ROOT = Path(__file__).parent.parent.parent
ADMIN = ("ann", "a password of Ann's")

ADMIN_MADE = f"""
from django.contrib.auth import get_user_model
get_user_model().objects.create_superuser({ADMIN[0]!r}, "ann@shop.example", {ADMIN[1]!r})
from tests.applications.extra.models import Item
Item.objects.bulk_create(Item(name=f"item {{n}}", price=n, since=f"2009-0{{n}}-01") for n in range(1, 8))
from wagtail.models import Site
Site.objects.update(hostname="shop.example")
"""

#: What serves, by the name of a side; {port} is a free one.
GUNICORN = (
    *("-m", "gunicorn", "mysite.wsgi", "--threads=4", "--bind=127.0.0.1:{port}"),
    "--forwarded-allow-ips=192.0.2.1",  # nobody, as for the others
)
RUNSERVER = ("manage.py", "runserver", "--noreload", "127.0.0.1:{port}")
SERVE = ("-m", "tornjango", "serve", "127.0.0.1:{port}")
OUR_RUNSERVER = ("-m", "tornjango", "runserver", "--noreload", "127.0.0.1:{port}")


class Applications:
    """A new Wagtail site and what `local.py` adds, migrated and with a superuser."""

    def __init__(self, postgres: Postgres, folder: Path) -> None:
        self.postgres = postgres
        self.folder = folder
        self.site = folder / "site"
        self.template = f"{folder.name}_template"
        self._make()

    def _make(self) -> None:
        self.site.mkdir(parents=True)
        wagtail = [sys.executable, "-c", "from wagtail.bin.wagtail import main; main()"]
        subprocess.run(
            [*wagtail, "start", "mysite", str(self.site)],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        shutil.copy(Path(__file__).with_name("local.py"), self.site / "mysite/settings/local.py")
        self.postgres.create_database(self.template)
        env = self.environment("made", self.template, debug=False)
        self.manage("migrate", "--verbosity=0", env=env)
        self.manage("shell", "--command", ADMIN_MADE, env=env)

    def manage(self, *arguments: str, env: dict[str, str]) -> None:
        done = subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=self.site, env=env, capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def environment(self, name: str, database: str, *, debug: bool) -> dict[str, str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return env | self.postgres.env() | {
            "DJANGO_SETTINGS_MODULE": "mysite.settings.local",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{self.site}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONHASHSEED": "0",  # pages show sets in the order of their hashes
            "APPLICATION_FOLDER": str(folder),
            "APPLICATION_DATABASE": database,
            "APPLICATION_DEBUG": "1" if debug else "0",
        }  # fmt: skip

    @contextmanager
    def served(self, name: str, command: tuple[str, ...], *, debug: bool) -> Iterator[int]:
        """The port where ``command`` serves the site, with a database and files of its own."""
        database = f"{self.folder.name}_{name}"
        self.postgres.psql(f'create database "{database}" template "{self.template}"')
        port = _free_port()
        log = self.folder / f"{name}.log"
        with log.open("w") as output:
            server = subprocess.Popen(
                [sys.executable, *(part.format(port=port) for part in command)],
                cwd=self.site,
                env=self.environment(name, database, debug=debug),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            _wait_for(port, server, log)
            yield port
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(15)
            server.kill()
            server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    """Another process listens: nothing tells of it but trying."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"nothing serves after a minute:\n{log.read_text()}")
