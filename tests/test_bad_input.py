from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import views
from tests.serving import Site, serving
from tornjango.testing import RawClient

MIB = 1024 * 1024
HOST = b"Host: localhost\r\n"
GET = b"GET /status/200/ HTTP/1.1\r\n"
POST = b"POST /whole/ HTTP/1.1\r\n" + HOST
FORM = b"Content-Type: application/x-www-form-urlencoded\r\n"
MULTIPART = b"Content-Type: multipart/form-data; boundary=frontier\r\n"


def with_length(body: bytes, kind: bytes = b"") -> bytes:
    return POST + kind + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


#: What a client sends; the status it is answered; a word of the reason.
REFUSED: dict[str, tuple[bytes, int, bytes]] = {
    "no HTTP at all": (b"hello\r\n\r\n", 400, b"Malformed"),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, b"NUL"),
    "HTTP/2 in words": (b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", 505, b"HTTP/1.1"),
    "method that is none": (b"G(T / HTTP/1.1\r\n" + HOST + b"\r\n", 400, b"Malformed"),
    "null in the target": (b"GET /\x00 HTTP/1.1\r\n" + HOST + b"\r\n", 400, b"NUL"),
    "line longer than allowed": (b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n", 431, b"65536"),
    "header longer than allowed": (GET + HOST + b"A: " + b"b" * MIB, 431, b"65536"),
    "no host": (GET + b"\r\n", 400, b"Missing Host"),
    "two hosts": (GET + HOST + HOST + b"\r\n", 400, b"Multiple Host"),
    "host with a bad port": (GET + b"Host: a:b\r\n\r\n", 400, b"Invalid Host"),
    "host with a huge port": (GET + b"Host: a:999999999\r\n\r\n", 400, b"Invalid Host"),
    "host with a path": (GET + b"Host: a/b\r\n\r\n", 400, b"Invalid Host"),
    "host that is not allowed": (GET + b"Host: evil.example\r\n\r\n", 400, b""),
    "host in the target that is none": (
        b"GET http://[ HTTP/1.1\r\n" + HOST + b"\r\n",
        400,
        b"target",
    ),
    "negative length": (POST + b"Content-Length: -1\r\n\r\n", 400, b"Content-Length"),
    "huge length": (POST + b"Content-Length: 99999999999\r\n\r\n", 413, b"larger than"),
    "two lengths": (
        POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        400,
        b"Content-Length",
    ),
    "length and chunks": (
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
        b"both",
    ),
    "unknown encoding": (POST + b"Transfer-Encoding: gzip\r\n\r\n", 400, b"Transfer-Encoding"),
    "chunk without a size": (POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400, b"chunk"),
    "chunk without its end": (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nabc", 400, b"chunk"),
    "body larger than Django takes": (with_length(b"a=" + b"b" * 3 * MIB, FORM), 400, b""),
    "too many fields": (with_length(b"&".join([b"a=1"] * 1100), FORM), 400, b""),
    "too many fields in the query": (
        b"GET /whole/?" + b"&".join([b"a=1"] * 1100) + b" HTTP/1.1\r\n" + HOST + b"\r\n",
        400,
        b"",
    ),
    "multipart without a boundary": (
        with_length(b"abc", b"Content-Type: multipart/form-data\r\n"),
        400,
        b"",
    ),
    "wrong length of a multipart": (with_length(b"", MULTIPART), 200, b""),
    "form in another charset": (
        with_length(b"a=%E9", FORM.replace(b"\r\n", b"; charset=utf-16\r\n")),
        400,
        b"",
    ),
    "too many parts": (
        with_length(
            b'--frontier\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 1100
            + b"--frontier--\r\n",
            MULTIPART,
        ),
        400,
        b"",
    ),
    "base64 that is none": (
        with_length(
            b'--frontier\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n'
            b"Content-Transfer-Encoding: base64\r\n\r\n\xff\xff\xff\r\n--frontier--\r\n",
            MULTIPART,
        ),
        400,
        b"",
    ),
    "path that no view has": (b"GET /none/ HTTP/1.1\r\n" + HOST + b"\r\n", 404, b""),
    "path with an encoded null": (b"GET /none/%00 HTTP/1.1\r\n" + HOST + b"\r\n", 404, b""),
    "target that is an asterisk": (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", 404, b""),
    "tunnel": (b"CONNECT a:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", 501, b"tunnel"),
    "method that the view has not": (b"DELETE /mixed/1/ HTTP/1.1\r\n" + HOST + b"\r\n", 405, b""),
    "unknown method": (b"BREW /mixed/1/ HTTP/1.1\r\n" + HOST + b"\r\n", 405, b""),
    "no CSRF token": (
        b"POST /protected-form/ HTTP/1.1\r\n" + HOST + FORM + b"Content-Length: 3\r\n\r\na=1",
        403,
        b"CSRF",
    ),
    "forged CSRF token": (
        b"POST /protected-form/ HTTP/1.1\r\n"
        + HOST
        + FORM
        + b"Cookie: csrftoken="
        + b"a" * 32
        + b"\r\nContent-Length: 53\r\n\r\ncsrfmiddlewaretoken="
        + b"b" * 32
        + b"\n",
        403,
        b"CSRF",
    ),
    "no such poll": (b"GET /comet/none/ HTTP/1.1\r\n" + HOST + b"\r\n", 404, b""),
    "Tornado's handler with a bad query": (
        b"GET /tornado/1/?" + b"&".join([b"a=1"] * 1100) + b" HTTP/1.1\r\n" + HOST + b"\r\n",
        200,
        b"",
    ),
}


class _Logged(logging.Handler):
    """What is logged as a warning or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def __enter__(self) -> list[logging.LogRecord]:
        logging.getLogger().addHandler(self)
        return self.records

    def __exit__(self, *args: object) -> None:
        logging.getLogger().removeHandler(self)


@pytest.mark.parametrize("name", sorted(REFUSED))
@pytest.mark.gen_test
async def test_bad_input_is_refused_with_a_reason_and_harms_nobody(
    name: str, error_log: list[logging.LogRecord]
) -> None:
    data, status, reason = REFUSED[name]
    async with serving() as site, await site.connect() as parked, await site.connect() as client:
        await parked.send(b"GET /parks-async/ HTTP/1.1\r\n" + HOST + b"\r\n")
        await views.gates["parked"].wait()
        with _Logged() as logged:
            await client.send(data)
            answer = await client.response()
        assert (answer.status, reason in answer.body) == (status, True), answer.body
        assert b"Traceback" not in answer.body
        assert answer.body or status == 405
        assert len(logged) == (status >= 400), [record.getMessage() for record in logged]
        # What Django finds suspicious it logs as an error, under this name.
        error_log[:] = [r for r in error_log if not r.name.startswith("django.security.")]
        assert (await site.request("/status/200/")).status == 200
        views.gates["go"].set()
        assert (await parked.response()).body == b"went"


@pytest.mark.parametrize(
    "data",
    [
        with_length(b'--frontier\r\nContent-Disposition: form-data; name="a"', MULTIPART),
        with_length(b"--frontier\r\n\r\n\r\n\r\n--frontier", MULTIPART),
        with_length(b"\xff\xfe\x00", MULTIPART),
        with_length(b"a=%zz&%=%&&=", FORM),
        with_length(b"\xff=\xff", FORM),
    ],
)
@pytest.mark.gen_test
async def test_a_form_that_is_cut_or_garbled_is_parsed_as_far_as_it_goes(data: bytes) -> None:
    async with serving() as site, await site.connect() as client:
        await client.send(data)
        assert (await client.response()).status == 200
        assert (await client.request("/status/200/")).status == 200


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
@pytest.mark.gen_test
async def test_a_refused_request_is_the_last_of_its_connection(method: str) -> None:
    async with serving() as site:
        answer = await site.raw(f"{method} / HTTP/1.1\r\nHost: a:b\r\n\r\n".encode() * 3)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert b"Connection: close" in head
        assert answer.count(b"HTTP/1.1") == 1
        assert (body == b"") is (method == "HEAD")


@pytest.mark.gen_test
async def test_a_body_that_grows_past_the_limit_is_refused_on_its_way() -> None:
    async with serving(TORNJANGO={"MAX_BODY_SIZE": 1000}) as site, await site.connect() as client:
        await client.send(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        await client.send(b"400\r\n" + bytes(1024) + b"\r\n")
        answer = await client.response()
        assert (answer.status, answer.body) == (
            413,
            b"The request body is larger than 1000 bytes.\n",
        )


@pytest.mark.parametrize("framing", [b"Content-Length: 3000000", b"Transfer-Encoding: chunked"])
@pytest.mark.gen_test
async def test_a_client_that_sends_all_the_same_still_reads_the_refusal(framing: bytes) -> None:
    body = bytes(3_000_000)
    if framing.startswith(b"Transfer"):
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    async with serving(TORNJANGO={"MAX_BODY_SIZE": 1000}) as site, await site.connect() as client:
        await client.send(POST + framing + b"\r\n\r\n" + body)
        assert (await client.response()).status == 413
        assert await client.rest() == b""


@pytest.mark.gen_test
async def test_a_client_that_never_stops_sending_is_cut_off() -> None:
    async with serving(TORNJANGO={"MAX_BODY_SIZE": 1000}) as site, await site.connect() as client:
        await client.send(POST + b"Content-Length: 999999999999\r\n\r\n")
        with pytest.raises(ConnectionError):
            await _send_for_ever(client)


async def _send_for_ever(client: RawClient) -> None:
    while True:
        await client.send(bytes(MIB))


@pytest.mark.gen_test
async def test_a_client_that_asks_first_is_told_413_before_it_sends() -> None:
    async with serving(TORNJANGO={"MAX_BODY_SIZE": 1000}) as site:
        answer = await site.raw(POST + b"Content-Length: 2000\r\nExpect: 100-continue\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"100 " not in answer.splitlines()[0]


@pytest.mark.gen_test
async def test_a_body_for_which_there_is_no_room_is_refused(tmp_path: Any) -> None:
    gone = str(tmp_path / "gone")
    async with serving(FILE_UPLOAD_TEMP_DIR=gone, FILE_UPLOAD_MAX_MEMORY_SIZE=10) as site:
        answer = await site.request("/size/", method="POST", body=bytes(1000))
        assert answer.status == 507
        assert gone.encode() not in answer.body
        assert (await site.request("/status/200/")).status == 200


@pytest.mark.gen_test
async def test_a_limit_of_djangos_on_fields_is_the_only_one() -> None:
    async with serving(DATA_UPLOAD_MAX_NUMBER_FIELDS=None) as site:
        assert (await site.request("/whole/?" + "&".join(["a=1"] * 5000))).status == 200


@pytest.mark.gen_test
async def test_an_idle_connection_is_closed_after_its_time() -> None:
    async with serving(TORNJANGO={"IDLE_TIMEOUT": 0.05}) as site, await site.connect() as client:
        assert await site.raw(b"") == b""
        assert await client.rest() == b""


@pytest.mark.gen_test
async def test_headers_that_do_not_come_are_answered_408() -> None:
    async with serving(TORNJANGO={"HEADER_TIMEOUT": 0.05}) as site:
        assert (await site.raw(GET + b"Host: loc")).startswith(b"HTTP/1.1 408 ")


@pytest.mark.gen_test
async def test_a_body_that_does_not_come_is_answered_408() -> None:
    async with serving(TORNJANGO={"BODY_TIMEOUT": 0.05}) as site:
        answer = await site.raw(POST + b"Content-Length: 10\r\n\r\nabc")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert not site.application.arriving
        assert (await site.request("/status/200/")).status == 200


# Anything at all


FRAGMENTS = [
    b"GET ", b"POST ", b"/", b"/whole/", b"/status/200/", b" HTTP/1.1", b" HTTP/1.0", b"\r\n", b"\n", b"\r",
    HOST, b"Host: ", b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n",
    b"Expect: 100-continue\r\n", FORM, MULTIPART, b"--frontier", b"0\r\n\r\n", b"1\r\n", b"5", b"%", b"%00",
    b"?", b"=", b"&", b":", b" ", b"\x00", b"\xff", b"\xc3\xa9", b"Cookie: ", b"Content-Type: ", b";", b'"',
    GET + HOST + b"\r\n", POST,
]  # fmt: skip
TIMEOUTS = ["HEADER_TIMEOUT", "BODY_TIMEOUT", "IDLE_TIMEOUT"]
bad = st.one_of(
    st.binary(max_size=200), st.lists(st.sampled_from(FRAGMENTS), max_size=25).map(b"".join)
)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(bad, min_size=40, max_size=40))
@pytest.mark.slow
def test_whatever_bytes_come_the_server_answers_or_closes(io_loop: Any, sent: list[bytes]) -> None:
    io_loop.run_sync(lambda: _survives(sent), timeout=30)


async def _survives(sent: list[bytes]) -> None:
    with _Logged() as logged:
        # So that half a request does not wait for its other half.
        async with serving(TORNJANGO=dict.fromkeys(TIMEOUTS, 0.2)) as site:
            await asyncio.gather(*(_send(site, data) for data in sent))
            assert (await site.request("/status/200/")).status == 200
            assert not site.application.in_flight
    assert [record.getMessage() for record in logged if record.levelno > logging.WARNING] == []


async def _send(site: Site, data: bytes) -> None:
    async with await site.connect() as client:
        await client.send(data)
        try:
            answer = await client.rest()
        except ConnectionResetError:
            return
        assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
        assert b"Traceback" not in answer
