from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError

import pytest

from tests import views
from tests.projects import Process, Project
from tests.serving import serving, until
from tornjango import comet

SERVE = ("-m", "tornjango", "serve", "127.0.0.1:0", "--noreload")
GET = b" HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads that ask while the test goes on."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("view", ["parks", "parks-sync"])
@pytest.mark.slow
def test_a_signal_stops_in_order(
    number: int, view: str, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    with Project(tmp_path).running(*SERVE) as server:
        server.wait_until_it_serves()
        answer = pool.submit(server.get, f"/{view}/?seconds=0.5")
        server.wait_for("parked")
        server.signal(number)
        assert answer.result() == "went"
        assert server.wait() == 0
        assert "Traceback" not in "".join(server.lines)


@pytest.mark.slow
def test_a_second_signal_ends_the_waiting(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    with Project(tmp_path).running(*SERVE) as server:
        server.wait_until_it_serves()
        answer = pool.submit(server.get, "/parks/?seconds=60")
        server.wait_for("parked")
        server.signal()
        with pytest.raises(OSError):  # noqa: PT011  refused or reset: it listens no more
            _ask_until_refused(server)
        server.signal()
        assert _status(answer.exception()) == 503
        assert server.wait() == 0


def _ask_until_refused(server: Process) -> None:
    while True:
        server.get("/")


def _status(error: BaseException | None) -> int:
    assert isinstance(error, HTTPError)
    error.close()
    return error.code


@pytest.mark.slow
def test_requests_that_do_not_finish_in_time_are_answered_503(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    with Project(tmp_path, options='{"GRACEFUL_TIMEOUT": 0.1}').running(*SERVE) as server:
        server.wait_until_it_serves()
        answer = pool.submit(server.get, "/parks/?seconds=60")
        server.wait_for("parked")
        server.signal()
        assert _status(answer.exception()) == 503
        assert server.wait() == 0
        assert "1 requests did not finish in 0.1 s" in "".join(server.lines)


@pytest.mark.slow
def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = Project(tmp_path).run("-m", "tornjango", "serve", address, "--noreload")
    assert done.returncode == 1
    assert "That port is already in use." in done.stderr
    assert "Traceback" not in done.stderr


# On the loop of the test


@pytest.mark.gen_test
async def test_a_request_under_way_is_finished_and_its_connection_closed() -> None:
    async with serving() as site, await site.connect() as client:
        await client.send(b"GET /parks-async/" + GET)
        await views.gates["parked"].wait()
        site.server.stop()
        await until(lambda: site.application.draining)
        with pytest.raises(ConnectionRefusedError):
            await site.connect()
        views.gates["go"].set()
        answer = await client.response()
        assert (answer.body, answer.header("Connection")) == (b"went", "close")
        assert await client.rest() == b""


@pytest.mark.gen_test
async def test_an_upload_under_way_is_received_and_answered() -> None:
    async with serving() as site, await site.connect() as client:
        await client.send(
            b"POST /size/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 6\r\n\r\nabc"
        )
        await until(lambda: site.application.arriving)
        site.server.stop()
        await until(lambda: site.application.draining)
        await client.send(b"def")
        assert (await client.response()).body == b"6"


@pytest.mark.gen_test
async def test_a_large_answer_to_a_slow_client_is_sent_to_its_end() -> None:
    async with serving() as site, await site.connect() as client:
        await client.send(b"GET /large/?length=20000000" + GET)
        await views.gates["parked"].wait()
        site.server.stop()
        await until(lambda: site.application.draining)
        assert len((await client.response()).body) == 20_000_000


@pytest.mark.gen_test
async def test_a_second_stop_answers_503_and_gives_up_uploads() -> None:
    async with serving() as site, await site.connect() as client, await site.connect() as other:
        await client.send(b"GET /parks/" + GET)
        await views.gates["parked"].wait()
        await other.send(b"POST /size/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 6\r\n\r\nabc")
        await until(lambda: site.application.arriving)
        site.server.stop()
        site.server.stop()
        answer = await client.response()
        assert (answer.status, answer.header("Retry-After")) == (503, "1")
        assert await other.rest() == b""


@pytest.mark.gen_test
async def test_an_idle_connection_does_not_hold_up_the_stop() -> None:
    async with serving() as site:
        idle = await site.connect()
        await idle.request("/status/200/")
    assert await idle.rest() == b""
    idle.abort()


@pytest.mark.gen_test
async def test_a_stop_before_the_start_is_not_lost() -> None:
    async with serving() as site:
        site.server.stop()


@pytest.mark.gen_test
async def test_a_stop_may_come_from_any_thread() -> None:
    async with serving() as site:
        assert (await site.request("/status/200/")).status == 200
        thread = threading.Thread(target=site.server.stop)
        thread.start()
        await site._task
        thread.join()


@pytest.mark.gen_test
async def test_a_parked_poll_is_answered_with_its_cursor_when_the_server_stops() -> None:
    async with serving(ROOT_URLCONF="tests.comet_urls") as site, await site.connect() as client:
        cursor = comet.cursor("open:a")
        await client.send(f"GET /comet/poll/?channel=open:a&cursor={cursor}".encode() + GET)
        await until(lambda: comet.status()["parked"])
        site.server.stop()
        answer = json.loads((await client.response()).body)
        assert (answer["messages"], answer["cursor"]) == ([], cursor)
        assert answer["retry"] >= 0
