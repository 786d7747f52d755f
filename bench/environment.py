"""The peers' virtual environment: theirs has psycopg 3, which Django would take in tornjango's place of psycopg2."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from pathlib import Path

import django

from bench.servers import ROOT, BenchError

GROUP = "bench-peers"


def peers_python() -> str:
    """Its interpreter, of our own Python and Django versions; made at the first call. Raises BenchError."""
    version = ".".join(platform.python_version_tuple()[:2])
    folder = ROOT / ".venv" / f"{GROUP}-python{version}-django{django.__version__}"
    python, stamp = folder / "bin" / "python", folder / "installed"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        _make(folder, python)
        stamp.write_text(wanted)
    return str(python)


def _make(folder: Path, python: Path) -> None:
    print(f"Installing the peers in {folder.relative_to(ROOT)}", file=sys.stderr, flush=True)
    folder.parent.mkdir(exist_ok=True)
    pip: list[str | Path] = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-input",
        "--retries",
        "2",
    ]
    _run(sys.executable, "-m", "venv", "--clear", folder)
    # The first that knows dependency groups.
    _run(*pip, "pip>=25.1")
    _run(*pip, "--group", GROUP, f"django=={django.__version__}")


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(
            f"The peers' environment could not be made:\n{done.stdout}{done.stderr}".strip()
        )
