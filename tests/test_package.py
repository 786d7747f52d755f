"""What a user gets: the package that is built, and what importing it does."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tornjango

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tornjango"


def python(*arguments: str | Path, cwd: Path = ROOT) -> str:
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    result = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_importing_it_imports_neither_django_nor_tornado() -> None:
    code = "import sys, tornjango; print(sorted({'django', 'tornado'} & set(sys.modules)))"
    assert python("-c", code) == "[]\n"


def test_every_public_name_is_there() -> None:
    for name in tornjango.__all__:
        assert getattr(tornjango, name) is not None


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tornjango.nothing


def test_every_module_can_be_imported_first() -> None:
    """No cycle of imports hides behind the order in which others happen to import.

    Those that want psycopg 3 have their turn when the tests are run with it.
    """
    code = (
        "import os, subprocess, sys, django; django.setup()\n"
        "for name in sys.argv[1:]:\n"
        "    if not os.fork():\n"
        "        try: __import__(name)\n"
        "        except ModuleNotFoundError as exc:\n"
        "            if exc.name != 'psycopg': raise\n"
        "        os._exit(0)\n"
        "    _, status = os.wait()\n"
        "    if status: sys.exit(name)\n"
    )
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name not in {"__init__.py", "__main__.py"}
    ]
    python("-c", code, *names)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as it would be published, built in a copy: building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.rst", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(PACKAGE, folder / "tornjango", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel as build; print(build('.'))"
    name = subprocess.check_output(
        [sys.executable, "-c", build], cwd=folder, text=True, stderr=subprocess.STDOUT
    )
    return folder / name.split()[-1]


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    files = {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == files


@pytest.mark.slow
def test_the_wheel_says_what_it_needs_and_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"tornjango-{tornjango.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        assert "tornjango = tornjango.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    for line in (
        "Requires-Python: >=3.11",
        "Requires-Dist: django<6.2,>=5.2",
        "License-Expression: BSD-3-Clause",
    ):
        assert f"{line}\n" in metadata
    # With its metadata, no resolver would find a Tornado for it.
    assert "momoko" not in "\n".join(x for x in metadata.splitlines() if x.startswith("Requires"))


def test_the_changelog_knows_the_version() -> None:
    assert f"\n{tornjango.__version__} (" in (ROOT / "CHANGELOG.rst").read_text()
