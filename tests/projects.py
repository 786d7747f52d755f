"""Projects of a few files, for tests that run commands in them."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.request import urlopen

ROOT = Path(__file__).parent.parent
SETTINGS = """
SECRET_KEY = "only for tests"
DEBUG = {debug}
ALLOWED_HOSTS = ["127.0.0.1", "localhost", "[::1]"]
ROOT_URLCONF = "urls"
INSTALLED_APPS = {apps}
STATIC_URL = "static/"
DATABASES = {{"default": {{"ENGINE": "django.db.backends.sqlite3", "NAME": "db.sqlite3"}}}}
TEMPLATES = [{{"BACKEND": "django.template.backends.django.DjangoTemplates", "DIRS": ["{folder}/templates"]}}]
TORNJANGO = {options}
"""
URLS = """
import asyncio, time
from django.http import HttpResponse
from django.shortcuts import render
from django.urls import path

async def quick(request):
    return HttpResponse("quick")

async def parks(request):
    print("parked", flush=True)
    await asyncio.sleep(float(request.GET["seconds"]))
    return HttpResponse("went")

def parks_sync(request):
    print("parked", flush=True)
    time.sleep(float(request.GET["seconds"]))
    return HttpResponse("went")

def page(request):
    return render(request, "page.html")

urlpatterns = [
    path("", quick, name="home"), path("parks/", parks), path("parks-sync/", parks_sync), path("page/", page),
]
"""
#: Another ``urls.py``: streams that do not end.
STREAMS = """
import asyncio
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path

async def home(request):
    return HttpResponse("before")

async def stream(request):
    async def parts():
        while True:
            yield "part"
            await asyncio.sleep(60)
    return StreamingHttpResponse(parts())

urlpatterns = [path("", home), path("stream/", stream)]
"""
MANAGE = """
import os, sys
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "settings")
from django.core.management import execute_from_command_line
execute_from_command_line(sys.argv)
"""


class Project:
    def __init__(
        self,
        folder: Path,
        *,
        debug: bool = True,
        apps: tuple[str, ...] = ("tornjango", "django.contrib.staticfiles"),
        options: str = "{}",
    ) -> None:
        self.folder = folder
        templates = folder / "templates"
        templates.mkdir()
        (templates / "page.html").write_text("first")
        text = SETTINGS.format(debug=debug, apps=apps, options=options, folder=folder)
        self.write("settings.py", text)
        self.write("urls.py", URLS)
        self.write("manage.py", MANAGE)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def environment(self) -> dict[str, str]:
        ours = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        env = {k: v for k, v in os.environ.items() if k != "DJANGO_SETTINGS_MODULE"}
        return env | ours

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command that ends by itself."""
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    @contextmanager
    def running(self, *command: str, pass_fds: tuple[int, ...] = ()) -> Iterator[Process]:
        process = Process(self, command, pass_fds)
        try:
            yield process
        finally:
            process.end()


class Process:
    """A server that was started by a command."""

    def __init__(
        self, project: Project, command: tuple[str, ...], pass_fds: tuple[int, ...] = ()
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=project.folder,
            env=project.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            pass_fds=pass_fds,
            # Ignored where the tests run in the background of a shell, and then by the server too.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        assert self.process.stdout is not None
        self.output: IO[str] = self.process.stdout
        self.lines: list[str] = []
        self.url = ""
        # Nothing of this takes as long: a line that does not come ends the test, and not the suite's patience.
        self.watchdog = threading.Timer(60, self.signal, (signal.SIGKILL,))
        self.watchdog.start()

    def wait_for(self, text: str) -> str:
        """The next line with ``text``. Raises ``AssertionError`` with all lines when the process ends before."""
        for line in self.output:
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError(f"{text!r} did not come:\n{''.join(self.lines)}")

    def wait_until_it_serves(self) -> str:
        line = self.wait_for("Starting tornjango ")
        self.url = line.split(" at ")[1].strip().rstrip("/")
        self.wait_for("Quit the server")
        return self.url

    def change(self, path: Path, text: str) -> None:
        """Returns when the reloader has noticed; a change before its first look needs another one."""
        path.write_text(text)
        touch(path)
        noticed = threading.Event()
        again = threading.Thread(target=_touch_until, args=(noticed, path))
        again.start()
        try:
            self.wait_for(f"{path.name} changed, reloading.")
        finally:
            noticed.set()
            again.join()

    def get(self, path: str) -> str:
        with urlopen(self.url + path, timeout=20) as response:
            return str(response.read().decode())

    def status(self, path: str) -> int:
        try:
            with urlopen(self.url + path, timeout=20) as response:
                return int(response.status)
        except HTTPError as answer:
            with answer:
                return answer.code

    def open_stream(self) -> socket.socket:
        """A connection on which the first part of a stream of ``STREAMS`` has come."""
        port = int(self.url.rpartition(":")[2])
        client = socket.create_connection(("127.0.0.1", port), timeout=20)
        client.sendall(b"GET /stream/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while b"part" not in (data := client.recv(65536)):
            assert data, "the stream ended before its first part"
        return client

    def signal(self, number: int = signal.SIGINT) -> None:
        """To the whole group, as a terminal does."""
        os.killpg(self.process.pid, number)

    def wait(self) -> int:
        """Its exit code; all lines are in ``lines`` then."""
        self.lines.extend(self.output)
        return self.process.wait(15)

    def end(self) -> None:
        self.watchdog.cancel()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.output.close()


def _touch_until(noticed: threading.Event, path: Path) -> None:
    while not noticed.wait(2):  # the reloader looks once a second
        touch(path)


def touch(path: Path) -> None:
    """Makes a file's time a later one, however coarse the file system's clock."""
    later = path.stat().st_mtime + 2
    os.utime(path, (later, later))
