"""What README.rst shows is run: its samples as a project, its program as a program, its table from the settings."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest

from tornjango.conf import CometConfig, Config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.rst").read_text("utf-8")
FAULTS = (ROOT / "docs" / "database.rst").read_text("utf-8")
BEGIN, END = ".. settings begin\n", ".. settings end\n"

# What the samples take for granted.
GIVEN = {
    "manage.py": """
        import os, sys
        os.environ.setdefault("DJANGO_SETTINGS_MODULE", "settings")
        from django.core.management import execute_from_command_line
        execute_from_command_line(sys.argv)
    """,
    "settings.py": """
        SECRET_KEY = "for a test"
        DEBUG = True
        ROOT_URLCONF = "given.urls"
        STATIC_URL = "static/"
        DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "db.sqlite3"}}
        DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
        MIDDLEWARE = [
            "django.contrib.sessions.middleware.SessionMiddleware",
            "django.middleware.common.CommonMiddleware",
            "django.middleware.csrf.CsrfViewMiddleware",
            "django.contrib.auth.middleware.AuthenticationMiddleware",
            "django.contrib.messages.middleware.MessageMiddleware",
        ]
        TEMPLATES = [{
            "BACKEND": "django.template.backends.django.DjangoTemplates",
            "APP_DIRS": True,
            "OPTIONS": {"context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]},
        }]
    """,
    "blog/__init__.py": "",
    "blog/models.py": """
        from django.db import models

        class Tag(models.Model):
            slug = models.SlugField()

        class Author(models.Model):
            name = models.CharField(max_length=50)

        class Blog(models.Model):
            title = models.CharField(max_length=100)
            slug = models.SlugField()
            pubdate = models.DateTimeField()
            author = models.ForeignKey(Author, models.CASCADE)
            tag = models.ManyToManyField(Tag)
    """,
    "blog/templates/write.html": "{% csrf_token %}{{ form.errors }}{{ form }}",
    "blog/templates/blog.html": "{{ user }}: {% for row in rows %}{{ row.title }}.{% endfor %}",
    "prepare.py": """
        import asyncio, datetime, os
        os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
        import django
        django.setup()
        from django.core.management import call_command
        call_command("migrate", run_syncdb=True, verbosity=0)
        from blog.models import Author, Blog
        author = Author.objects.create(name="Ann")
        date = datetime.datetime(2009, 5, 1)
        Blog.objects.create(title="Old", slug="old", pubdate=date, author=author)
        from given.views import ask
        assert asyncio.run(ask()) == "as it should be"
    """,
    "given/__init__.py": "",
    "given/urls.py": """
        from django.urls import include, path
        from given import views
        urlpatterns = [
            path("queries/", views.queries),
            path("forget/<slug>/", views.forget),
            path("", include("urls")),
        ]
    """,
    "given/views.py": """
        import asyncio, datetime
        from django.http import HttpResponse
        from blog.models import Author, Blog, Tag
        from blog.queries import callbacks, reading, writing

        async def ask():
            blog, rows, same, titles, count, columns = await reading()
            assert [blog] == rows == [same] and same.author.name == "Ann", (blog, rows, same)
            assert titles == ["Old"] and count == 1 and len(columns) == 1, (titles, count, columns)
            seen = []
            callbacks(seen.append, seen.append)
            while len(seen) < 3:
                await asyncio.sleep(0.001)
            assert [list(rows) for rows in seen].count([(1,)]) == 2, seen
            await writing("new", datetime.datetime(2008, 1, 1))
            new = await Blog.objects.select_related("author").aget(tag__slug="new")
            assert new.author.name == "Ben"
            for model in (Blog, Tag):
                await model.objects.filter(slug="new").adelete()
            return "as it should be"

        async def queries(request):
            return HttpResponse(await ask())

        async def forget(request, slug):
            return HttpResponse(await Blog.objects.filter(slug=slug).adelete())
    """,
}


def samples() -> dict[str, str]:
    """The Python blocks whose first line is a comment with a file's name."""
    blocks = re.findall(r"\.\. code-block:: python\n\n((?:    .*\n|\n)+)", README)
    texts = [textwrap.dedent(block) for block in blocks]
    found = {match[1]: text for text in texts if (match := re.match(r"# (\S+\.py)\n", text))}
    assert len(found) == len(texts), "a sample does not say its file"
    return found


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "DJANGO_SETTINGS_MODULE"}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def run(folder: Path, *arguments: str, errors: bool = False) -> str:
    """What it prints, as an error or not."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr if errors else done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    for name, text in [*GIVEN.items(), *samples().items()]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(textwrap.dedent(text).lstrip("\n") + "\n")
    run(folder, "prepare.py")
    return folder


@pytest.fixture(scope="module")
def site(project: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "tornjango", "serve", "--noreload", "127.0.0.1:0"]
    with subprocess.Popen(
        command, cwd=project, env=environment(), stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout
        for line in server.stdout:
            if match := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            pytest.fail(f"the server ended with {server.wait()}")
        yield match[0]
        server.terminate()
        server.stdout.read()
        assert server.wait(20) == 0


def get(url: str, data: dict[str, str] | None = None, cookie: str = "") -> str:
    request = Request(url, urlencode(data).encode() if data else None, {"Cookie": cookie})
    with urlopen(request, timeout=20) as answer:
        content: bytes = answer.read()
        return content.decode()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", "AnonymousUser: Old."),
        ("/plain/", "1 entries"),
        ("/archive/", "AnonymousUser: Old."),
        ("/queries/", "as it should be"),
        ("/2009/", "AnonymousUser: Old."),
        ("/2010/", "AnonymousUser:"),
        ("/entry/old/", '{"title": "Old", "author": "Ann"}'),
        ("/both/", '["Old"]'),
    ],
)
def test_the_views_answer(site: str, path: str, expected: str) -> None:
    assert get(site + path).strip() == expected


def test_the_form_says_what_is_wrong_and_saves_what_is_not(site: str) -> None:
    """Its checks and its choices are queries."""
    token = "x" * 32
    written = {"title": "Later", "slug": "later", "author": "1", "pubdate": "2010-02-03"}
    written |= {"csrfmiddlewaretoken": token}
    cookie = f"csrftoken={token}"
    assert "Select a valid choice" in get(f"{site}/write/", written | {"author": "77"}, cookie)
    assert "Later" not in get(f"{site}/2010/")
    assert json.loads(get(f"{site}/write/", written, cookie))["title"] == "Later"
    assert "Later." in get(f"{site}/2010/")
    get(f"{site}/forget/later/")


def test_the_tests_of_ones_own_pass(project: Path) -> None:
    assert "OK" in run(project, "-W", "error", "manage.py", "test", "--verbosity", "2", errors=True)


def test_the_channels_bring_what_is_published(site: str) -> None:
    first = json.loads(get(f"{site}/comet/poll/?channel=entry:7"))
    get(f"{site}/shout/7/?text=hello")
    answer = json.loads(get(f"{site}/comet/poll/?channel=entry:7&cursor={first['cursor']}"))
    assert [message["data"] for message in answer["messages"]] == [{"text": "hello"}]
    by_hand = json.loads(get(f"{site}/listen/7/?cursor={first['cursor']}"))
    assert by_hand["news"] == 1


def test_the_routes_are_listed_with_their_kinds(project: Path) -> None:
    table = run(project, "-m", "tornjango", "routes")
    kinds = {line.split()[0]: line.split()[-1] for line in table.splitlines()[1:]}
    assert kinds["/plain/"] == "sync"
    assert kinds["/<int:year>/"] == "deferred"
    assert kinds["/both/"] == "deferred"
    assert kinds["/entry/<slug:slug>/"] == "async"


def test_the_project_passes_its_system_checks(project: Path) -> None:
    assert "no issues" in run(project, "manage.py", "check")


def test_the_program_answers_without_a_project(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = samples()["program.py"].replace("8888", str(port))
    path = tmp_path / "program.py"
    path.write_text(re.sub(r"( +)try:\n", r"\1print('ready', flush=True)\n\1try:\n", program))
    with subprocess.Popen(
        [sys.executable, str(path)], env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            assert get(f"http://127.0.0.1:{port}/ping") == "Hello, Tornado!"
            assert get(f"http://127.0.0.1:{port}/hello/World/") == "Hello, World!"
        finally:
            process.terminate()


def settings_table() -> str:
    rows = [("Key", "Default", "What it is")]
    rows += [row for cls in (Config, CometConfig) for row in _rows(cls)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    rule = "  ".join("=" * width for width in widths)
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lines = [line.rstrip() for line in lines]
    return "\n".join(["", rule, lines[0], rule, *lines[1:], rule, "", ""])


def _rows(cls: Any) -> Iterator[tuple[str, str, str]]:
    prefix = "COMET." if cls is CometConfig else ""
    for field in dataclasses.fields(cls):
        if field.name == "COMET":
            continue
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()  # type: ignore[misc]
        unit = field.metadata["unit"]
        shown = f"``{default}``" + (f" {unit}" if unit else "")
        yield f"``{prefix}{field.name}``", shown, field.metadata["help"]


def test_the_table_of_settings_is_that_of_the_code() -> None:
    """Run this file to write the table anew."""
    assert README.partition(BEGIN)[2].partition(END)[0] == settings_table()


def test_the_table_of_faults_names_tests_that_are_there() -> None:
    named = set(re.findall(r"``(test_\w+)``", FAULTS))
    there = (ROOT / "tests" / "test_db_faults.py").read_text("utf-8")
    assert len(named) > 20
    assert not {name for name in named if f"async def {name}(" not in there}


if __name__ == "__main__":
    before, _, rest = README.partition(BEGIN)
    after = rest.partition(END)[2]
    (ROOT / "README.rst").write_text(before + BEGIN + settings_table() + END + after, "utf-8")
