"""The servers that are measured: how each is started, watched from outside, and ended."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import psutil

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT = 30.0
STOP_TIMEOUT = 15.0


class BenchError(Exception):
    """The benchmark cannot go on; the message says why."""


#: Ours with psycopg2 and momoko, ours with psycopg 3 before them, and the peers' with psycopg 3 and its pool.
Environment = Literal["momoko", "psycopg", "peers"]


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to serve the project. ``command`` takes the interpreter and the port."""

    key: str
    name: str
    spelling: str
    command: Callable[[str, int], list[str]]
    environment: Environment = "momoko"


def _tornjango(python: str, port: int) -> list[str]:
    return [python, "-m", "tornjango", "serve", f"127.0.0.1:{port}", "--noreload"]


def _uvicorn(python: str, port: int) -> list[str]:
    options = ["--host", "127.0.0.1", "--port", str(port), "--no-access-log"]
    return [python, "-m", "uvicorn", "bench.project.asgi:application", *options]


def _gunicorn(python: str, port: int) -> list[str]:
    # As many threads as connections to the database, so that no thread waits for one.
    options = ["-k", "gthread", "--workers", "1", "--threads", "10", "-b", f"127.0.0.1:{port}"]
    return [python, "-m", "gunicorn", "bench.project.wsgi:application", *options]


def _granian(python: str, port: int) -> list[str]:
    options = ["--interface", "asgi", "--host", "127.0.0.1", "--port", str(port), "--no-access-log"]
    return [python, "-m", "granian", *options, "--workers", "1", "bench.project.asgi:application"]


def _daphne(python: str, port: int) -> list[str]:
    options = ["-b", "127.0.0.1", "-p", str(port), "--verbosity", "0"]
    return [python, "-m", "daphne", *options, "bench.project.asgi:application"]


def _bare(python: str, port: int) -> list[str]:
    return [python, "-m", "bench.bare", str(port)]


TORNJANGO = Peer("tornjango", "tornjango", "tornjango", _tornjango)
PSYCOPG = Peer("psycopg", "tornjango, psycopg 3", "tornjango", _tornjango, "psycopg")
UVICORN = Peer("uvicorn", "uvicorn + Django ASGI", "asgi", _uvicorn, "peers")
GRANIAN = Peer("granian", "granian + Django ASGI", "asgi", _granian, "peers")
DAPHNE = Peer("daphne", "Daphne + Django ASGI", "asgi", _daphne, "peers")
GUNICORN = Peer("gunicorn", "gunicorn threads + WSGI", "wsgi", _gunicorn, "peers")
BARE = Peer("tornado", "bare Tornado handler", "bare", _bare)
OURS = (TORNJANGO, PSYCOPG)
PEERS = (*OURS, UVICORN, GRANIAN, DAPHNE, GUNICORN, BARE)


@dataclasses.dataclass(frozen=True)
class Place:
    """What every server of a run is given: interpreters, the database, the core."""

    tornjango_python: str
    peers_python: str
    psycopg: str
    """A folder that has psycopg 3, for tornjango's interpreter."""
    env: dict[str, str]
    core: int

    def python(self, environment: Environment) -> str:
        return self.peers_python if environment == "peers" else self.tornjango_python

    def environ(self, environment: Environment) -> dict[str, str]:
        env = os.environ | self.env | {"BENCH_ENGINE": environment, "PYTHONPATH": str(ROOT)}
        if environment == "psycopg":
            env["PYTHONPATH"] += os.pathsep + self.psycopg
        return env

    def keep_to_core(self) -> None:
        """For a new process."""
        os.sched_setaffinity(0, {self.core})


class Server:
    """A running server and its children, seen from outside."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.popen = process
        self.process = psutil.Process(process.pid)
        self.port = port
        self.log = log

    def cpu(self) -> float:
        """Seconds of user and system time so far, of the server, its children, and those that ended."""
        return sum(map(_cpu, self._family()))

    def rss(self) -> int:
        """Bytes."""
        return sum(process.memory_info().rss for process in self._family())

    def threads(self) -> int:
        return sum(process.num_threads() for process in self._family())

    def get(self, path: str, *, timeout: float = 10.0) -> bytes:
        """The body of a 200. Raises OSError (urllib's errors are) for everything else."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=timeout) as got:
            body: bytes = got.read()
            return body

    def said(self) -> str:
        """The end of what it has written."""
        return self.log.read_text(errors="replace")[-3000:].strip() or "(nothing)"

    def wait_ready(self, path: str) -> None:
        """Returns when ``path`` is answered 200. Raises BenchError if the server ends or takes too long."""
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self.popen.poll() is not None:
                raise BenchError(f"The server ended at its start. It said:\n{self.said()}")
            try:
                self.get(path)
                return
            except urllib.error.HTTPError as error:
                raise BenchError(
                    f"{path} is answered {error}. The server said:\n{self.said()}"
                ) from None
            except OSError:
                time.sleep(0.05)
        raise BenchError(f"{path} had no answer in {START_TIMEOUT:.0f} s:\n{self.said()}")

    def stop(self) -> None:
        """In order if it can, by force after a while."""
        self.popen.send_signal(signal.SIGTERM)
        try:
            self.popen.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            print(f"process {self.popen.pid} had to be killed", file=sys.stderr)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def _family(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def serve(
    peer: Peer, place: Place, *, middleware: str = "none", under: tuple[str, ...] = ()
) -> Iterator[Server]:
    """A server of its own process group on its own core, ready for requests; ended at the exit.

    ``under`` is a module with arguments that runs the server's module, such as a profiler.
    """
    port = free_port()
    command = peer.command(place.python(peer.environment), port)
    command[2:2] = under
    env = place.environ(peer.environment) | {"BENCH_MIDDLEWARE": middleware}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env=env,
                start_new_session=True,
                preexec_fn=place.keep_to_core,
            )
        server = Server(process, port, log)
        try:
            server.wait_ready(f"/{peer.spelling}/json/")
            yield server
        finally:
            server.stop()
