"""``tornjango``: the project's commands without its ``manage.py``, and without the app being installed."""

from __future__ import annotations

import os
import re
import runpy
import sys
from importlib import import_module
from pathlib import Path

from django.core import management
from django.core.management import ManagementUtility
from django.core.management.base import BaseCommand

#: Each with the management command that does it: "check" is Django's.
COMMANDS = {
    "serve": "serve",
    "runserver": "runserver",
    "routes": "routes",
    "check": "tornjango_check",
}

USAGE = """usage: tornjango COMMAND [options]

  serve [addr:port]   serve this project on Tornado
  routes [text]       list what answers which URL
  check               say what in this project costs threads or blocks, and what to do

Run it where manage.py is, or set DJANGO_SETTINGS_MODULE. More: tornjango COMMAND --help"""


class Utility(ManagementUtility):
    """Django's own, which knows where to find ours."""

    def __init__(self, argv: list[str]) -> None:
        program, self._command, *options = argv
        # Under this name alone Django keeps the autoreloader going while the project's code cannot be imported.
        name = (
            "runserver" if self._command == "serve" and "--help" not in options else self._command
        )
        super().__init__([program, name, *options])

    def fetch_command(self, subcommand: str) -> BaseCommand:
        module = import_module(f"tornjango.management.commands.{COMMANDS[self._command]}")
        command: BaseCommand = module.Command()
        return command


def main(argv: list[str] | None = None) -> None:
    """The console script; exits with 2 when there is nothing to do, or no project to do it with."""
    argv = list(sys.argv if argv is None else argv)
    if len(argv) < 2 or argv[1] in ("-h", "--help", "help"):
        print(USAGE)
        raise SystemExit(0 if len(argv) > 1 else 2)
    if argv[1].endswith(".py"):
        _run_program(argv[1:])
        return
    if argv[1] not in COMMANDS:
        print(f"tornjango: there is no command {argv[1]!r}.\n\n{USAGE}", file=sys.stderr)
        raise SystemExit(2)
    _find_settings(Path.cwd())
    Utility(argv).execute()


def _run_program(argv: list[str]) -> None:
    """Runs a ``manage.py`` so that its ``serve``, too, waits in development until what is broken is repaired.

    Django does that for ``runserver`` alone, before it looks at commands. The reloader of ``serve`` starts this.
    """
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).resolve().parent))
    management.ManagementUtility = _utility  # type: ignore[misc,assignment]
    runpy.run_path(argv[0], run_name="__main__")


def _utility(argv: list[str] | None = None) -> ManagementUtility:
    argv = list(sys.argv if argv is None else argv)
    return Utility(argv) if argv[1:2] == ["serve"] else ManagementUtility(argv)


def _find_settings(folder: Path) -> None:
    """As ``manage.py`` in this folder would: its folder is on the path, its settings are the default."""
    sys.path.insert(0, str(folder))
    if os.environ.get("DJANGO_SETTINGS_MODULE"):
        return
    manage = folder / "manage.py"
    named = r"""DJANGO_SETTINGS_MODULE["'\]]*\s*[,=]\s*["']([\w.]+)["']"""
    found = re.search(named, manage.read_text("utf-8")) if manage.is_file() else None
    if found is None:
        print(
            "tornjango: no settings found. Run it in the folder of a manage.py that names them, "
            "or set DJANGO_SETTINGS_MODULE.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    os.environ["DJANGO_SETTINGS_MODULE"] = found[1]
