from __future__ import annotations

from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.projects import Project
from tornjango.cli import main

PYTHON_M = ("-m", "tornjango")
CHANNELS = """
from tornjango import comet

@comet.channel("live:<int:pk>")
async def can_read(request, pk):
    return True
"""
INCLUDES_COMET = """
from django.urls import include, path

urlpatterns = [path("comet/", include("tornjango.comet.urls"))]
"""
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "command",
    [(*PYTHON_M, "serve"), ("manage.py", "serve"), ("manage.py", "runserver")],
)
def test_a_project_is_served(command: tuple[str, ...], tmp_path: Path) -> None:
    with Project(tmp_path).running(*command, "127.0.0.1:0", "--noreload") as server:
        server.wait_until_it_serves()
        assert server.get("/") == "quick"
        server.signal()
        assert server.wait() == 0
    head = "".join(server.lines)
    assert "System check identified no issues" in head
    assert "using settings 'settings'" in head


def test_a_project_is_served_that_has_not_installed_tornjango(tmp_path: Path) -> None:
    project = Project(tmp_path, apps=())
    with project.running(*PYTHON_M, "serve", "0", "--noreload") as server:
        server.wait_until_it_serves()
        assert server.get("/page/") == "first"


def test_channels_are_found_where_tornjango_is_not_installed(tmp_path: Path) -> None:
    project = Project(tmp_path, apps=("live",))
    (tmp_path / "live").mkdir()
    project.write("live/__init__.py", "")
    project.write("live/channels.py", CHANNELS)
    project.write("urls.py", INCLUDES_COMET)
    with project.running(*PYTHON_M, "serve", "0", "--noreload") as server:
        server.wait_until_it_serves()
        assert '"cursor"' in server.get("/comet/poll/?channel=live:1")


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("0", "http://127.0.0.1:"),
        ("localhost:0", "http://localhost:"),
        ("[::1]:0", "http://[::1]:"),
        ("0:0", "http://0.0.0.0:"),
    ],
)
def test_an_address_is_taken_as_runserver_takes_it(
    address: str, shown: str, tmp_path: Path
) -> None:
    with Project(tmp_path).running("manage.py", "runserver", address, "--noreload") as server:
        assert server.wait_until_it_serves().startswith(shown)
        assert server.get("/") == "quick"


def test_an_address_that_is_none_is_said(tmp_path: Path) -> None:
    done = Project(tmp_path).run(*PYTHON_M, "serve", "nowhere:here")
    assert done.returncode == 1
    assert '"nowhere:here" is not a valid port number or address:port pair.' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("apps", [("tornjango",), ()])
@pytest.mark.parametrize("command", [(*PYTHON_M, "serve"), (*PYTHON_M, "runserver")])
def test_a_wrong_setting_is_a_system_check(
    command: tuple[str, ...], apps: tuple[str, ...], tmp_path: Path
) -> None:
    done = Project(tmp_path, apps=apps, options='{"THREADS": 0}').run(*command, "0", "--noreload")
    assert done.returncode == 1
    assert "(tornjango.E001) TORNJANGO['THREADS'] must be a positive whole number" in done.stderr
    assert "HINT:" in done.stderr
    assert "Traceback" not in done.stderr


def test_static_files_are_served_in_development(tmp_path: Path) -> None:
    with Project(tmp_path).running("manage.py", "runserver", "0", "--noreload") as server:
        server.wait_until_it_serves()
        assert "class Comet" in server.get("/static/tornjango/comet.js")


@pytest.mark.parametrize(("debug", "option"), [(True, "--nostatic"), (False, "--noreload")])
def test_static_files_can_be_left_to_others(debug: bool, option: str, tmp_path: Path) -> None:
    project = Project(tmp_path, debug=debug)
    with project.running("manage.py", "runserver", "0", "--noreload", option) as server:
        server.wait_until_it_serves()
        with pytest.raises(OSError, match="404") as refused:
            server.get("/static/tornjango/comet.js")
        refused.value.close()  # type: ignore[attr-defined]


def test_runserver_works_where_staticfiles_is_not_installed(tmp_path: Path) -> None:
    project = Project(tmp_path, apps=("tornjango",))
    with project.running("manage.py", "runserver", "0", "--noreload") as server:
        server.wait_until_it_serves()
        assert server.get("/") == "quick"


def test_routes_lists_pattern_name_view_and_kind(tmp_path: Path) -> None:
    done = Project(tmp_path).run(*PYTHON_M, "routes", "quick")
    assert done.returncode == 0
    heading, line = done.stdout.splitlines()
    assert heading.split() == ["Pattern", "Name", "View", "Kind"]
    assert line.split() == ["/", "home", "urls.quick", "async"]


def test_without_a_project_there_is_one_clear_sentence(tmp_path: Path) -> None:
    project = Project(tmp_path)
    (tmp_path / "manage.py").unlink()
    done = project.run(*PYTHON_M, "serve")
    assert done.returncode == 2
    assert done.stderr.startswith("tornjango: no settings found. Run it in the folder of a manage")


@pytest.mark.parametrize(
    ("arguments", "code", "stream", "text"),
    [
        ([], 2, "out", "usage: tornjango COMMAND"),
        (["--help"], 0, "out", "usage: tornjango COMMAND"),
        (["migrate"], 2, "err", "there is no command 'migrate'"),
    ],
)
def test_what_is_no_command_shows_the_commands(
    arguments: list[str], code: int, stream: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["tornjango", *arguments])
    assert left.value.code == code
    assert text in getattr(capsys.readouterr(), stream)


def test_a_startproject_is_served_with_its_admin(tmp_path: Path) -> None:
    project = Project(tmp_path)
    for name in ("manage.py", "settings.py", "urls.py"):
        (tmp_path / name).unlink()
    made = project.run("-m", "django", "startproject", "mysite", ".")
    assert made.returncode == 0, made.stderr
    settings = tmp_path / "mysite" / "settings.py"
    text = settings.read_text()
    settings.write_text(text.replace("INSTALLED_APPS = [", "INSTALLED_APPS = [\n    'tornjango',"))
    assert project.run("manage.py", "migrate").returncode == 0
    with project.running("manage.py", "runserver", "0", "--noreload") as server:
        server.wait_until_it_serves()
        assert "The install worked successfully" in server.get("/")
        assert "Django administration" in server.get("/admin/")
        assert "DJANGO Admin styles" in server.get("/static/admin/css/base.css")
        server.signal()
        assert server.wait() == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--workers=-1",), "serve: error: argument --workers: it must be a whole number, or 0"),
        (("--graceful-timeout", "soon"), "it must be a positive number of seconds, not 'soon'"),
        (("--access-log", "loud"), "it must be one of auto, runserver, common, json, off"),
        (("--health", "well"), "it must be a path that begins with a slash"),
    ],
)
def test_a_wrong_option_is_said_before_anything_is_done(
    options: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    done = Project(tmp_path).run(*PYTHON_M, "serve", *options)
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_options_go_before_settings(tmp_path: Path) -> None:
    settings = '{"GRACEFUL_TIMEOUT": 7, "THREADS": 3, "TRUSTED_PROXIES": ["10.0.0.1"]}'
    project = Project(tmp_path, options=settings)
    project.write(
        "urls.py",
        "from django.http import HttpResponse\nfrom django.urls import path\nfrom tornjango.conf import get_config\n"
        "def shown(request):\n    c = get_config()\n"
        "    return HttpResponse(repr((c.GRACEFUL_TIMEOUT, c.THREADS, c.TRUSTED_PROXIES, c.WATCHDOG)))\n"
        "urlpatterns = [path('', shown)]\n",
    )
    options = (
        "--graceful-timeout",
        "0.5",
        "--proxy",
        "unix",
        "--proxy",
        "10.0.0.0/8",
        "--watchdog",
        "0",
    )
    with project.running(*PYTHON_M, "serve", "0", "--noreload", *options) as server:
        server.wait_until_it_serves()
        assert server.get("/") == "(0.5, 3, ['unix', '10.0.0.0/8'], 0.0)"
    with project.running("manage.py", "runserver", "0", "--noreload", "--nothreading") as server:
        server.wait_until_it_serves()
        assert server.get("/") == "(7, 1, ['10.0.0.1'], None)"


OTHERS_RUNSERVER = """
from {base} import Command as Base

class Command(Base):
    def add_arguments(self, parser):
        super().add_arguments(parser)
        parser.add_argument("--of-theirs", action="store_true")

    def inner_run(self, *args, **options):
        self.stdout.write(f"theirs: {{options['of_theirs']}}")
        super().inner_run(*args, **options)
"""
DJANGOS = "django.core.management.commands.runserver"
NOT_DJANGOS = (
    "from django.core.management.base import BaseCommand\nclass Command(BaseCommand): pass"
)


def add_app(project: Project, name: str, runserver: str) -> None:
    commands = project.folder / name / "management" / "commands"
    commands.mkdir(parents=True)
    for folder in (commands, commands.parent, commands.parent.parent):
        (folder / "__init__.py").touch()
    (commands / "runserver.py").write_text(runserver)


def test_another_apps_runserver_that_comes_later_keeps_its_ways(tmp_path: Path) -> None:
    apps = ("tornjango", "odd", "theirs", "django.contrib.staticfiles")
    project = Project(tmp_path, apps=apps)
    add_app(project, "odd", NOT_DJANGOS)
    staticfiles = "django.contrib.staticfiles.management.commands.runserver"
    add_app(project, "theirs", OTHERS_RUNSERVER.format(base=staticfiles))
    command = ("manage.py", "runserver", "0", "--noreload", "--of-theirs")
    with project.running(*command) as server:
        server.wait_for("theirs: True")
        server.wait_until_it_serves()
        assert "class Comet" in server.get("/static/tornjango/comet.js")


def test_an_app_with_a_server_of_its_own_is_not_asked(tmp_path: Path) -> None:
    project = Project(tmp_path, apps=("tornjango", "daphne", "django.contrib.staticfiles"))
    add_app(project, "daphne", "raise ZeroDivisionError")
    with project.running("manage.py", "runserver", "0", "--noreload") as server:
        server.wait_until_it_serves()
        assert "class Comet" in server.get("/static/tornjango/comet.js")


@pytest.mark.parametrize("apps", [("tornjango",), ("tornjango", "django.contrib.staticfiles")])
def test_wsgi_goes_back_to_djangos_own_server(apps: tuple[str, ...], tmp_path: Path) -> None:
    project = Project(tmp_path, apps=apps)
    # Django's own serves what WSGI_APPLICATION says, and no async view without asgiref's bridge.
    with project.running("manage.py", "runserver", "127.0.0.1:0", "--noreload", "--wsgi") as server:
        line = server.wait_for("development server at")
        server.url = line.split(" at ")[1].strip().rstrip("/")
        server.wait_for("WARNING: This is a development server.")
        with urlopen(f"{server.url}/page/") as response:
            assert response.headers["Server"].startswith("WSGIServer/")
            assert response.read() == b"first"


def test_the_options_of_runserver_are_djangos(tmp_path: Path) -> None:
    shown = Project(tmp_path).run("manage.py", "runserver", "--help").stdout
    for option in ("--nostatic", "--insecure", "--ipv6", "--noreload", "--nothreading"):
        assert option in shown
    for option in ("--skip-checks", "--settings", "--pythonpath", "--no-color", "--wsgi"):
        assert option in shown
    assert "--workers" not in shown
