"""The master process of ``serve --workers``: a program of its own, that keeps worker processes running.

It has the sockets, and nothing of the project: the workers import that, so a SIGHUP serves new code. It is run by its
path, in isolation, and so imports the standard library alone. `tornjango.processes` starts it, and has a worker's side.

A worker is told apart by where it is in its life:

    BOOTING --ready--> SERVING --told to leave--> LEAVING --> gone

and by whom it is to relieve, if anyone: that one serves until the new one is ready.
"""

from __future__ import annotations

import asyncio
import enum
import json
import logging
import os
import random
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

#: What tells this program, and a worker, what they are; JSON.
MASTER, WORKER = "TORNJANGO_MASTER", "TORNJANGO_WORKER"
#: A worker that dies younger than this is started again only after a while, in seconds.
YOUNG = 5.0
#: The while: from the first to the longest, each time twice as long, less up to a half at random.
FIRST_DELAY, LONGEST_DELAY = 0.2, 30.0
#: What a worker needs beyond its time for requests in flight, before it is killed.
KILL_AFTER = 3.0

#: How a worker ends that was told to. Who stops a whole group of processes may reach it before this one.
ENDED_BY_ORDER = (0, -signal.SIGTERM)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD)

logger = logging.getLogger("tornjango.supervisor")


class State(enum.Enum):
    BOOTING = "starting"
    SERVING = "serving"
    LEAVING = "leaving"


@dataclass(eq=False)
class Worker:
    number: int
    pid: int
    channel: socket.socket
    relieves: Worker | None
    #: What that one is to be given: its end of a line to this one.
    line: socket.socket | None
    began: float
    state: State = State.BOOTING
    #: How long its requests in flight may take when it ends; it says so when it is ready.
    grace: float = 0.0
    killing: asyncio.TimerHandle | None = None
    #: Whether it has had its share of requests.
    full: bool = False
    received: bytes = field(default=b"")

    def __str__(self) -> str:
        return f"Worker {self.number} (process {self.pid})"

    def kill(self, number: int) -> None:
        """Its process may be dead, but is not reaped before `Supervisor` forgets it: the number is still its own."""
        os.kill(self.pid, number)


class Supervisor:
    """Keeps ``count`` workers running, each started by ``command`` with the listening sockets open."""

    def __init__(
        self, *, command: list[str], count: int, sockets: list[int], grace: float, files: list[Any]
    ) -> None:
        self.command = command
        self.count = count
        self.sockets = sockets
        self.grace = grace
        self.files = files
        self.folder = _working_folder()
        self.workers: dict[int, Worker] = {}
        self.failures: dict[int, int] = {}
        self.stopping = False
        self.code = 0
        self._ever_ready = False
        #: The workers that a SIGHUP has yet to replace.
        self._to_replace: list[Worker] = []
        self._done = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def run(self) -> int:
        """Returns the exit code, when all workers are gone."""
        handlers: dict[int, Callable[[], None]] = {
            signal.SIGTERM: self.stop,
            signal.SIGINT: self.interrupt,
            signal.SIGQUIT: self.stop_at_once,
            signal.SIGHUP: self.reload,
            signal.SIGCHLD: self.reap,
        }
        for number, handler in handlers.items():
            self._loop.add_signal_handler(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        logger.info("Starting %d workers (master: process %d)", self.count, os.getpid())
        for number in range(1, self.count + 1):
            self.start(number)
        await self._done.wait()
        logger.info("Stopped")
        return self.code

    # A worker's life

    def start(self, number: int, relieves: Worker | None = None) -> None:
        if self.stopping:
            return
        ours, theirs = socket.socketpair()
        line, predecessor = (None, None) if relieves is None else socket.socketpair()
        try:
            pid = self._spawn(number, theirs, predecessor)
        except OSError as exc:  # no more processes, or no memory
            ours.close()
            _close(line)
            logger.error("Worker %d could not be started: %s", number, exc)
            self._start_later(number, relieves)
            return
        finally:
            theirs.close()
            _close(predecessor)
        ours.setblocking(False)
        worker = Worker(number, pid, ours, relieves, line, self._loop.time())
        self.workers[pid] = worker
        self._loop.add_reader(ours, self.hear, worker)

    def _spawn(self, number: int, channel: socket.socket, predecessor: socket.socket | None) -> int:
        """A new program, not a mere fork: it starts with nothing of this process but the sockets."""
        lines = {
            "channel": channel.fileno(),
            "predecessor": None if predecessor is None else predecessor.fileno(),
        }
        place = {"number": number, "sockets": self.sockets, **lines}
        environment = {**os.environ, WORKER: json.dumps(place)}
        # Until the child has its own ways with signals, it would tell this process's loop of them.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._become_worker(lines.values(), environment)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return pid

    def _become_worker(self, lines: Iterable[int | None], environment: dict[str, str]) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            # A terminal sends them to all its processes; here the master says what they mean.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            os.chdir(self.folder)
            for line in lines:
                if line is not None:
                    os.set_inheritable(line, True)
            os.execve(self.command[0], self.command, environment)
        except OSError as exc:
            os.write(2, f"{self.command[0]} cannot be run in {self.folder}: {exc}\n".encode())
        finally:
            os._exit(127)

    def hear(self, worker: Worker) -> None:
        """What workers say: ``ready`` and how long their requests may take at the end, and ``full``."""
        try:
            data = worker.channel.recv(4096)
        except ConnectionResetError:  # it died with words of ours unread
            data = b""
        if not data:  # it ends, which SIGCHLD tells better
            self._loop.remove_reader(worker.channel)
            return
        *lines, worker.received = (worker.received + data).split(b"\n")
        for line in lines:
            word, _, rest = line.decode().partition(" ")
            if word == "ready" and worker.state is State.BOOTING:
                self.ready(worker, float(rest))
            elif word == "full" and worker.state is State.SERVING:
                logger.info("%s has had its share of requests", worker)
                worker.full = True
                self.replace(worker)

    def ready(self, worker: Worker, grace: float) -> None:
        worker.state, worker.grace = State.SERVING, grace
        worker.began = self._loop.time()
        self._ever_ready = True
        logger.info("%s serves", worker)
        old, worker.relieves = worker.relieves, None
        line, worker.line = worker.line, None
        if old is not None and old.pid in self.workers:
            self.relieve(old, line)
        _close(line)
        self._replace_next()

    def replace(self, worker: Worker) -> None:
        if self._is_serving(worker) and not self._is_being_relieved(worker):
            self.start(worker.number, relieves=worker)

    def _is_serving(self, worker: Worker) -> bool:
        return worker.state is State.SERVING and self.workers.get(worker.pid) is worker

    def relieve(self, worker: Worker, line: socket.socket | None) -> None:
        """Tells it to leave when it has answered those that it has accepted, with a line to whoever takes its place."""
        worker.state = State.LEAVING
        logger.info("%s is replaced", worker)
        try:
            socket.send_fds(worker.channel, [b"leave\n"], [] if line is None else [line.fileno()])
        except OSError:  # it is dying
            worker.kill(signal.SIGTERM)
        self._kill_later(worker)

    def end(self, worker: Worker, number: int = signal.SIGTERM) -> None:
        worker.state = State.LEAVING
        worker.kill(number)
        self._kill_later(worker)

    def _kill_later(self, worker: Worker) -> None:
        if worker.killing is None:
            limit = (worker.grace or self.grace) + KILL_AFTER
            worker.killing = self._loop.call_later(limit, self._kill, worker, limit)

    def _kill(self, worker: Worker, limit: float) -> None:
        logger.warning("%s did not end in %g s: it is killed", worker, limit)
        worker.kill(signal.SIGKILL)

    # Its end

    def reap(self) -> None:
        """All that have ended; as the first process of a container, also those that are nobody's."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            worker = self.workers.pop(pid, None)
            if worker is not None:
                self._forget(worker)
                self.ended(worker, os.waitstatus_to_exitcode(status))
        if self.stopping and not self.workers:
            self._done.set()

    def _forget(self, worker: Worker) -> None:
        if worker.killing is not None:
            worker.killing.cancel()
        self._loop.remove_reader(worker.channel)
        worker.channel.close()
        _close(worker.line)

    def ended(self, worker: Worker, code: int) -> None:
        how = _how(code)
        if worker.state is State.LEAVING or self.stopping:
            log = logger.info if code in ENDED_BY_ORDER else logger.warning
            log("%s %s", worker, how)
        elif not self._ever_ready and code not in ENDED_BY_ORDER:
            logger.error("%s %s before it served: giving up", worker, how)
            self.code = 1
            self.stop()
        elif worker.relieves is not None and worker.relieves.pid in self.workers:
            self._not_relieved(worker, worker.relieves, how)
        elif self._is_being_relieved(worker):
            logger.error("%s %s; another is starting already", worker, how)
        else:
            logger.error("%s %s", worker, how)
            self._start_again(worker)

    def _not_relieved(self, worker: Worker, old: Worker, how: str) -> None:
        logger.error("%s %s before it served: %s stays", worker, how, old)
        if self._to_replace:
            logger.error(
                "No other worker is replaced either; mend what is wrong, and send SIGHUP again"
            )
            self._to_replace.clear()
        if old.full:
            self._loop.call_later(self._delay(worker.number), self.replace, old)

    def _start_again(self, worker: Worker) -> None:
        if worker.state is State.SERVING and self._loop.time() - worker.began >= YOUNG:
            self.failures.pop(worker.number, None)
            self.start(worker.number)
        else:
            self._start_later(worker.number)

    def _start_later(self, number: int, relieves: Worker | None = None) -> None:
        delay = self._delay(number)
        logger.warning("Worker %d starts again in %.1f s", number, delay)
        self._loop.call_later(delay, self.start, number, relieves)

    def _delay(self, number: int) -> float:
        failures = self.failures[number] = self.failures.get(number, 0) + 1
        longest = min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(failures - 1, 10))
        return longest * random.uniform(0.5, 1)

    def _is_being_relieved(self, worker: Worker) -> bool:
        return any(other.relieves is worker for other in self.workers.values())

    # What signals ask for

    def reload(self) -> None:
        """Replaces the workers by ones of the code as it is now, one by one."""
        if self.stopping:
            return
        logger.info("SIGHUP: the workers are replaced")
        self._to_replace = [w for w in self.workers.values() if w.state is not State.LEAVING]
        self._replace_next()

    def _replace_next(self) -> None:
        """The next that serves; one that still starts, perhaps with old code, has its turn when it does."""
        if any(worker.relieves is not None for worker in self.workers.values()):
            return
        worker = next(filter(self._is_serving, self._to_replace), None)
        if worker is not None:
            self._to_replace.remove(worker)
            self.replace(worker)

    def interrupt(self) -> None:
        """SIGINT: as SIGTERM at first, at once the second time."""
        if self.stopping:
            self.stop_at_once()
        else:
            self.stop()

    def stop(self) -> None:
        """No new connections; the workers end when their requests in flight have, or their time is over."""
        if self.stopping:
            return
        self.stopping = True
        logger.info("Stopping")
        self._stop_listening()
        for worker in self.workers.values():
            # One that starts may not know yet what SIGTERM means to it, and has nothing to lose.
            self.end(worker)
        if not self.workers:
            self._done.set()

    def stop_at_once(self) -> None:
        self.stopping = True
        logger.info("Stopping at once")
        self._stop_listening()
        for worker in self.workers.values():
            self.end(worker, signal.SIGQUIT)
            if worker.killing is not None:
                worker.killing.cancel()
            worker.killing = self._loop.call_later(KILL_AFTER, self._kill, worker, KILL_AFTER)
        if not self.workers:
            self._done.set()

    def _stop_listening(self) -> None:
        while self.sockets:
            os.close(self.sockets.pop())
        while self.files:
            path, made = self.files.pop()
            _remove(path, made)


def _close(line: socket.socket | None) -> None:
    if line is not None:
        line.close()


def _remove(path: str, made: list[int]) -> None:
    """A Unix socket's file, unless another server has put its own there."""
    try:
        found = os.stat(path)
        if [found.st_dev, found.st_ino] == made:
            os.unlink(path)
    except FileNotFoundError:
        pass


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"was ended by signal {-code}"


def _working_folder() -> str:
    """The path by which this folder was entered: a link that is changed leads workers to a new release."""
    entered = os.environ.get("PWD", "")
    try:
        if entered and os.path.samefile(entered, os.getcwd()):
            return entered
    except OSError:
        pass
    return os.getcwd()


def main() -> None:
    given = json.loads(os.environ.pop(MASTER))
    logging.basicConfig(
        level=logging.WARNING if given.pop("quiet") else logging.INFO,
        format="[%(asctime)s] [%(process)d] [%(levelname)s] %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S %z",
    )

    async def supervise() -> int:
        return await Supervisor(**given).run()

    sys.exit(asyncio.run(supervise()))


if __name__ == "__main__":
    main()
