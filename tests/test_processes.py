from __future__ import annotations

import asyncio
import http.client
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError

import psutil
import pytest

from tests.load import Load
from tests.projects import Process, Project
from tornjango.supervisor import FIRST_DELAY, LONGEST_DELAY, Supervisor

SERVE = ("-m", "tornjango", "serve", "127.0.0.1:0")
URLS = """
import asyncio, os, time
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path

async def home(request):
    return HttpResponse("before")

def pid(request):
    return HttpResponse(str(os.getpid()))

async def parks(request):
    async def parts():
        yield str(os.getpid()).ljust(10)
        await asyncio.sleep(float(request.GET["seconds"]))
        yield "went"
    return StreamingHttpResponse(parts())

def blocks(request):
    print("blocked", flush=True)
    time.sleep(float(request.GET["seconds"]))
    return HttpResponse("went")

def crashes(request):
    os._exit(7)

urlpatterns = [
    path("", home), path("pid/", pid), path("parks/", parks), path("blocks/", blocks), path("crashes/", crashes),
]
"""
pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path, debug=False)
    project.write("urls.py", URLS)
    return project


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads that ask while the test goes on."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


@contextmanager
def serving(project: Project, *options: str, workers: int = 2) -> Iterator[Process]:
    with project.running(*SERVE, "--workers", str(workers), *options) as server:
        server.wait_until_it_serves()
        for _ in range(workers):
            server.wait_for(" serves")
        yield server


def port_of(server: Process) -> int:
    return int(server.url.rpartition(":")[2])


class Parked:
    """A request whose answer has begun, and whose end takes as long as it says."""

    def __init__(self, server: Process, seconds: float) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=20)
        self.connection.request("GET", f"/parks/?seconds={seconds}")
        self.response = self.connection.getresponse()
        self.pid = int(self.response.read(10))

    def rest(self) -> bytes:
        """Raises ``http.client.IncompleteRead`` or ``OSError`` when it is broken off."""
        try:
            return self.response.read()
        finally:
            self.connection.close()


def parked_in_each(server: Process, seconds: float) -> list[Parked]:
    """One request in each of two workers."""
    parked = {}
    while len(parked) < 2:
        request = Parked(server, seconds)
        if parked.setdefault(request.pid, request) is not request:
            request.connection.close()
    return list(parked.values())


def pids(server: Process) -> set[int]:
    """The processes that answer, of which there are two."""
    found: set[int] = set()
    while len(found) < 2:
        found.add(int(server.get("/pid/")))
    return found


@pytest.mark.parametrize("how", ["was ended by SIGKILL", "ended with exit code 7"])
def test_a_worker_that_dies_is_replaced_and_takes_only_its_own_requests_along(
    how: str, project: Project
) -> None:
    with serving(project) as server:
        parked = {request.pid: request for request in parked_in_each(server, 2)}
        with Load(port_of(server)) as load:
            load.wait_until(lambda: load.answers["before"] > 10)
            if "SIGKILL" in how:
                os.kill(next(iter(parked)), signal.SIGKILL)
            else:
                with pytest.raises(ConnectionError):
                    server.get("/crashes/")
            died = int(server.wait_for(how).partition("(process ")[2].partition(")")[0])
            server.wait_for(" serves")
            answered = load.answers["before"]
            load.wait_until(lambda: load.answers["before"] > answered + 10)
        with pytest.raises((http.client.IncompleteRead, OSError)):
            parked.pop(died).rest()
        assert parked.popitem()[1].rest() == b"went"
        assert len(load.failures) <= 4  # each client had one request under way at most


def test_sighup_serves_new_code_and_no_request_is_lost(project: Project) -> None:
    with serving(project, "--graceful-timeout", "3") as server:
        slow = Parked(server, 1)
        with Load(port_of(server)) as load:
            load.wait_until(lambda: load.answers["before"] > 10)
            project.write("urls.py", URLS.replace("before", "after"))
            os.kill(server.process.pid, signal.SIGHUP)
            while "".join(server.lines).count("ended with exit code 0") < 2:
                server.wait_for("Worker")
            load.answers.clear()
            load.wait_until(lambda: load.answers["after"] > 10)
        assert load.failures == []
        assert set(load.answers) == {"after"}
        assert slow.rest() == b"went"


def test_code_that_is_broken_at_sighup_leaves_the_workers_in_place(project: Project) -> None:
    with (
        serving(project, "--graceful-timeout", "3") as server,
        Load(port_of(server)) as load,
    ):
        before = pids(server)
        project.write("urls.py", "import nothing_of_this_name")
        os.kill(server.process.pid, signal.SIGHUP)
        server.wait_for("No module named 'nothing_of_this_name'")
        server.wait_for("before it served: Worker")
        server.wait_for("No other worker is replaced either")
        assert pids(server) == before
        project.write("urls.py", URLS.replace("before", "after"))
        os.kill(server.process.pid, signal.SIGHUP)
        load.wait_until(lambda: load.answers["after"] > 10)
        for _ in range(2):
            server.wait_for("is replaced")
    assert load.failures == []


def test_a_worker_is_replaced_after_its_share_of_requests_and_none_is_lost(
    project: Project,
) -> None:
    with (
        serving(project, "--max-requests", "40", workers=1) as server,
        Load(port_of(server)) as load,
    ):
        for _ in range(3):
            server.wait_for("has had its share of requests")
            server.wait_for("is replaced")
    assert load.failures == []
    assert load.answers["before"] >= 120


def test_sigterm_lets_requests_finish_though_every_process_gets_it_twice(
    project: Project, pool: ThreadPoolExecutor
) -> None:
    with serving(project) as server:
        parked = parked_in_each(server, 1.5)
        blocked = pool.submit(server.get, "/blocks/?seconds=1")
        server.wait_for("blocked")
        server.signal(signal.SIGTERM)
        refused(server)
        server.signal(signal.SIGTERM)
        assert [request.rest() for request in parked] == [b"went", b"went"]
        assert blocked.result() == "went"
        assert server.wait() == 0
    assert "Traceback" not in "".join(server.lines)
    assert server.lines[-1].endswith("Stopped\n")


def refused(server: Process) -> None:
    """Waits until nobody listens."""
    while True:
        try:
            socket.create_connection(("127.0.0.1", port_of(server)), timeout=5).close()
        except OSError:
            return


@pytest.mark.parametrize("signals", [[signal.SIGINT, signal.SIGINT], [signal.SIGQUIT]])
def test_a_second_sigint_or_a_sigquit_stops_at_once(
    signals: list[signal.Signals], project: Project, pool: ThreadPoolExecutor
) -> None:
    with serving(project, workers=1) as server:
        parked = Parked(server, 60)
        blocked = pool.submit(server.get, "/blocks/?seconds=60")
        server.wait_for("blocked")
        for number in signals:
            os.kill(server.process.pid, number)
            server.wait_for("Stopping")
        assert server.wait() == 0
        with pytest.raises((http.client.IncompleteRead, OSError)):
            parked.rest()
        with pytest.raises((HTTPError, ConnectionError, http.client.HTTPException)) as ended:
            blocked.result()
        if isinstance(ended.value, HTTPError):
            ended.value.close()


def test_requests_that_do_not_finish_in_time_are_ended(
    project: Project, pool: ThreadPoolExecutor
) -> None:
    with serving(project, "--graceful-timeout", "0.2", workers=1) as server:
        request = Parked(server, 60)
        server.signal(signal.SIGTERM)
        with pytest.raises((http.client.IncompleteRead, OSError)):
            request.rest()
        assert server.wait() == 0
    assert "1 requests did not finish in 0.2 s" in "".join(server.lines)


def test_workers_end_when_their_master_is_gone(project: Project) -> None:
    with serving(project, workers=1) as server:
        request = Parked(server, 1)
        os.kill(server.process.pid, signal.SIGKILL)
        assert request.rest() == b"went"
        server.wait()  # for its output, which the workers have, too
    assert "The master process is gone" in "".join(server.lines)


def test_broken_settings_are_shown_once_and_nothing_is_started(project: Project) -> None:
    project.write("settings.py", "import nothing_of_this_name")
    done = project.run(*SERVE, "--workers", "2")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert "No module named 'nothing_of_this_name'" in done.stderr


def test_workers_that_cannot_start_at_all_end_the_master(project: Project) -> None:
    broken = "import pathlib\nif pathlib.Path('seen').exists(): raise ZeroDivisionError\npathlib.Path('seen').touch()\n"
    project.write("urls.py", broken + URLS)  # whole when the master looks, broken for the workers
    done = project.run(*SERVE, "--workers", "2")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "ended with exit code 1 before it served: giving up" in done.stderr


def test_a_stop_while_workers_start_is_heard(project: Project) -> None:
    project.write("urls.py", "import time\ntime.sleep(1)\n" + URLS)
    with project.running(*SERVE, "--workers", "2") as server:
        server.wait_for("Starting 2 workers")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert "Traceback" not in "".join(server.lines)


def test_workers_that_are_stopped_while_they_start_are_not_taken_for_broken(
    project: Project,
) -> None:
    """As when a whole group is stopped, and they hear of it before their master."""
    project.write("urls.py", "import time\ntime.sleep(1)\n" + URLS)
    with project.running(*SERVE, "--workers", "1") as server:
        server.wait_for("Starting 1 workers")
        master = psutil.Process(server.process.pid)
        while not (workers := master.children()):  # nothing tells of it
            time.sleep(0.01)
        workers[0].terminate()
        server.wait_for("Worker 1 starts again in")
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.wait() == 0


def test_workers_need_a_command_line_of_their_own(project: Project) -> None:
    code = "import os; os.environ['DJANGO_SETTINGS_MODULE'] = 'settings'; from django.core.management import call_command; import django; django.setup(); call_command('serve', '0', workers=2)"
    done = project.run("-c", code)
    assert done.returncode == 1
    assert "Workers are started by the command line of their master" in done.stderr


def test_what_the_project_adds_to_the_environment_is_added_anew(project: Project) -> None:
    """As it is when workers are replaced: what manage.py reads from a file may have changed by then."""
    manage = (project.folder / "manage.py").read_text()
    project.write("manage.py", f"import os; os.environ.setdefault('FROM_FILE', 'old')\n{manage}")
    project.write("urls.py", URLS.replace('"before"', 'os.environ["FROM_FILE"]'))
    with project.running("manage.py", "serve", "0", "--workers", "1") as server:
        server.wait_until_it_serves()
        assert server.get("/") == "old"
        project.write(
            "manage.py", f"import os; os.environ.setdefault('FROM_FILE', 'new')\n{manage}"
        )
        os.kill(server.process.pid, signal.SIGHUP)
        server.wait_for("ended with exit code 0")  # until then the old one may take what comes
        assert server.get("/") == "new"


def test_one_that_dies_young_again_and_again_waits_longer_and_longer_up_to_a_bound() -> None:
    async def delays() -> list[float]:
        supervisor = Supervisor(command=[], count=1, sockets=[], grace=1, files=[])
        return [supervisor._delay(1) for _ in range(50)]

    waited = asyncio.run(delays())
    assert FIRST_DELAY / 2 <= waited[0] <= FIRST_DELAY
    assert all(LONGEST_DELAY / 2 <= delay <= LONGEST_DELAY for delay in waited[-30:])
    assert len({round(delay, 6) for delay in waited[-30:]}) > 20  # not all at one time
