"""A real Redis server of a test's own, in a folder: on a Unix socket, and nowhere else.

It ends with the process that started it, however that ends.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis

PROGRAM = shutil.which("redis-server") or shutil.which("valkey-server")

REASON = "needs redis-server on the PATH (on Debian: apt-get install redis-server)"

# Ends the server when the pipe on stdin closes: so does a process that is killed.
_WATCH = 'cat >/dev/null; kill -9 "$1" 2>/dev/null'


def version() -> int:
    """The program's, or Valkey's: it counts on from Redis' 7."""
    assert PROGRAM is not None
    told = subprocess.run([PROGRAM, "--version"], check=True, capture_output=True, text=True).stdout
    return int(told.partition(" v=")[2].partition(".")[0])


class Redis:
    """One server; its data, in ``folder``, outlives a `stop` or a `kill`, until it is told to `lose` them."""

    def __init__(self, *options: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="redis-"))
        self.url = f"unix://{self.folder}/socket"
        self._options = options
        self._server: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        #: For tests, to look and to meddle.
        self.client: Any = redis.Redis.from_url(self.url)

    def start(self, *options: str, until_ready: bool = True) -> None:
        """Returns when it has loaded its data. Does nothing when it runs already. ``options`` are for this time."""
        if self._server is not None:
            return
        assert PROGRAM is not None
        with open(self.folder / "log", "ab") as log:
            self._server = subprocess.Popen(
                [PROGRAM, *_settings(self.folder), *self._options, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
            )
        self._watcher = subprocess.Popen(
            ["sh", "-c", _WATCH, "watch", str(self._server.pid)], stdin=subprocess.PIPE
        )
        if until_ready:
            try:
                self._until_ready()
            except BaseException:
                self.kill()
                raise

    def _until_ready(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                self.client.ping()
                return
            except redis.RedisError:
                log = (self.folder / "log").read_text()
                assert self.runs, log
                assert time.monotonic() < deadline, log
                time.sleep(0.01)

    @property
    def runs(self) -> bool:
        return self._server is not None and self._server.poll() is None

    def stop(self) -> None:
        """In good order. Does nothing when it does not run."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Connections stay open, and are accepted, but nothing is answered."""
        assert self._server is not None
        self._server.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Ends `freeze()`; harmless without it."""
        if self._server is not None:
            self._server.send_signal(signal.SIGCONT)

    def lose(self) -> None:
        """It stops, and has nothing at its next start."""
        self.kill()
        for data in self.folder.glob("data*"):
            shutil.rmtree(data)

    def close(self) -> None:
        self.thaw()
        self.kill()
        self.client.close()
        shutil.rmtree(self.folder)

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

    def _end(self, how: signal.Signals) -> None:
        if self._server is None:
            return
        assert self._watcher is not None
        assert self._watcher.stdin is not None
        self._server.send_signal(how)
        self._server.wait()
        self._watcher.stdin.close()
        self._watcher.wait()
        self._server = self._watcher = None
        self.client.connection_pool.disconnect()


def _settings(folder: Path) -> Sequence[str]:
    data = folder / "data"
    data.mkdir(exist_ok=True)
    settings = {
        "bind": "127.0.0.1",
        "port": "0",
        "unixsocket": str(folder / "socket"),
        "dir": str(data),
        "save": "",
        "appendonly": "yes",
        "appendfsync": "no",
        "repl-timeout": "1",
    }
    return [word for name, value in settings.items() for word in (f"--{name}", value)]
