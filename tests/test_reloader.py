from __future__ import annotations

import struct
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from django.test import override_settings
from django.urls import path
from django.utils.autoreload import StatReloader, WatchmanReloader
from django.utils.translation import gettext_lazy

from tests import views
from tests.projects import URLS, Project, touch
from tornjango import reloader
from tornjango.reloader import Changes
from tornjango.routing import Routes
from tornjango.templates import registry

pytestmark = pytest.mark.slow
COMMANDS = [
    ("manage.py", "runserver", "0"),
    ("-m", "tornjango", "serve", "0"),
    ("manage.py", "serve", "0"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_changed_code_restarts_and_a_changed_template_does_not(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    project = Project(tmp_path)
    with project.running(*command) as server:
        server.wait_until_it_serves()
        assert server.get("/page/") == "first"
        template = tmp_path / "templates" / "page.html"
        template.write_text("second")
        while server.get("/page/") == "first":
            touch(template)
        assert server.get("/page/") == "second"
        server.change(tmp_path / "urls.py", URLS.replace('"quick")', '"changed")'))
        server.wait_until_it_serves()
        assert server.get("/") == "changed"
        server.signal()
        assert server.wait() == 0
    shown = "".join(server.lines)
    assert shown.count("Starting tornjango") == 2
    assert "Traceback" not in shown


MORE_URLS = """
from django.template import TemplateDoesNotExist
from django.utils.translation import gettext

def word(request):
    return HttpResponse(gettext("good day"))

def new(request):
    try:
        return render(request, "new/page.html")
    except TemplateDoesNotExist:
        return HttpResponse("none")

urlpatterns += [path("word/", word), path("new/", new)]
"""
MORE_SETTINGS = """
LANGUAGE_CODE = "de"
LOCALE_PATHS = ["{folder}/locale"]
STATICFILES_DIRS = ["{folder}/files"]
"""


def test_new_templates_catalogs_and_static_files_are_there_without_a_restart(
    tmp_path: Path,
) -> None:
    project = Project(tmp_path)
    settings = (tmp_path / "settings.py").read_text() + MORE_SETTINGS.format(folder=tmp_path)
    project.write("settings.py", settings)
    project.write("urls.py", URLS + MORE_URLS)
    (tmp_path / "files").mkdir()
    template = tmp_path / "templates" / "new" / "page.html"
    catalog = tmp_path / "locale" / "de" / "LC_MESSAGES" / "django.mo"
    with project.running(*COMMANDS[0]) as server:
        server.wait_until_it_serves()
        (tmp_path / "templates" / "page.html").write_text("second")
        while server.get("/page/") == "first":  # the reloader may not have looked yet
            time.sleep(0.1)
            touch(tmp_path / "templates" / "page.html")
        assert (server.get("/new/"), server.get("/word/")) == ("none", "good day")
        template.parent.mkdir()
        template.write_text("new")
        catalog.parent.mkdir(parents=True)
        catalog.write_bytes(compiled({"good day": "guten Tag"}))
        until(lambda: server.get("/new/") != "none")
        until(lambda: server.get("/word/") != "good day")
        assert (server.get("/new/"), server.get("/word/")) == ("new", "guten Tag")
        assert server.status("/static/new.txt") == 404
        (tmp_path / "files" / "new.txt").write_text("new")
        assert server.get("/static/new.txt") == "new"
        template.unlink()
        until(lambda: server.get("/new/") == "none")
        catalog.write_bytes(compiled({"good day": "moin"}))
        touch(catalog)
        until(lambda: server.get("/word/") != "guten Tag")
        assert server.get("/word/") == "moin"
        server.signal()
        assert server.wait() == 0
    assert "".join(server.lines).count("Starting tornjango") == 1


def until(condition: Callable[[], bool]) -> None:
    """Asks the server of what nothing tells; not so often that the log of it fills a pipe that nobody reads."""
    while not condition():
        time.sleep(0.1)


def compiled(messages: dict[str, str]) -> bytes:
    """As GNU's msgfmt does it."""
    texts = {"": "Content-Type: text/plain; charset=UTF-8\n", **messages}
    pairs = [(key.encode(), text.encode()) for key, text in sorted(texts.items())]
    count = len(pairs)
    tables, strings, place = [b"", b""], b"", 28 + 16 * count
    for side in (0, 1):
        for pair in pairs:
            tables[side] += struct.pack("<II", len(pair[side]), place + len(strings))
            strings += pair[side] + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, place)
    return header + b"".join(tables) + strings


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What made all templates be compiled."""
    done: list[Path] = []
    monkeypatch.setattr(registry, "refresh", done.append)
    monkeypatch.setattr(registry, "holds", lambda path: path.suffix == ".html")
    return done


def test_many_templates_that_change_at_once_are_compiled_once(
    tmp_path: Path, compilations: list[Path]
) -> None:
    watcher, changes = StatReloader(), Changes()
    watcher.watch_dir(tmp_path, "**/*")
    watcher.notify_file_changed = partial(changes.take, watcher)  # type: ignore[method-assign]
    changes.follow(watcher)
    old = tmp_path / "old.html"
    old.write_text("")
    assert list(watcher.snapshot_files())
    assert compilations == []
    for number in range(3):
        (tmp_path / f"{number}.html").write_text("")
    old.unlink()
    assert list(watcher.snapshot_files())
    assert compilations == [tmp_path / "0.html"]
    for file, _ in watcher.snapshot_files():
        if file.parent == tmp_path:
            watcher.notify_file_changed(file)
    assert len(compilations) == 2


def test_a_reloader_without_rounds_is_told_of_each(compilations: list[Path]) -> None:
    changes = Changes()
    changes.follow(WatchmanReloader.__new__(WatchmanReloader))
    assert changes.take(None, Path("a.html"))
    assert compilations == [Path("a.html")]
    assert changes.take(None, Path("a.py")) is None


def test_modules_that_are_imported_later_are_no_change(tmp_path: Path) -> None:
    watcher, changes = StatReloader(), Changes()
    watcher.watch_dir(tmp_path, "**/*")
    told: list[Path] = []
    watcher.notify_file_changed = told.append  # type: ignore[method-assign,assignment]
    changes.follow(watcher)
    list(watcher.snapshot_files())
    (tmp_path / "late.py").write_text("")
    (tmp_path / "late.yaml").write_text("")
    list(watcher.snapshot_files())
    assert told == [tmp_path / "late.yaml"]


@pytest.mark.parametrize("translated", [True, False])
def test_catalogs_restart_what_has_translated_urls(
    translated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    restarted: list[str] = []
    monkeypatch.setattr(reloader, "trigger_reload", restarted.append)
    patterns = [path(gettext_lazy("a/") if translated else "a/", views.sync)]
    with override_settings(ROOT_URLCONF=type("Urls", (), {"urlpatterns": patterns})):
        Routes()
        Changes().take(None, Path("django.mo"))
    assert restarted == (["django.mo"] if translated else [])


BROKEN = [
    ("urls.py", "from", "SyntaxError: invalid syntax", COMMANDS[2]),
    ("settings.py", 'INSTALLED_APPS = ["none"]', "No module named 'none'", COMMANDS[2]),
    ("urls.py", "from", "SyntaxError: invalid syntax", COMMANDS[0]),
    ("settings.py", 'INSTALLED_APPS = ["none"]', "No module named 'none'", COMMANDS[0]),
    ("settings.py", 'INSTALLED_APPS = ["none"]', "No module named 'none'", COMMANDS[1]),
]


@pytest.mark.parametrize(("name", "code", "error", "command"), BROKEN)
def test_broken_code_is_shown_and_its_repair_serves_again(
    name: str, code: str, error: str, command: tuple[str, ...], tmp_path: Path
) -> None:
    project = Project(tmp_path)
    file = tmp_path / name
    before = file.read_text()
    with project.running(*command) as server:
        server.wait_until_it_serves()
        server.change(file, f"{before}\n{code}\n")
        server.wait_for(error)
        server.change(file, before)
        server.wait_until_it_serves()
        assert server.get("/") == "quick"
