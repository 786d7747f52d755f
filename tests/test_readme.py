"""What README.rst and docs/comet.rst show is run: samples as a project, programs as programs, the table from the settings."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest

from tornjango.conf import CometConfig, Config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.rst").read_text("utf-8")
FAULTS = (ROOT / "docs" / "database.rst").read_text("utf-8")
COMET = (ROOT / "docs" / "comet.rst").read_text("utf-8")
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
            path("rooms/", include("rooms.urls")),
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


# What those of docs/comet.rst take for granted besides; README.rst's settings stand before these.
GIVEN_ROOMS = {
    "settings.py": """
        INSTALLED_APPS += ["rooms"]
    """,
    "rooms/__init__.py": "",
    "rooms/models.py": """
        from django.contrib.auth.models import User
        from django.db import models

        class Room(models.Model):
            name = models.CharField(max_length=50)
            members = models.ManyToManyField(User)
    """,
    "rooms/urls.py": """
        from django.http import HttpResponse
        from django.urls import path
        from rooms import renaming, views

        def rename(request):
            return HttpResponse(renaming.rename(7, request.GET["name"]))

        urlpatterns = [
            path("room/", views.room),
            path("news/", views.news),
            path("export/", views.export),
            path("rename/", rename),
        ]
    """,
    "member.py": """
        import os
        os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
        import django
        django.setup()
        from django.contrib.auth.models import User
        from django.test import Client
        from rooms.models import Room
        member = User.objects.create_user("ann")
        Room.objects.create(pk=7, name="Seven").members.add(member)
        client = Client()
        client.force_login(member)
        print(client.cookies["sessionid"].value)
    """,
}


def samples(document: str) -> dict[str, str]:
    """The Python blocks, and HTML's, whose first line is a comment with a file's name; Python's all have one."""
    blocks = re.findall(r"\.\. code-block:: (python|html)\n\n((?:    .*\n|\n)+)", document)
    found = {}
    for language, block in blocks:
        text = textwrap.dedent(block)
        match = re.match(r"# (\S+\.py)\n|\{# (\S+\.html) #\}\n", text)
        assert match or language == "html", "a sample does not say its file"
        if match:
            found[match[1] or match[2]] = text
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
    files = GIVEN, samples(README), GIVEN_ROOMS, samples(COMET)
    for name, text in itertools.chain.from_iterable(each.items() for each in files):
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


def begin(page: str) -> dict[str, Any]:
    """What ``{% comet %}`` gives to a page's script."""
    found = re.search(r"<script data-comet .*?>(.*?)</script>", page)
    assert found
    start: dict[str, Any] = json.loads(found[1])
    return start


def test_the_page_follows_what_is_published(site: str) -> None:
    page = get(f"{site}/live/1/")
    start = begin(page)
    assert start["channels"] == ["entry:1"]
    assert '.on("entry:1@presence", ' in page
    token = "x" * 32
    text = {"text": "hello", "csrfmiddlewaretoken": token}
    assert get(f"{site}/say/1/", text, f"csrftoken={token}") == ""
    query = urlencode({"channel": "entry:1", "cursor": start["cursor"]})
    answer = json.loads(get(f"{site}{start['urls']['poll']}?{query}"))
    assert [message["data"] for message in answer["messages"]] == [{"text": "hello"}]


def test_the_status_page_asks_strangers_to_log_in(site: str) -> None:
    assert "/admin/login/" in get(f"{site}/status/")


@pytest.fixture(scope="module")
def member(project: Path) -> str:
    """The session of one who may follow room:7."""
    return run(project, "member.py").strip()


def test_the_room_tells_its_members(site: str, member: str) -> None:
    """docs/comet.rst: a page, a publish on commit, and endpoints of one's own."""
    cookie = f"sessionid={member}"
    start = begin(get(f"{site}/rooms/room/", cookie=cookie))
    assert start["channels"] == ["room:7", "occupied"]
    get(f"{site}/rooms/rename/?name=Eight", cookie=cookie)
    cursor = urlencode({"cursor": start["cursor"]})
    told = json.loads(get(f"{site}/rooms/news/?{cursor}", cookie=cookie))
    assert (told["titles"], told["lost"]) == ([{"name": "Eight"}], False)
    request = Request(f"{site}/rooms/export/?{cursor}", headers={"Cookie": cookie})
    with urlopen(request, timeout=20) as lines:
        assert json.loads(lines.readline())["data"] == {"name": "Eight"}


def test_a_stranger_is_refused(site: str) -> None:
    with pytest.raises(HTTPError) as refusal:
        get(f"{site}/rooms/news/")
    with refusal.value as answer:
        assert answer.code == 403
        assert "room:7" in json.load(answer)["error"]


def test_the_program_follows(project: Path, site: str, member: str) -> None:
    command = [sys.executable, "-u", "follow.py", f"{site}/comet/", member]
    with subprocess.Popen(
        command, cwd=project, env=environment(), stdout=subprocess.PIPE, text=True
    ) as program:
        try:
            output = program.stdout
            assert output
            # It says nothing before the first message: one of these is published when it follows.
            done: list[str] = []
            reading = Thread(target=lambda: done.append(output.readline()))
            reading.start()
            while not done and program.poll() is None:
                get(f"{site}/rooms/rename/?name=Nine", cookie=f"sessionid={member}")
                reading.join(0.1)
            reading.join()
            assert done == ["{'name': 'Nine'}\n"]
        finally:
            program.kill()


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
    program = samples(README)["program.py"].replace("8888", str(port))
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
    fields: Any = dataclasses.fields(cls)
    for field in fields:
        if field.name == "COMET":
            continue
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()
        unit = field.metadata["unit"]
        shown = f"``{default}``" if default != "" else '``""``'
        shown += f" {unit}" if unit else ""
        yield f"``{prefix}{field.name}``", shown, field.metadata["help"]


def test_the_table_of_settings_is_that_of_the_code() -> None:
    """Run this file to write the table anew."""
    assert README.partition(BEGIN)[2].partition(END)[0] == settings_table()


def test_the_table_of_faults_names_tests_that_are_there() -> None:
    named = set(re.findall(r"``(test_\w+)``", FAULTS))
    there = (ROOT / "tests" / "test_db_faults.py").read_text("utf-8")
    assert len(named) > 20
    assert not {name for name in named if f"async def {name}(" not in there}


def test_the_tables_of_comet_name_tests_that_are_there() -> None:
    named = set(re.findall(r"``(test_\w+)``", COMET))
    files = [*(ROOT / "tests").glob("test_comet*.py"), ROOT / "tests" / "test_websockets.py"]
    there = "\n".join(path.read_text("utf-8") for path in files)
    assert len(named) > 50
    assert not {name for name in named if f"def {name}(" not in there}


def test_the_bounds_of_comet_are_settings() -> None:
    bounds = COMET.partition("\nBounds\n")[2].partition("\nWhen something fails\n")[0]
    named = set(re.findall(r"``([A-Z_]+)``", bounds))
    assert len(named) > 15
    assert named <= {
        field.name for cls in (Config, CometConfig) for field in dataclasses.fields(cls)
    }


if __name__ == "__main__":
    before, _, rest = README.partition(BEGIN)
    after = rest.partition(END)[2]
    (ROOT / "README.rst").write_text(before + BEGIN + settings_table() + END + after, "utf-8")
