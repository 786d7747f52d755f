"""Worker processes, from the inside: how `serve` becomes the master of some, and how it is one of them.

What the master does is in `tornjango.supervisor`, a program without anything of the project in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import socket
import sys
from functools import cache
from pathlib import Path
from typing import NoReturn

from tornjango import comet, supervisor
from tornjango.access import Answer
from tornjango.conf import Config
from tornjango.server import Server, on_signals, run
from tornjango.sockets import SYSTEMD, SocketFile

logger = logging.getLogger("tornjango.processes")


def supervise(
    listeners: list[socket.socket],
    config: Config,
    *,
    file: SocketFile | None = None,
    quiet: bool = False,
) -> NoReturn:
    """Makes this process the master of ``config.WORKERS`` workers: nothing of what it was is left but its number.

    Each worker runs this process's own command line, and finds there that it is one (`this_worker`).
    """
    for listener in listeners:
        listener.set_inheritable(True)
    given = {
        "command": [sys.executable, *sys.orig_argv[1:]],
        "count": config.WORKERS,
        "sockets": [listener.fileno() for listener in listeners],
        "grace": config.GRACEFUL_TIMEOUT,
        "files": [(file.path, file.made)] if file is not None else [],
        "quiet": quiet,
    }
    environment = {**_first_environment(), supervisor.MASTER: json.dumps(given)}
    # Isolated, it needs nothing that an environment may change, and is small.
    program = [sys.executable, "-I", "-S", supervisor.__file__, *sys.argv[1:]]
    sys.stdout.flush()
    sys.stderr.flush()
    # They are let through when the master knows what they mean; until then some would end it.
    signal.pthread_sigmask(signal.SIG_BLOCK, supervisor.SIGNALS)
    os.execve(program[0], program, environment)


def _first_environment() -> dict[str, str]:
    """As this process was started: what the project has added since, a worker's project adds anew, as it is then."""
    try:
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")[:-1]
    except OSError:  # not Linux
        entries = [os.fsencode(f"{name}={value}") for name, value in os.environ.items()]
    pairs = (os.fsdecode(entry).partition("=") for entry in entries)
    return {name: value for name, _, value in pairs if name and name not in SYSTEMD}


class ThisWorker:
    """This process as one of a master's workers: the sockets it serves on, and its line to the master."""

    def __init__(
        self, number: int, channel: int, sockets: list[int], predecessor: int | None
    ) -> None:
        self.number = number
        #: The line to the worker whose place this one takes, if it does.
        self.predecessor = socket.socket(fileno=predecessor) if predecessor is not None else None
        self.sockets = [socket.socket(fileno=descriptor) for descriptor in sockets]
        self.channel = socket.socket(fileno=channel)
        for inherited in (*self.sockets, self.channel):
            inherited.set_inheritable(False)
            inherited.setblocking(False)
        if self.predecessor is not None:
            self.predecessor.set_inheritable(False)
        self._stopping = False

    def serve(self, server: Server) -> None:
        """Returns when the master, or its end, has told it to leave, or after SIGTERM; and everything is closed."""
        self.server = server
        handlers = {
            signal.SIGTERM: self._stop,
            signal.SIGQUIT: server.end,
            # The master's business, which ignored them for us while we started; programs that we start should not.
            signal.SIGINT: _nothing,
            signal.SIGHUP: _nothing,
        }
        with on_signals(handlers):
            run(server, self._serves, self._take_over)

    def _stop(self) -> None:
        """Once, though a service manager may send a signal to all processes, and the master one more."""
        if not self._stopping:
            self._stopping = True
            self.server.stop()

    async def _take_over(self, server: Server) -> None:
        """What the worker before has in memory it hands over when it is told to leave: so this one says first that it is ready."""
        if self.predecessor is not None:
            self._say_ready(server)
            await comet.take_over(self.predecessor)

    def _say_ready(self, server: Server) -> None:
        asyncio.get_running_loop().add_reader(self.channel, self._hear)
        self._say(f"ready {server.config.GRACEFUL_TIMEOUT}")

    def _serves(self, server: Server) -> None:
        if self.predecessor is None:
            self._say_ready(server)
        if server.config.MAX_REQUESTS:
            self._left = _share(server.config.MAX_REQUESTS)
            server.application.observers.append(self._count)

    def _count(self, answer: Answer) -> None:
        self._left -= 1
        if self._left == 0:
            self._say("full")

    def _say(self, words: str) -> None:
        with contextlib.suppress(OSError):  # the master is gone, which is heard as well
            self.channel.send(f"{words}\n".encode())

    def _hear(self) -> None:
        try:
            words, lines, _, _ = socket.recv_fds(self.channel, 4096, 1)
        except ConnectionResetError:
            words, lines = b"", []
        if words:  # there is one thing to be told
            for line in lines:  # to the worker that takes this one's place
                comet.hand_over(socket.socket(fileno=line))
            self.server.leave()
            return
        asyncio.get_running_loop().remove_reader(self.channel)
        logger.error("The master process is gone: worker %d ends", self.number)
        self._stop()


def _nothing() -> None:
    pass


def _share(limit: int) -> int:
    """Up to a tenth more, so that workers that began together do not end together."""
    return limit + random.randint(0, limit // 10)


@cache
def this_worker() -> ThisWorker | None:
    """What this process is to a master; None where it is nobody's worker.

    The variable that says so is taken away: processes that this one starts are none.
    """
    place = os.environ.pop(supervisor.WORKER, None)
    return ThisWorker(**json.loads(place)) if place else None
