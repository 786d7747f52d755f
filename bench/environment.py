"""What has psycopg 3 in it, which Django would take in tornjango's place of psycopg2: kept apart from the rest."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import django

from bench.servers import ROOT, BenchError

PROJECT = ROOT / "pyproject.toml"
PEERS = "bench-peers"
PSYCOPG = "psycopg"


def peers_python() -> str:
    """The peers' interpreter, of our own Python and Django versions; made at the first call. Raises BenchError."""
    folder = _folder(f"{PEERS}-python{_version()}-django{django.__version__}")
    return str(_made(folder, _make_peers) / "bin" / "python")


def psycopg_folder() -> str:
    """A folder for our own interpreter's path; made at the first call. Raises BenchError."""
    return str(_made(_folder(f"{PSYCOPG}-python{_version()}"), _make_psycopg))


def _version() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def _folder(name: str) -> Path:
    return ROOT / ".venv" / name


def _made(folder: Path, make: Callable[[Path], None]) -> Path:
    stamp = folder / "installed"
    wanted = hashlib.sha256(PROJECT.read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"Installing {folder.relative_to(ROOT)}", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        make(folder)
        stamp.write_text(wanted)
    return folder


def _make_peers(folder: Path) -> None:
    python = folder / "bin" / "python"
    _run(sys.executable, "-m", "venv", folder)
    # The first that knows dependency groups.
    _pip(python, "pip>=25.1")
    _pip(python, "--group", PEERS, f"django=={django.__version__}")


def _make_psycopg(folder: Path) -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]
    _pip(sys.executable, "--target", folder, *project["optional-dependencies"][PSYCOPG])


def _pip(python: str | Path, *arguments: str | Path) -> None:
    _run(python, "-m", "pip", "install", "--quiet", "--no-input", "--retries", "2", *arguments)


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"Installing failed:\n{done.stdout}{done.stderr}".strip())


if __name__ == "__main__":
    try:
        print(psycopg_folder())
    except BenchError as error:
        sys.exit(str(error))
