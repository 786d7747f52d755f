from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
import ssl
import struct
from pathlib import Path
from typing import Any

import pytest
from tornado.httputil import HTTPHeaders, HTTPOutputError, ResponseStartLine
from tornado.iostream import StreamClosedError
from tornado.web import Application, RequestHandler, stream_request_body
from tornado.websocket import WebSocketHandler, websocket_connect

from tests.http1_echo import Echo, EchoRequest, echoing
from tests.serving import until
from tornjango import connections
from tornjango.exchanges import Exchange
from tornjango.testing import RawClient, Response

HOST = b"Host: localhost\r\n"
END = b" HTTP/1.1\r\n" + HOST + b"\r\n"
PEM = Path(__file__).with_name("localhost.pem")
Log = list[logging.LogRecord]


def told(response: Response) -> Any:
    return json.loads(response.body)


# Requests


@pytest.mark.gen_test
async def test_a_request_is_given_as_it_came() -> None:
    async with echoing() as site, await site.connect() as client:
        await client.send(
            b"PUT /a?b HTTP/1.1\r\nHost: x\r\nA: 1\r\na: 2\r\nContent-Length: 3\r\n\r\nabc"
        )
        fields = [["A", "1"], ["A", "2"], ["Content-Length", "3"], ["Host", "x"]]
        assert told(await client.response()) == ["PUT", "/a?b", "HTTP/1.1", fields, "abc"]
        connection = site.echo.requests[0].connection
        assert (connection.context.remote_ip, connection.context.protocol) == ("127.0.0.1", "http")
        assert connection.context.server_address == ("127.0.0.1", str(site.port))


@pytest.mark.gen_test
async def test_a_chunked_body_is_joined_without_extensions_and_trailers() -> None:
    async with echoing() as site, await site.connect() as client:
        await client.send(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n")
        await client.send(b"2\r\nde\r\n0\r\nTrailer: z\r\n\r\nGET /next" + END)
        assert told(await client.response())[4] == "abcde"
        assert told(await client.response())[1] == "/next"


@pytest.mark.gen_test
async def test_empty_lines_before_a_request_are_passed_over() -> None:
    async with echoing() as site, await site.connect() as client:
        await client.send(b"\r\n\r\nGET /a" + END + b"\r\n\r\n\r\nGET /b" + END)
        assert told(await client.response())[1] == "/a"
        assert told(await client.response())[1] == "/b"


@pytest.mark.gen_test
async def test_pipelined_requests_are_begun_one_by_one() -> None:
    async with echoing() as site, await site.connect() as client:
        await client.send(b"GET /park" + END + b"GET /a" + END + b"GET /b" + END)
        await site.echo.parked.wait()
        assert len(site.echo.requests) == 1
        site.echo.go.set()
        assert [told(await client.response())[1] for _ in range(3)] == ["/park", "/a", "/b"]


@pytest.mark.gen_test
async def test_thousands_of_pipelined_requests_leave_the_loop_to_others() -> None:
    async with echoing() as site, await site.connect() as client, await site.connect() as other:
        count = 3000
        answers = asyncio.create_task(_responses(client, count))
        await client.send((b"GET /" + END) * count)
        await other.send(b"GET /other" + END)
        await other.response()
        assert not answers.done()
        assert await answers == count


async def _responses(client: RawClient, count: int) -> int:
    for _ in range(count):
        await client.response()
    return count


@pytest.mark.gen_test
async def test_a_client_that_sends_ahead_of_its_answer_is_made_to_wait() -> None:
    async with echoing() as site, await site.connect() as client:
        await client.send(b"GET /park" + END)
        await site.echo.parked.wait()
        ahead = (b"POST / HTTP/1.1\r\nContent-Length: 100000\r\n\r\n" + b"a" * 100_000) * 200
        sending = asyncio.create_task(client.send(ahead))
        (connection,) = site.server._open
        await until(lambda: connection._reading_paused)
        assert len(connection._unread) < 1024 * 1024
        assert not sending.done()
        site.echo.go.set()
        assert await _responses(client, 201) == 201
        await sending


@pytest.mark.gen_test
async def test_a_body_waits_for_whoever_takes_it() -> None:
    async with echoing() as site, await site.connect() as client:
        site.echo.ready.clear()
        body = b"a" * 10_000_000
        head = b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body)
        sending = asyncio.create_task(client.send(head + body))
        await until(lambda: site.server._open and next(iter(site.server._open))._reading_paused)
        assert len(site.echo.requests[0].body) < 1024 * 1024
        site.echo.ready.set()
        await sending
        assert len(told(await client.response())[4]) == len(body)


# Expect: 100-continue


EXPECTING = b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n"


@pytest.mark.gen_test
async def test_a_client_that_asks_is_told_to_continue() -> None:
    async with echoing() as site, await site.connect() as client:
        await client.send(EXPECTING)
        assert (await client.response()).status == 100
        await client.send(b"abc")
        assert told(await client.response())[4] == "abc"


@pytest.mark.gen_test
async def test_a_client_that_does_not_wait_is_not_told() -> None:
    async with echoing() as site, await site.connect() as client:
        await client.send(EXPECTING + b"abc")
        assert (await client.response()).status == 200


@pytest.mark.gen_test
async def test_a_client_that_asks_for_too_much_is_told_413() -> None:
    async with echoing(MAX_BODY_SIZE=2) as site:
        answer = await site.raw(EXPECTING)
        assert answer.startswith(b"HTTP/1.1 413 ")
        await until(lambda: site.echo.requests[0].events == ["headers", "closed"])


@pytest.mark.gen_test
async def test_another_expectation_is_not_met() -> None:
    async with echoing() as site:
        assert (await site.raw(EXPECTING.replace(b"100-", b"101-"))).startswith(b"HTTP/1.1 417 ")


# Answers


class Answers(Echo):
    """Answers by a function of the exchange."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.do = answer

    def start_request(self, server_conn: object, request_conn: Any) -> EchoRequest:
        request = super().start_request(server_conn, request_conn)
        request.answer = lambda: self.do(request_conn)  # type: ignore[method-assign]
        return request


OK = ResponseStartLine("HTTP/1.1", 200, "OK")


def streams(exchange: Exchange) -> None:
    exchange.write_headers(OK, HTTPHeaders(), b"one")
    exchange.write(b"")
    exchange.write(b"two")
    exchange.finish()


@pytest.mark.gen_test
async def test_content_of_unknown_length_is_chunked() -> None:
    async with echoing(Answers(streams)) as site, await site.connect() as client:
        response = await client.request("/")
        assert (response.header("Transfer-Encoding"), response.body) == ("chunked", b"onetwo")
        assert (await client.request("/", method="HEAD")).body == b""
        assert (await client.request("/")).body == b"onetwo"
        await client.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        response = await client.response()
        assert (response.header("Connection"), response.body) == ("close", b"onetwo")
        assert response.header("Transfer-Encoding") is None


@pytest.mark.gen_test
async def test_an_answer_longer_than_it_says_is_cut_there(error_log: Log) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.write_headers(OK, HTTPHeaders({"Content-Length": "4"}), b"abc")
        exchange.write(b"de")

    async with echoing(Answers(answer)) as site:
        assert (await site.raw(b"GET /" + END)).endswith(b"\r\n\r\nabc")
    assert error_log.pop().name == "tornjango.http1"


@pytest.mark.gen_test
async def test_an_answer_shorter_than_it_says_ends_its_connection(error_log: Log) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.write_headers(OK, HTTPHeaders({"Content-Length": "4"}), b"abc")
        exchange.finish()

    async with echoing(Answers(answer)) as site:
        assert (await site.raw(b"GET /" + END)).endswith(b"\r\n\r\nabc")
    assert error_log.pop().name == "tornjango.http1"


@pytest.mark.parametrize(
    ("headers", "content"),
    [
        ({"A": "b\r\nSet-Cookie: c"}, b""),
        ({"A": "b\nc"}, b""),
        ({"A": "b\rc"}, b""),
        ({"A": "b\0c"}, b""),
        ({"A\r\nB": "c"}, b""),
        ({"A": "\u20ac"}, b""),
        ({"Content-Length": "many"}, b""),
        ({"Content-Length": "-1"}, b""),
        ({"Content-Length": "1"}, b"ab"),
    ],
)
@pytest.mark.gen_test
async def test_a_head_that_breaks_http_is_not_begun(
    headers: dict[str, str], content: bytes
) -> None:
    def answer(exchange: Exchange) -> None:
        with pytest.raises((ValueError, HTTPOutputError)):
            exchange.write_headers(OK, HTTPHeaders(headers), content)
        exchange.write_headers(OK, HTTPHeaders({"Content-Length": "2"}), b"ok")
        exchange.finish()

    async with echoing(Answers(answer)) as site, await site.connect() as client:
        assert (await client.request("/")).body == b"ok"
        assert (await client.request("/")).body == b"ok"


@pytest.mark.parametrize("code", [204, 304])
@pytest.mark.gen_test
async def test_content_is_dropped_where_none_may_be(code: int) -> None:
    def answer(exchange: Exchange) -> None:
        start_line = ResponseStartLine("HTTP/1.1", code, "None")
        exchange.write_headers(start_line, HTTPHeaders(), b"content")
        exchange.write(b"more")
        exchange.finish()

    async with echoing(Answers(answer)) as site, await site.connect() as client:
        assert (await client.request("/")).status == code
        assert (await client.request("/")).status == code


@pytest.mark.gen_test
async def test_what_fails_while_it_is_told_ends_its_connection_only(error_log: Log) -> None:
    def answer(exchange: Exchange) -> None:
        raise ZeroDivisionError

    async with echoing(Answers(answer)) as site:
        assert await site.raw(b"GET /" + END) == b""
        assert error_log.pop().exc_info
        async with await site.connect() as client:
            await client.send(b"GET /park" + END)
            await site.server.application.parked.wait()  # type: ignore[attr-defined]


@pytest.mark.gen_test
async def test_an_answer_before_the_end_of_its_request_is_the_last() -> None:
    class Early(Echo):
        def start_request(self, server_conn: object, request_conn: Any) -> EchoRequest:
            request = super().start_request(server_conn, request_conn)
            request.data_received = lambda chunk: streams(request_conn)  # type: ignore[method-assign, func-returns-value]
            return request

    early = Early()
    async with echoing(early) as site:
        answer = await site.raw(
            b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc", b"defghi", b"GET /" + END
        )
        assert answer.count(b"HTTP/1.1 200") == 1
        assert early.requests[0].events == ["headers", "closed"]


# Clients that leave, or do nothing


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.gen_test
async def test_a_client_that_leaves_is_noticed(half: bool) -> None:
    async with echoing() as site, await site.connect() as client:
        await client.send(b"GET /park" + END)
        await site.echo.parked.wait()
        if half:
            client.writer.write_eof()
        else:
            client.abort()
        await site.echo.left.wait()
        assert site.echo.requests[0].connection.closed
        assert site.echo.requests[0].events == ["headers", "finish", "left"]


@pytest.mark.parametrize("size", [100, 150_000])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.gen_test
async def test_a_client_that_leaves_behind_pipelined_bytes_is_noticed(
    size: int, reset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "LOOK_SECONDS", 0.05)
    async with echoing(SEND_TIMEOUT=0.2) as site, await site.connect() as client:
        await client.send(b"GET /park" + END)
        await site.echo.parked.wait()
        await client.send(b"POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n" + bytes(size))
        (connection,) = site.server._open
        await until(lambda: connection._reading_paused is (size > connections.READ_AHEAD))
        if reset:
            linger = struct.pack("ii", 1, 0)
            sock = client.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        client.abort()
        await site.echo.left.wait()
        assert len(site.echo.requests) == 1


@pytest.mark.gen_test
async def test_a_client_that_leaves_in_a_body_is_noticed() -> None:
    async with echoing() as site, await site.connect() as client:
        await client.send(b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nab")
        await until(lambda: site.echo.requests)
        client.abort()
        await site.echo.left.wait()
        assert site.echo.requests[0].events == ["headers", "closed"]


@pytest.mark.gen_test
async def test_a_client_that_takes_nothing_is_left() -> None:
    failed: list[BaseException | None] = []

    def answer(exchange: Exchange) -> None:
        written = exchange.write_headers(OK, HTTPHeaders(), bytes(50_000_000))
        written.add_done_callback(lambda written: failed.append(written.exception()))

    async with echoing(Answers(answer), SEND_TIMEOUT=0.1) as site, await site.connect() as client:
        await client.send(b"GET /" + END)
        await until(lambda: failed)
        assert isinstance(failed[0], StreamClosedError)
        await until(lambda: not site.server.connections)


@pytest.mark.gen_test
async def test_a_client_that_takes_a_little_at_a_time_is_not_left() -> None:
    def answer(exchange: Exchange) -> None:
        exchange.write_headers(OK, HTTPHeaders({"Content-Length": "20000000"}), bytes(20_000_000))
        exchange.finish()

    async with (
        echoing(Answers(answer), SEND_TIMEOUT=0.4, IDLE_TIMEOUT=0.4) as site,
        await site.connect() as client,
    ):
        await client.send(b"GET /" + END)
        await client.head()
        for _ in range(10):
            await client.reader.readexactly(2_000_000)
            await asyncio.sleep(0.08)


@pytest.mark.gen_test
async def test_a_parked_request_has_all_the_time_it_wants() -> None:
    times = dict.fromkeys(["IDLE_TIMEOUT", "HEADER_TIMEOUT", "BODY_TIMEOUT", "SEND_TIMEOUT"], 0.04)
    async with echoing(**times) as site, await site.connect() as client:
        await client.send(b"POST /park HTTP/1.1\r\nContent-Length: 3\r\n")
        await asyncio.sleep(0.02)
        await client.send(b"\r\nab")
        await asyncio.sleep(0.02)
        await client.send(b"c")
        await site.echo.parked.wait()
        await asyncio.sleep(0.3)
        site.echo.go.set()
        assert told(await client.response())[4] == "abc"
        assert await client.rest() == b""  # and no time without one


@pytest.mark.gen_test
async def test_one_connection_too_many_is_turned_away() -> None:
    async with echoing(MAX_CONNECTIONS=1) as site:
        async with await site.connect() as client:
            assert (await client.request("/")).status == 200
            async with await site.connect() as other:
                answer = await other.response()
                assert (answer.status, answer.header("Retry-After")) == (503, "1")
                assert answer.header("Connection") == "close"
        await until(lambda: not site.server.connections)
        async with await site.connect() as client:
            assert (await client.request("/")).status == 200


# Stopping


@pytest.mark.gen_test
async def test_a_stop_closes_idle_connections_and_lets_answers_be_finished() -> None:
    async with echoing() as site, await site.connect() as idle, await site.connect() as busy:
        await idle.request("/")
        await busy.send(b"GET /park" + END)
        await site.echo.parked.wait()
        await site.server.stop()
        assert await idle.rest() == b""
        site.echo.go.set()
        assert (await busy.response()).header("Connection") == "close"
        assert await busy.rest() == b""


@pytest.mark.gen_test
async def test_a_stop_can_keep_idle_connections_for_one_more_request() -> None:
    async with echoing() as site, await site.connect() as idle:
        await idle.request("/")
        await site.server.stop(keep_idle=True)
        assert (await idle.request("/")).header("Connection") == "close"
        assert await idle.rest() == b""


@pytest.mark.gen_test
async def test_nothing_of_a_connection_remains() -> None:
    async with echoing() as site:
        gc.collect()
        gc.disable()
        try:
            for head in (
                b"GET /" + END,
                b"GET /\r\n\r\n",
                b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n",
            ):
                async with await site.connect() as client:
                    await client.send(head)
                    await until(lambda: site.server.connections)
                    client.writer.write_eof()
                    await client.rest()
            await until(lambda: not site.server.connections)
            site.echo.requests.clear()
            await asyncio.sleep(0)
            kept = [o for o in gc.get_objects() if isinstance(o, connections.Connection)]
            exchanges = [o for o in gc.get_objects() if isinstance(o, Exchange)]
            assert not [o for o in kept if o.server is site.server]
            assert not [o for o in exchanges if o.connection.server is site.server]
        finally:
            gc.enable()


# Tornado's handlers


class Hello(RequestHandler):
    def get(self) -> None:
        self.write(f"{self.request.remote_ip} {self.request.protocol} {self.request.uri}")

    async def post(self) -> None:
        self.write(self.get_argument("a"))
        await self.flush()
        self.write(self.request.files["f"][0].body)


@stream_request_body
class Upload(RequestHandler):
    async def prepare(self) -> None:
        self.size = 0
        self.request.connection.set_max_body_size(100_000_000)  # type: ignore[union-attr]
        await asyncio.sleep(0)

    async def data_received(self, chunk: bytes) -> None:
        await asyncio.sleep(0)
        self.size += len(chunk)

    def put(self) -> None:
        self.write(str(self.size))


class Parked(RequestHandler):
    left = asyncio.Event()

    async def get(self) -> None:
        await asyncio.Event().wait()

    def on_connection_close(self) -> None:
        self.left.set()


class Same(WebSocketHandler):
    closed: asyncio.Event

    async def open(self, *args: str, **kwargs: str) -> None:
        self.set_nodelay(True)

    async def on_message(self, message: str | bytes) -> None:
        await self.write_message(message, binary=isinstance(message, bytes))

    def on_close(self) -> None:
        type(self).closed.set()


class Takes(RequestHandler):
    """Speaks a protocol of its own."""

    async def get(self) -> None:
        stream = self.detach()
        await stream.write(b"HTTP/1.1 101 Switching\r\n\r\n")
        line = await stream.read_until(b"\n")
        await stream.write(line * 2)
        stream.close()


def native() -> Application:
    Same.closed = asyncio.Event()
    Parked.left = asyncio.Event()
    return Application(
        [
            ("/hello", Hello),
            ("/upload", Upload),
            ("/parked", Parked),
            ("/same", Same),
            ("/takes", Takes),
        ],
        log_function=lambda handler: None,
    )


@pytest.fixture(params=["http", "https"])
def tls(request: Any) -> ssl.SSLContext | None:
    if request.param == "http":
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(PEM)
    return context


def trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def connected(port: int, tls: ssl.SSLContext | None) -> RawClient:
    return RawClient(
        *await asyncio.open_connection("127.0.0.1", port, ssl=trusting() if tls else None)
    )


@pytest.mark.gen_test
async def test_a_tornado_handler_answers_as_ever(tls: ssl.SSLContext | None) -> None:
    async with echoing(native(), tls) as site, await connected(site.port, tls) as client:
        scheme = "https" if tls else "http"
        assert (await client.request("/hello?x")).body == f"127.0.0.1 {scheme} /hello?x".encode()
        assert (await client.request("/none")).status == 404
        assert (await client.request("/hello", method="HEAD")).status == 405
        body = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--b\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\nxyz\r\n--b--\r\n'
        kind = [("Content-Type", "multipart/form-data; boundary=b")]
        answer = await client.request("/hello", method="POST", headers=kind, body=body)
        assert answer.body == b"1xyz"


@pytest.mark.gen_test
async def test_a_tornado_handler_streams_a_body(tls: ssl.SSLContext | None) -> None:
    async with echoing(native(), tls) as site, await connected(site.port, tls) as client:
        for _ in range(2):
            answer = await client.request("/upload", method="PUT", body=bytes(3_000_000))
            assert answer.body == b"3000000"


@pytest.mark.gen_test
async def test_a_tornado_handler_hears_that_its_client_left(tls: ssl.SSLContext | None) -> None:
    async with echoing(native(), tls) as site, await connected(site.port, tls) as client:
        await client.send(b"GET /parked" + END)
        await until(lambda: site.server.connections and next(iter(site.server._open)).exchange)
        client.abort()
        await Parked.left.wait()


@pytest.mark.gen_test
async def test_a_web_socket_works_as_ever(tls: ssl.SSLContext | None) -> None:
    from tornado.httpclient import HTTPRequest

    async with echoing(native(), tls, MAX_BODY_SIZE=10) as site:
        scheme = "wss" if tls else "ws"
        url = f"{scheme}://127.0.0.1:{site.port}/same"
        connection = await websocket_connect(HTTPRequest(url, ssl_options=trusting()))
        for message in ("hello", b"\x00" * 5_000_000, "\u20ac"):
            await connection.write_message(message, binary=isinstance(message, bytes))
            assert await connection.read_message() == message
        connection.close(1000)
        assert await connection.read_message() is None
        await Same.closed.wait()
        connection.close()
        await until(lambda: not site.server.connections)


@pytest.mark.gen_test
async def test_a_web_socket_hears_that_its_client_left(tls: ssl.SSLContext | None) -> None:
    async with echoing(native(), tls) as site, await connected(site.port, tls) as client:
        await client.send(
            b"GET /same HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==\r\n\r\n"
            b"\x81\x82\x00\x00\x00\x00hi"
        )
        assert (await client.response()).status == 101
        assert await client.reader.readexactly(4) == b"\x81\x02hi"
        client.abort()
        await Same.closed.wait()


@pytest.mark.gen_test
async def test_a_web_socket_that_opens_while_the_server_stops_opens() -> None:
    async with echoing(native()) as site, await connected(site.port, None) as client:
        await client.send(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        await client.response()
        site.server.stopping = True
        await client.send(
            b"GET /same HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==\r\n\r\n"
        )
        assert (await client.response()).all("Connection") == ["Upgrade"]


@pytest.mark.gen_test
async def test_a_handler_can_take_the_connection(tls: ssl.SSLContext | None) -> None:
    async with echoing(native(), tls) as site, await connected(site.port, tls) as client:
        await client.send(b"GET /takes" + END + b"one")
        assert (await client.response()).status == 101
        await client.send(b" two\nthree")
        assert await client.rest() == b"one two\none two\n"


@pytest.mark.gen_test
async def test_the_end_of_the_server_closes_web_sockets(tls: ssl.SSLContext | None) -> None:
    from tornado.httpclient import HTTPRequest

    async with echoing(native(), tls) as site:
        scheme = "wss" if tls else "ws"
        url = f"{scheme}://127.0.0.1:{site.port}/same"
        connection = await websocket_connect(HTTPRequest(url, ssl_options=trusting()))
    assert await connection.read_message() is None
    connection.close()
    await Same.closed.wait()
