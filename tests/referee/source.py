from __future__ import annotations

import contextlib
import fcntl
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import django


class SourceError(Exception):
    """Django's tests could not be had."""


def tests(folder: Path) -> Path:
    """The folder of the tests of the Django that is installed; taken from the package index at the first call.

    Raises SourceError when that does not work.
    """
    version = django.__version__
    kept = folder / f"django-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / "lock"):
        if not kept.exists():
            _fetch(version, folder, kept)
    return kept / "tests"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(version: str, folder: Path, kept: Path) -> None:
    print(f"Fetching the source of Django {version}, for its tests", file=sys.stderr, flush=True)
    # In the same file system, so that it appears whole or not at all.
    with tempfile.TemporaryDirectory(dir=folder) as name:
        new = Path(name)
        _download(version, new)
        _unpack(next(new.glob("*.tar.gz")), new / "source")
        (new / "source").replace(kept)


def _download(version: str, into: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--retries", "2"]
    # Only the source distribution has the tests.
    command += ["--no-deps", "--no-binary", "django"]
    done = subprocess.run(
        [*command, "--dest", into, f"django=={version}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SourceError(
            f"The source of Django {version} could not be downloaded:\n{done.stderr.strip()}"
        )


def _unpack(archive: Path, into: Path) -> None:
    """What is in the archive's only folder: of it, ``tests``."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            _, _, member.name = member.name.partition("/")
            if member.name.startswith("tests/"):
                tar.extract(member, into, filter="data")
