"""Bytes that no honest client sends: each is answered once or closed, within bounds, however it is cut into pieces."""

from __future__ import annotations

import asyncio
import itertools
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.http1_echo import EchoSite, echoing

HOST = b"Host: localhost\r\n"
POST = b"POST /post HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
#: What is smuggled: answered, it shows that its bytes were taken for a request.
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
#: A request that is not finished does not hold up a test.
TIMES = {"HEADER_TIMEOUT": 0.1, "BODY_TIMEOUT": 0.1, "IDLE_TIMEOUT": 0.1}
_ANSWER = re.compile(rb"HTTP/1\.1 ([0-9]{3}) ")


def framed(*fields: bytes) -> bytes:
    return POST + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


#: What is sent, and the statuses it is answered with.
HOSTILE: dict[str, tuple[bytes, list[int]]] = {
    "CL.TE": (framed(b"Content-Length: 6", b"Transfer-Encoding: chunked") + b"0\r\n\r\n" + SMUGGLED, [400]),
    "TE.CL": (framed(b"Transfer-Encoding: chunked", b"Content-Length: 4") + b"2b\r\n" + SMUGGLED + b"0\r\n\r\n", [400]),
    "TE.TE": (framed(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity") + b"0\r\n\r\n" + SMUGGLED, [400]),
    "TE.0": (framed(b"Transfer-Encoding: \x0bchunked") + b"0\r\n\r\n" + SMUGGLED, [400]),
    "CL.CL": (framed(b"Content-Length: 0", b"Content-Length: 43") + SMUGGLED, [400]),
    "CL list": (framed(b"Content-Length: 0, 43") + SMUGGLED, [400]),
    "CL signed": (framed(b"Content-Length: +0") + SMUGGLED, [400]),
    "CL folded": (framed(b"Content-Length: 4\r\n 6") + SMUGGLED, [400]),
    "CL overflow": (framed(b"Content-Length: 18446744073709551616") + SMUGGLED, [400]),
    "space before colon": (framed(b"Content-Length : 43") + SMUGGLED, [400]),
    "bare LF": (framed(b"A: b\nContent-Length: 43") + SMUGGLED, [400]),
    "bare CR": (framed(b"A: b\rContent-Length: 43") + SMUGGLED, [400]),
    "LF only": (b"GET / HTTP/1.1\nHost: localhost\n\n" + SMUGGLED, [400]),
    "body on GET": (b"GET /get HTTP/1.1\r\n" + HOST + b"Content-Length: 43\r\n\r\n" + SMUGGLED + LAST, [200, 200]),
    "chunks on GET": (b"GET /get HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n2b\r\n" + SMUGGLED + b"\r\n0\r\n\r\n" + LAST, [200, 200]),
    "body beside an upgrade": (framed(b"Connection: upgrade", b"Upgrade: x", b"Content-Length: 43") + SMUGGLED + LAST, [200, 200]),
    "HTTP/2 by its preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505]),
    "chunk extension": (CHUNKED + b"2b;a=b;c=\"d\"\r\n" + SMUGGLED + b"\r\n0\r\n\r\n" + LAST, [200, 200]),
    "chunk extension with LF": (CHUNKED + b"5;a\nabcde\r\n0\r\n\r\n" + SMUGGLED, [400]),
    "chunk extension without end": (CHUNKED + b"5;" + b"a" * 100_000, [400]),
    "chunk size with sign": (CHUNKED + b"+5\r\nabcde\r\n0\r\n\r\n" + SMUGGLED, [400]),
    "chunk size with 0x": (CHUNKED + b"0x5\r\nabcde\r\n0\r\n\r\n" + SMUGGLED, [400]),
    "chunk size with underscore": (CHUNKED + b"0_5\r\nabcde\r\n0\r\n\r\n" + SMUGGLED, [400]),
    "chunk size past 64 bits": (CHUNKED + b"10000000000000005\r\nabcde\r\n0\r\n\r\n" + SMUGGLED, [400]),
    "chunk size past all": (CHUNKED + b"ffffffffffffffff\r\nabcde\r\n0\r\n\r\n" + SMUGGLED, [408]),
    "chunk longer than its size": (CHUNKED + b"1\r\nabcde\r\n0\r\n\r\n" + SMUGGLED, [400]),
    "chunk ended by LF": (CHUNKED + b"1\r\na\n0\r\n\r\n" + SMUGGLED, [400]),
    "trailer that is none": (CHUNKED + b"0\r\nGET /smuggled HTTP/1.1\r\n\r\n", [400]),
    "trailer with a length": (CHUNKED + b"0\r\nContent-Length: 43\r\n\r\n" + SMUGGLED + LAST, [200, 200, 200]),
    "trailers without end": (CHUNKED + b"0\r\n" + (b"a: " + b"b" * 1000 + b"\r\n") * 70, [400]),
    "null": (b"GET /\x00 HTTP/1.1\r\n\r\n" + SMUGGLED, [400]),
    "null body": (framed(b"Content-Length: 3") + b"\0\0\0" + LAST, [200, 200]),
    "head without end": (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 50_000, [431]),
    "line without end": (b"GET /" + b"a" * 300_000, [431]),
    "half a head": (b"GET / HT", [408]),
    "half a body": (framed(b"Content-Length: 3") + b"ab", [408]),
    "half a chunk": (CHUNKED + b"3\r\nab", [408]),
    "nothing but empty lines": (b"\r\n" * 100_000, []),
    "after a close": (LAST + SMUGGLED, [200]),
    "after HTTP/1.0": (b"GET / HTTP/1.0\r\n\r\n" + SMUGGLED, [200]),
    "refused after answered": (b"GET / HTTP/1.1\r\n\r\nGET\r\n\r\n" + SMUGGLED, [200, 400]),
}  # fmt: skip


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in _ANSWER.findall(answer)]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.gen_test
async def test_what_is_hostile_is_taken_for_nothing_else(name: str) -> None:
    data, expected = HOSTILE[name]
    async with echoing(**TIMES) as site:
        for parts in ([data], _bytes(data) if len(data) < 400 else _halves(data)):
            answer = await _answer(site, parts)
            assert statuses(answer) == expected, answer
            assert b'"/smuggled"' not in answer or name == "trailer with a length"
        assert statuses(await _answer(site, [LAST])) == [200]


def _bytes(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def _halves(data: bytes) -> list[bytes]:
    return [data[: len(data) // 2], data[len(data) // 2 :]]


async def _answer(site: EchoSite, parts: list[bytes]) -> bytes:
    """All that is answered until the server closes, which it does."""
    async with await site.connect() as client:
        for part in parts:
            client.writer.write(part)
            await asyncio.sleep(0)
        return await asyncio.wait_for(client.rest(), 5)


@pytest.mark.parametrize(
    "begun", [b"", b"GET / HTTP/1.1\r\nHost:", framed(b"Content-Length: 3"), CHUNKED + b"3\r\n"]
)
@pytest.mark.gen_test
async def test_a_side_closed_before_the_end_of_a_request_is_not_answered(begun: bytes) -> None:
    async with echoing() as site, await site.connect() as client:
        await client.send(begun)
        client.writer.write_eof()
        assert await client.rest() == b""


@pytest.mark.parametrize(
    "begun", [b"GET / HTTP/1.1\r\nA: b", framed(b"Content-Length: 1000") + b"a", CHUNKED]
)
@pytest.mark.gen_test
async def test_a_drop_at_a_time_does_not_buy_time(begun: bytes) -> None:
    drop = b"1\r\na\r\n" if begun is CHUNKED else b"a"
    async with echoing(**TIMES) as site, await site.connect() as client:
        await client.send(begun)
        answer = asyncio.ensure_future(client.rest())
        while not answer.done():
            client.writer.write(drop)
            await asyncio.sleep(0.01)
        assert statuses(await answer) == [408]


# Anything at all


VALID = [
    b"GET /a HTTP/1.1\r\n" + HOST + b"\r\n",
    b"GET /b HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"HEAD /c HTTP/1.1\r\n" + HOST + b"\r\n",
    b"\r\nOPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n",
    framed(b"Content-Length: 5") + b"abcde",
    framed(b"Content-Length: 5", b"Expect: 100-continue") + b"abcde",
    CHUNKED + b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nT: 1\r\n\r\n",
    b"PUT http://localhost/d HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: x\r\n\r\n",
]  # fmt: skip
FRAGMENTS = [
    b"\r\n", b"\n", b"\r", b" ", b"\t", b"\x00", b"\xff", b":", b";", b",", b"0", b"1", b"-", b"\r\n\r\n", b"0\r\n\r\n",
    b"Content-Length: 5\r\n", b"Content-Length: 1\r\n", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: x\r\n",
    b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"GET / HTTP/1.1\r\n", b"HTTP/1.1", b"HTTP/2.0", b"chunked",
]  # fmt: skip


@st.composite
def conversations(draw: st.DrawFn) -> bytes:
    """Valid requests, one behind the other, some bytes of them changed, and the last one closing."""
    data = bytearray(b"".join(draw(st.lists(st.sampled_from(VALID), min_size=1, max_size=4))))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        cut = draw(st.integers(0, 3))
        data[at : at + cut] = draw(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=3)))
    return bytes(data) + LAST


cuts = st.lists(st.integers(0, 700), max_size=8)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(conversations(), cuts), min_size=40, max_size=40))
@pytest.mark.slow
def test_where_the_bytes_are_cut_never_changes_the_answers(io_loop: Any, sent: Any) -> None:
    io_loop.run_sync(lambda: _answers_alike(sent), timeout=30)


async def _answers_alike(sent: list[tuple[bytes, list[int]]]) -> None:
    async with echoing(**dict.fromkeys(TIMES, 0.5)) as site:
        await asyncio.gather(*(_check(site, data, marks) for data, marks in sent))
        assert statuses(await _answer(site, [LAST])) == [200]
    for request in site.echo.requests:  # each was told once how it ended
        assert request.events in (["headers", "finish"], ["headers", "closed"])


async def _check(site: EchoSite, data: bytes, marks: list[int]) -> None:
    parts = [data[a:b] for a, b in itertools.pairwise([0, *sorted(marks), len(data)])]
    whole, pieces = await asyncio.gather(_answer(site, [data]), _answer(site, parts))
    # Only whoever has not sent its body yet is told to continue, and dates differ.
    assert _final(whole) == _final(pieces)
    assert max(statuses(whole), default=200) != 500
    requests = data.count(b"HTTP/")
    assert len(statuses(_final(whole))) <= requests + 1


def _final(answer: bytes) -> bytes:
    answer = answer.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    return re.sub(rb"Date: [^\r]*\r\n", b"", answer)


@pytest.mark.parametrize("number", range(len(VALID)))
@pytest.mark.gen_test
async def test_a_request_may_be_cut_anywhere(number: int) -> None:
    data = VALID[number] + LAST
    async with echoing() as site:
        expected = _final(await _answer(site, [data]))
        assert len(statuses(expected)) == 2
        cut = [[data[:at], data[at:]] for at in range(1, len(data))]
        for answers in asyncio.as_completed([_answer(site, parts) for parts in cut]):
            assert _final(await answers) == expected
