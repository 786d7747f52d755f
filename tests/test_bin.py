"""The commands of bin/: what they say when something is not as it should be, and that they leave nothing running."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.postgres import wait_until_ended

ROOT = Path(__file__).parent.parent
NO_INDEX = {
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_FIND_LINKS": "",
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
}


def environment() -> dict[str, str]:
    """Without what the tests' own run was told: its servers and versions."""
    told = {"PYTHON", "PSYCOPG", "DJANGO", "DATABASE_URL"}
    return {n: value for n, value in os.environ.items() if "PG" not in n and n not in told}


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment() | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def find_python(**env: str) -> subprocess.CompletedProcess[str]:
    return run("sh", "-c", ". bin/_common.sh; find_python", "bin/demo", **env)


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str, str], Path]:
    """Makes a program that prints one line, or fails if that is empty."""

    def make(name: str, prints: str) -> Path:
        path = tmp_path / "programs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{f'echo {prints}' if prints else 'exit 127'}\n")
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def clone(folder: Path) -> Path:
    """A folder with this clone's commands and code, and with nothing installed or saved in it."""
    shutil.copytree(ROOT / "bin", folder / "bin")
    for name in (
        "pyproject.toml",
        "README.rst",
        "LICENSE",
        "tornjango",
        "tests",
        "example_project",
    ):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.parametrize("command", ["demo", "test", "check"])
def test_a_python_too_old_is_named(command: str, program: Callable[[str, str], Path]) -> None:
    old = program("python3", "3.9")
    result = run(f"bin/{command}", PYTHON=str(old))
    assert result.returncode == 1
    assert result.stderr == f"tornjango needs Python 3.11 or later; PYTHON={old} is 3.9.\n"


def test_a_python_that_does_not_exist_is_named() -> None:
    result = run("bin/demo", PYTHON="/nowhere/python3")
    assert result.returncode == 1
    assert "PYTHON=/nowhere/python3 is no Python that runs" in result.stderr


def test_a_python_too_old_for_the_django_that_is_asked_for_is_named(
    program: Callable[[str, str], Path],
) -> None:
    result = run("bin/test", PYTHON=str(program("python3", "3.11")), DJANGO="6.1")
    assert result.returncode == 1
    assert "tornjango with Django 6.1 needs Python 3.12 or later" in result.stderr


def test_a_shim_that_does_not_run_and_an_old_python_are_passed_over(
    program: Callable[[str, str], Path],
) -> None:
    program("python3", "3.10")
    shim = program("python3.14", "")
    for name in ("python3.13", "python3.12"):
        program(name, "")
    good = program("python3.11", "3.11")
    result = find_python(PATH=f"{shim.parent}:{os.environ['PATH']}")
    assert (result.stdout, result.returncode) == (f"{good}\n", 0)


def test_a_python_of_pyenv_is_found_without_being_on_the_path(tmp_path: Path) -> None:
    python = tmp_path / "versions" / "3.12.9" / "bin" / "python3"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 3.12\n")
    python.chmod(0o755)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "dirname", "ls"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    result = find_python(PATH=str(tools), PYENV_ROOT=str(tmp_path))
    assert (result.stdout, result.stderr) == (f"{python}\n", "")


def test_a_machine_without_python_is_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "dirname").symlink_to(shutil.which("dirname") or "")
    (tmp_path / "sh").symlink_to(shutil.which("sh") or "")
    result = run("sh", "bin/demo", PATH=str(tmp_path), PYENV_ROOT=str(tmp_path))
    assert result.returncode == 1
    assert "needs Python 3.11 or later, and this machine shows none" in result.stderr


def test_a_django_that_tornjango_does_not_run_on_is_refused() -> None:
    result = run(sys.executable, "bin/_environment.py", "demo", DJANGO="4.2")
    assert result.returncode == 1
    assert result.stderr.startswith("DJANGO=4.2 is not one of 5.2, 6.0, 6.1")


@pytest.fixture
def fake_python(program: Callable[[str, str], Path], tmp_path: Path) -> Path:
    """A Python whose environment is itself, and whose pytest only tells what it was given; with a browser beside it."""
    program("chromium", "")
    path = program("python3", "3.13")
    path.write_text(f"""#!/bin/sh
case "$1 $2" in
    "-c "*) echo 3.13 ;;
    "bin/_environment.py test") echo {path} ;;
    "-m bench.environment") echo {tmp_path}/psycopg ;;
    "-m pytest") shift 2; echo "path=${{PYTHONPATH:-}} tests=$*"; exit "${{FAILS:-0}}" ;;
esac
""")
    return path


@pytest.mark.parametrize("fails", ["0", "1"])
def test_the_suite_is_run_and_its_part_about_databases_with_psycopg_3_too(
    fake_python: Path, tmp_path: Path, fails: str
) -> None:
    path = f"{fake_python.parent}:{os.environ['PATH']}"
    result = run("bin/test", PYTHON=str(fake_python), PATH=path, PYTHONPATH="", FAILS=fails)
    first, _, second = result.stdout.splitlines()
    assert first == "path= tests=-n 3 --dist loadfile"
    assert second.startswith(f"path={tmp_path}/psycopg tests=-n 3 --dist loadfile tests/test_db_")
    assert "tests/test_db_engines_psycopg.py" in second
    assert result.returncode == int(fails)


def test_what_is_given_is_run_once_with_psycopg_3_if_asked_for(
    fake_python: Path, tmp_path: Path
) -> None:
    path = f"{fake_python.parent}:{os.environ['PATH']}"
    command = ("bin/test", "tests/test_conf.py", "-q")
    result = run(*command, PYTHON=str(fake_python), PATH=path, PYTHONPATH="")
    assert result.stdout == "path= tests=tests/test_conf.py -q\n"
    result = run(*command, PYTHON=str(fake_python), PATH=path, PYTHONPATH="", PSYCOPG="3")
    assert result.stdout == f"path={tmp_path}/psycopg tests=tests/test_conf.py -q\n"


@pytest.mark.slow
def test_no_network_at_install_is_one_sentence(clone: Path) -> None:
    result = run("bin/demo", cwd=clone, PYTHON=sys.executable, **NO_INDEX)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("The package index could not be reached")
    assert "Traceback" not in result.stderr


def test_the_demo_says_that_its_port_is_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run(sys.executable, "bin/_demo.py", str(port))
    assert result.returncode == 1
    assert result.stderr.startswith(f"Cannot listen on 127.0.0.1:{port}: Address already in use")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("address", ["", "x", "127.0.0.1:", "127.0.0.1:0", "65536", "::1:8000"])
def test_the_demo_refuses_what_is_no_address(address: str) -> None:
    result = run(sys.executable, "bin/_demo.py", address)
    assert (result.returncode, result.stderr) == (
        1,
        f"{address!r} is not an address: give a port, or address:port.\n",
    )


def test_the_demo_says_that_the_database_of_the_environment_does_not_answer(clone: Path) -> None:
    url = "postgresql://somebody@127.0.0.1:9/nothing"
    result = run(sys.executable, "bin/_demo.py", free_port(), cwd=clone, DATABASE_URL=url)
    assert result.returncode == 1
    assert result.stderr.startswith("The database does not answer: ")
    assert not (clone / ".data" / "postgres").exists()


@pytest.fixture
def demo(clone: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts bin/demo's program and returns when it serves."""
    started = []

    def start(port: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "bin/_demo.py", port],
            cwd=clone,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        wait_for_line(process, "Quit the server with")
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()
    for server in servers(clone):
        wait_until_ended(server)


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout
    said = []
    for line in process.stdout:
        said.append(line)
        if text in line:
            return
    pytest.fail(f"bin/demo ended with {process.wait()}: {''.join(said)}")


def servers(clone: Path) -> list[psutil.Process]:
    """The PostgreSQL servers whose data is in this clone."""
    folder = str(clone / ".data" / "postgres")
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if process.info["status"] != psutil.STATUS_ZOMBIE
        and "-D" in (process.info["cmdline"] or [])
        and folder in process.info["cmdline"]
    ]


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


@pytest.mark.slow
def test_a_demo_serves_alone_and_ends_all_it_started(
    clone: Path, demo: Callable[[str], subprocess.Popen[str]]
) -> None:
    port = free_port()
    process = demo(port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
        assert answer.status == 200
    second = run(sys.executable, "bin/_demo.py", free_port(), cwd=clone)
    assert second.returncode == 1
    assert f"runs in this clone already, as process {process.pid}" in second.stderr
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0
    assert servers(clone) == []


@pytest.mark.slow
def test_a_demo_that_was_killed_leaves_no_server_and_starts_again(
    clone: Path, demo: Callable[[str], subprocess.Popen[str]]
) -> None:
    first = demo(free_port())
    left = servers(clone)
    assert left
    first.kill()
    for server in left:
        wait_until_ended(server)
    again = demo(free_port())
    again.terminate()
    assert again.wait(timeout=20) == 0
    assert servers(clone) == []
