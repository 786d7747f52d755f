from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError

import pytest
from django.urls import path
from tornado.web import RequestHandler
from tornado.websocket import WebSocketHandler, websocket_connect

from tests import views
from tests.projects import STREAMS, Process, Project
from tests.serving import Site, serving, until
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


@pytest.mark.slow
def test_a_reload_breaks_off_streams(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write("urls.py", STREAMS)
    with project.running("manage.py", "runserver", "127.0.0.1:0") as server:
        server.wait_until_it_serves()
        streams = [server.open_stream() for _ in range(200)]
        server.change(tmp_path / "urls.py", STREAMS.replace("before", "after"))
        server.wait_until_it_serves()
        assert server.get("/") == "after"
        for stream in streams:
            # Broken off, and not ended: the last chunk did not come.
            assert stream.recv(65536) == b""
            stream.close()
    assert "Traceback" not in "".join(server.lines)


@pytest.mark.slow
def test_a_sync_view_that_does_not_return_does_not_hold_up_the_end(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    with Project(tmp_path, options='{"GRACEFUL_TIMEOUT": 0.1}').running(*SERVE) as server:
        server.wait_until_it_serves()
        answer = pool.submit(server.get, "/parks-sync/?seconds=60")
        server.wait_for("parked")
        server.signal(signal.SIGTERM)
        assert isinstance(answer.exception(), (HTTPError, OSError))
        assert server.wait() == 0
        assert "1 calls in worker threads did not return" in "".join(server.lines)
    if isinstance(error := answer.exception(), HTTPError):
        error.close()


# On the loop of the test


class Slow(RequestHandler):
    async def get(self) -> None:
        views.gates["parked"].set()
        await views.gates["go"].wait()
        self.write("went")


class Talks(WebSocketHandler):
    def on_message(self, message: str | bytes) -> None:
        self.write_message(message)


urlpatterns = [path("slow/", Slow), path("talks/", Talks)]


@pytest.mark.gen_test
async def test_a_tornado_handler_under_way_is_waited_for() -> None:
    async with serving(ROOT_URLCONF=__name__) as site, await site.connect() as client:
        await client.send(b"GET /slow/" + GET)
        await views.gates["parked"].wait()
        site.server.stop()
        await until(lambda: site.application.draining)
        views.gates["go"].set()
        assert (await client.response()).body == b"went"
    assert not site.application.native


@pytest.mark.gen_test
async def test_a_tornado_handler_that_takes_too_long_is_answered_503() -> None:
    async with serving(ROOT_URLCONF=__name__) as site, await site.connect() as client:
        await client.send(b"GET /slow/" + GET)
        await views.gates["parked"].wait()
        site.server.stop(0.01)
        answer = await client.response()
        assert (answer.status, answer.header("Retry-After")) == (503, "1")
    assert not site.application.native


@pytest.mark.gen_test
async def test_a_websocket_hears_that_the_server_goes_away() -> None:
    async with serving(ROOT_URLCONF=__name__) as site:
        page = await websocket_connect(f"ws://127.0.0.1:{site.port}/talks/")
        await page.write_message("hello")
        assert await page.read_message() == "hello"
        site.server.stop()
        assert await page.read_message() is None
        assert page.close_code == 1001
        page.close()
        await site._task
    assert not site.application.native


@pytest.mark.gen_test
async def test_a_websocket_whose_page_does_not_answer_is_not_waited_for_longer_than_others() -> (
    None
):
    async with serving(ROOT_URLCONF=__name__) as site, await site.connect() as client:
        await client.send(
            b"GET /talks/ HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert (await client.head()).status == 101
        site.server.stop(0.05)
        await site._task
        assert await client.rest() == b"\x88\x19\x03\xe9The server is stopping."
    assert not site.application.native


@pytest.mark.gen_test
async def test_a_server_that_is_relieved_answers_one_more_on_each_connection() -> None:
    async with serving() as site, await site.connect() as client, await site.connect() as other:
        assert (await client.request("/status/200/")).header("Connection") != "close"
        site.server.leave()
        await until(lambda: site.application.draining)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.wait_for(_connect_until_refused(site), 5)
        for connection in (client, other):
            answer = await connection.request("/status/200/")
            assert (answer.status, answer.header("Connection")) == (200, "close")
            assert await connection.rest() == b""
            connection.abort()
        await site._task


async def _connect_until_refused(site: Site) -> None:
    while True:
        (await site.connect()).abort()


@pytest.mark.gen_test
async def test_a_stop_ends_the_patience_of_a_server_that_is_relieved() -> None:
    async with serving() as site, await site.connect() as client:
        await client.request("/status/200/")
        site.server.leave()
        await until(lambda: site.application.draining)
        site.server.stop()
        assert await client.rest() == b""
        await site._task


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
