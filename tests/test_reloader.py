from __future__ import annotations

from pathlib import Path

import pytest

from tests.projects import URLS, Project, touch

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
