"""Makes the project's virtual environment, or finds it made, and prints the path of its Python.

Called as `_environment.py GROUP` (a dependency group of pyproject.toml) by the commands of this folder, with nothing
installed yet. Versions of Python and Django have an environment each.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
MOMOKO = "momoko==2.2.5.1"
DJANGOS = ("5.2", "6.0", "6.1")


def main(group: str) -> None:
    django = os.environ.get("DJANGO") or ("6.1" if sys.version_info >= (3, 12) else "5.2")
    if django not in DJANGOS:
        sys.exit(f"DJANGO={django} is not one of {', '.join(DJANGOS)}, which tornjango runs on.")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = ROOT / ".venv" / f"python{version}-django{django}"
    folder.parent.mkdir(exist_ok=True)
    with _lock(folder.parent / "lock"):
        _ensure(folder, group, django)
    print(folder / "bin" / "python")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Two commands started at once install one after the other."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("Waiting for another command to finish installing")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _ensure(folder: Path, group: str, django: str) -> None:
    stamp = folder / f"installed-{group}"
    wanted = _wanted()
    python = folder / "bin" / "python"
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    log = folder.with_name(f"{folder.name}.log")
    log.unlink(missing_ok=True)
    if not python.exists() or not any(folder.glob("installed-*")):
        _make(folder, python, log)
    _say(f"Installing what bin/{group} needs, Django {django} among it: about a minute")
    pip = [str(python), "-m", "pip", "install", "--no-input", "--retries", "2"]
    _run(log, *pip, "-e", ".[postgres]", "--group", group, f"django=={django}.*")
    _run(log, *pip, "--no-deps", MOMOKO)
    stamp.write_text(wanted)


def _wanted() -> str:
    """What the stamp says: other than this, an environment has to be brought up to date."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tables = ("build-system", "project", "dependency-groups")
    return hashlib.sha256(repr([MOMOKO, *map(project.get, tables)]).encode()).hexdigest()


def _make(folder: Path, python: Path, log: Path) -> None:
    if importlib.util.find_spec("ensurepip") is None:
        sys.exit(
            f"{sys.executable} cannot make virtual environments."
            " On Debian and Ubuntu: apt install python3-venv"
        )
    _say(f"Making a virtual environment in {folder.relative_to(ROOT)}")
    shutil.rmtree(folder, ignore_errors=True)
    _run(log, sys.executable, "-m", "venv", folder)
    # The first that knows dependency groups.
    _run(log, python, "-m", "pip", "install", "--no-input", "--retries", "2", "pip>=25.1")


def _run(log: Path, *command: str | Path) -> None:
    with log.open("ab") as output:
        code = subprocess.call(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    if code:
        sys.exit(_reason(log))


def _reason(log: Path) -> str:
    text = log.read_text(errors="replace")
    if "Retrying (Retry(" in text:
        return (
            "The package index could not be reached, so nothing could be installed."
            f" Look at the network (and at {log.relative_to(ROOT)}), then try again."
        )
    tail = "\n".join(line[:200] for line in text.splitlines()[-10:])
    return f"{tail}\nInstalling failed: all that pip said is in {log.relative_to(ROOT)}."


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except PermissionError as error:
        sys.exit(f"{error.filename} belongs to another user: who ran this command here before?")
