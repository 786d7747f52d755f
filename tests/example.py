"""The example project, loaded and served by its own commands, and a browser without scripts to visit it with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from tests.postgres import Postgres

ROOT = Path(__file__).parent.parent
MANAGE = ROOT / "example_project" / "manage.py"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    def json(self) -> Any:
        return json.loads(self.text)

    def find(self, pattern: str) -> str:
        """The first group of the pattern's first match, which has to be there."""
        found = re.search(pattern, self.text)
        assert found, f"no {pattern} in:\n{self.text}"
        return found[1]

    def find_all(self, pattern: str) -> list[str]:
        return re.findall(pattern, self.text)


@dataclass
class Browser:
    """Keeps cookies, runs no scripts and follows no redirects."""

    url: str
    cookies: dict[str, str] = field(default_factory=dict)

    def open(
        self, method: str, path: str, body: str | None = None, **headers: str
    ) -> HTTPConnection:
        """Sends a request; ``read`` its answer when it is due."""
        connection = HTTPConnection(urlsplit(self.url).netloc, timeout=30)
        headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        if body is not None:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        connection.request(method, path, body, headers)
        return connection

    def read(self, connection: HTTPConnection) -> Answer:
        response: HTTPResponse = connection.getresponse()
        text = response.read().decode()
        connection.close()
        for header in response.headers.get_all("Set-Cookie", []):
            self.cookies |= {name: cookie.value for name, cookie in SimpleCookie(header).items()}
        return Answer(response.status, dict(response.headers), text)

    def get(self, path: str) -> Answer:
        return self.read(self.open("GET", path))

    def post(self, path: str, data: dict[str, str], **headers: str) -> Answer:
        """Posts a form, as the page with its token would."""
        data = {"csrfmiddlewaretoken": self.cookies.get("csrftoken", ""), **data}
        return self.read(self.open("POST", path, urlencode(data), **headers))


@dataclass
class Example:
    """The example project at ``url``, with its sample entries."""

    url: str
    env: dict[str, str]
    postgres: Postgres

    def browser(self) -> Browser:
        return Browser(self.url)

    def rows(self, sql: str) -> list[str]:
        return self.postgres.psql(sql, "example").splitlines()

    def entry(self) -> str:
        """The path of an entry that has no comments."""
        sql = """select slug from blog_blog where not exists (
            select 1 from blog_comment where blog_id = blog_blog.id) order by random() limit 1"""
        return f"/entry/{self.rows(sql)[0]}/"


def manage(*arguments: str, env: dict[str, str], stdin: str = "") -> str:
    """Runs manage.py from a folder that is not its own; returns what it printed."""
    done = subprocess.run(
        [sys.executable, MANAGE, *arguments],
        cwd="/",
        env=env,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def served(postgres: Postgres, folder: Path) -> Iterator[Example]:
    """Migrates, loads the sample entries and serves; its log goes to ``folder``."""
    postgres.create_database("example")
    env = {name: value for name, value in os.environ.items() if "PG" not in name}
    del env["DJANGO_SETTINGS_MODULE"]
    env |= {"DATABASE_URL": postgres.dsn("example"), "PYTHONPATH": str(ROOT)}
    manage("migrate", "--verbosity=0", env=env)
    manage("load_sample", env=env)
    log = folder / "example.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, MANAGE, "serve", "127.0.0.1:0", "--noreload"],
            env=env | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        )
    assert server.stdout
    banner = iter(server.stdout.readline, "")
    try:
        lines = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in banner)
        found = next(filter(None, lines), None)
        assert found, f"manage.py serve has ended: {log.read_text()}"
        yield Example(found[0], env, postgres)
    finally:
        server.terminate()
        server.communicate(timeout=20)
    assert server.returncode == 0
    assert "Traceback" not in log.read_text(), log.read_text()
