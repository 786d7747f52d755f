from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tornjango.framing import Chunks, Head, Refusal, is_broken, read_head

LINE = b"POST / HTTP/1.1\r\n"
LIMIT = 1000


def read(fields: bytes, line: bytes = LINE) -> Head:
    return read_head(line + fields + b"\r\n", LIMIT)


def refused(fields: bytes, line: bytes = LINE) -> int:
    with pytest.raises(Refusal) as caught:
        read(fields, line)
    assert caught.value.reason
    return caught.value.status


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET / HTTP/2.0\r\n", 505),
        (b"GET / HTTP/0.9\r\n", 505),
        (b"CONNECT a:443 HTTP/1.1\r\n", 501),
        (b"GET * HTTP/1.1\r\n", 400),
        (b"GET a HTTP/1.1\r\n", 400),
        (b"GET ftp://a/ HTTP/1.1\r\n", 400),
        (b"GET  / HTTP/1.1\r\n", 400),
        (b"GET /  HTTP/1.1\r\n", 400),
        (b"GET /\tHTTP/1.1\r\n", 400),
        (b" GET / HTTP/1.1\r\n", 400),
        (b"GET / HTTP/1.1 \r\n", 400),
        (b"GET / http/1.1\r\n", 400),
        (b"GET / HTTP/1.10\r\n", 400),
        (b"G\xe9T / HTTP/1.1\r\n", 400),
        (b"GET /\x7f HTTP/1.1\r\n", 400),
        (b"GET / HTTP/1.1\n", 400),
        (b"GET / HTTP/1.1\r\r\n", 400),
    ],
)
def test_a_line_that_is_none_is_refused(line: bytes, status: int) -> None:
    assert refused(b"", line) == status


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"GET /a%20b?c=/ HTTP/1.1\r\n", ("GET", "/a%20b?c=/", "HTTP/1.1")),
        (b"GET /\xc3\xa9 HTTP/1.1\r\n", ("GET", "/\xc3\xa9", "HTTP/1.1")),
        (b"OPTIONS * HTTP/1.1\r\n", ("OPTIONS", "*", "HTTP/1.1")),
        (b"GET HTTP://a/b HTTP/1.1\r\n", ("GET", "HTTP://a/b", "HTTP/1.1")),
        (b"GET / HTTP/1.0\r\n", ("GET", "/", "HTTP/1.0")),
        (b"GET / HTTP/1.2\r\n", ("GET", "/", "HTTP/1.1")),
        (b"brew!# / HTTP/1.1\r\n", ("brew!#", "/", "HTTP/1.1")),
    ],
)
def test_every_method_and_form_of_target_is_read(line: bytes, expected: tuple[str, ...]) -> None:
    head = read(b"", line)
    assert (head.method, head.target, head.version) == expected


@pytest.mark.parametrize(
    "fields",
    [
        b"A: b\r\n c\r\n",
        b" A: b\r\n",
        b"A : b\r\n",
        b"A\t: b\r\n",
        b"A\r\n",
        b": b\r\n",
        b"A(: b\r\n",
        b"A\xe9: b\r\n",
        b"A: \x00\r\n",
        b"A\x00: b\r\n",
        b"A: \x01\r\n",
        b"A: \x7f\r\n",
        b"A: b\n",
        b"A: b\rc\r\n",
        b"A: b\r\r\n",
        b"A: b\nB: c\r\n",
    ],
)
def test_a_field_that_is_none_is_refused(fields: bytes) -> None:
    assert refused(fields) == 400
    assert refused(b"Host: a\r\n" + fields) == 400
    assert refused(fields + b"Host: a\r\n") == 400


def test_fields_are_read_as_they_are() -> None:
    head = read(b"a-b:1\r\nX: \t 2 \t \r\nx:\r\nY: \xe9\t!\r\nCookie: a\r\ncookie: b\r\n")
    assert list(head.headers.get_all()) == [
        ("A-B", "1"), ("X", "2"), ("X", ""), ("Y", "\xe9\t!"), ("Cookie", "a"), ("Cookie", "b"),
    ]  # fmt: skip


SMUGGLED = {
    "length and chunks": (b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", 400),
    "chunks and length": (b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n", 400),
    "two lengths": (b"Content-Length: 3\r\nContent-Length: 4\r\n", 400),
    "the same length twice": (b"Content-Length: 3\r\nContent-Length: 3\r\n", 400),
    "a list of lengths": (b"Content-Length: 3, 3\r\n", 400),
    "a length with a plus": (b"Content-Length: +3\r\n", 400),
    "a length with a minus": (b"Content-Length: -3\r\n", 400),
    "a hexadecimal length": (b"Content-Length: 0x3\r\n", 400),
    "a length with a line": (b"Content-Length: 1_0\r\n", 400),
    "a length with a point": (b"Content-Length: 3.0\r\n", 400),
    "an empty length": (b"Content-Length:\r\n", 400),
    "a length of two words": (b"Content-Length: 3 4\r\n", 400),
    "a folded length": (b"Content-Length: 3\r\n 4\r\n", 400),
    "a length past 64 bits": (b"Content-Length: 18446744073709551616\r\n", 400),
    "a length of 5,000 digits": (b"Content-Length: " + b"9" * 5000 + b"\r\n", 400),
    "a length of 5,000 zeros": (b"Content-Length: " + b"0" * 5000 + b"1\r\n", 400),
    "a length in other digits": ("Content-Length: \u0663\r\n".encode(), 400),
    "a superscript length": (b"Content-Length: \xb2\r\n", 400),
    "no known coding": (b"Transfer-Encoding: gzip\r\n", 400),
    "a coding of ours and theirs": (b"Transfer-Encoding: gzip, chunked\r\n", 501),
    "a coding after chunked": (b"Transfer-Encoding: chunked, gzip\r\n", 400),
    "chunked twice": (b"Transfer-Encoding: chunked, chunked\r\n", 400),
    "chunked in two lines": (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 400),
    "identity": (b"Transfer-Encoding: identity\r\n", 400),
    "identity and chunked": (b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n", 501),
    "an empty coding": (b"Transfer-Encoding:\r\n", 400),
    "an empty coding before chunked": (b"Transfer-Encoding: , chunked\r\n", 501),
    "a coding like chunked": (b"Transfer-Encoding: xchunked\r\n", 400),
    "chunked in quotes": (b'Transfer-Encoding: "chunked"\r\n', 400),
    "chunked with a parameter": (b"Transfer-Encoding: chunked;a=b\r\n", 400),
    "chunked after a vertical tab": (b"Transfer-Encoding: \x0bchunked\r\n", 400),
    "chunked with a space before the colon": (b"Transfer-Encoding : chunked\r\n", 400),
    "a length with a space before the colon": (b"Content-Length : 3\r\n", 400),
    "chunked, folded": (b"Transfer-Encoding:\r\n chunked\r\n", 400),
    "another expectation": (b"Expect: 200-ok\r\nContent-Length: 3\r\n", 417),
}


@pytest.mark.parametrize("name", SMUGGLED)
def test_framing_that_servers_read_differently_is_refused(name: str) -> None:
    fields, status = SMUGGLED[name]
    assert refused(fields) == status
    assert refused(fields + b"Host: a\r\n") == status


def test_http_1_0_has_no_chunks() -> None:
    assert refused(b"Transfer-Encoding: chunked\r\n", b"POST / HTTP/1.0\r\n") == 400


def test_bodies_are_framed_as_declared() -> None:
    assert read(b"").body is None
    assert read(b"Content-Length: 0\r\n").body is None
    assert read(b"Content-Length: 007 \r\n").length == 7
    assert isinstance(read(b"Transfer-Encoding: Chunked\r\n").body, Chunks)
    upgrade = read(b"Connection: Upgrade\r\nUpgrade: x\r\nContent-Length: 3\r\n")
    assert upgrade.length == 3


@pytest.mark.parametrize(
    ("version", "fields", "kept"),
    [
        (b"1.1", b"", True),
        (b"1.0", b"", False),
        (b"1.1", b"Connection: close\r\n", False),
        (b"1.1", b"Connection: keep-alive, Close\r\n", False),
        (b"1.1", b"Connection: keep-alive\r\nConnection: close\r\n", False),
        (b"1.1", b"Connection: closed\r\n", True),
        (b"1.0", b"Connection: Keep-Alive\r\n", True),
        (b"1.0", b"Connection: te, keep-alive\r\n", True),
        (b"1.0", b"Connection: keep-alive, close\r\n", False),
    ],
)
def test_a_connection_is_kept_as_its_options_say(version: bytes, fields: bytes, kept: bool) -> None:
    assert read(fields, b"GET / HTTP/" + version + b"\r\n").keep_alive is kept


def test_only_a_body_is_asked_for() -> None:
    assert read(b"Expect: 100-Continue\r\nContent-Length: 3\r\n").expects
    assert not read(b"Expect: 100-continue\r\n").expects
    assert not read(b"Expect: other\r\nContent-Length: 3\r\n", b"POST / HTTP/1.0\r\n").expects


# Chunks


def decoded(*parts: bytes, limit: int = LIMIT) -> tuple[bytes, bytes, bool]:
    """The content, what is left of the bytes, and whether the body is whole."""
    chunks, content, rest = Chunks(limit), b"", b""
    for part in parts:
        rest += part
        while not chunks.done:
            found, at = chunks.decode(rest, 0)
            rest, content = rest[at:], content + found
            if not at:
                break
    return content, rest, chunks.done


def test_chunks_are_joined_and_what_follows_is_left() -> None:
    data = b'3\r\nabc\r\n00A;x=1 ; y="2;3"\r\n0123456789\r\n0\r\nA: b\r\nC:\r\n\r\nGET /'
    assert decoded(data) == (b"abc0123456789", b"GET /", True)


@given(
    st.lists(st.binary(min_size=1, max_size=9), max_size=5),
    st.lists(st.integers(0, 200)),
    st.sampled_from([b"", b";a", b" ;a=b"]),
    st.sampled_from([b"", b"T: 1\r\n"]),
)
def test_where_the_bytes_are_cut_does_not_matter(
    chunks: list[bytes], cuts: list[int], extension: bytes, trailer: bytes
) -> None:
    whole = b"".join(b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    whole += b"0%b\r\n%b\r\nnext" % (extension, trailer)
    marks = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    parts = [whole[a:b] for a, b in itertools.pairwise(marks)]
    assert decoded(*parts) == (b"".join(chunks), b"next", True)


@pytest.mark.parametrize(
    "data",
    [
        b"g\r\n",
        b"\r\n",
        b"-1\r\n",
        b"+1\r\n",
        b"0x1\r\n",
        b"1 \r\n",
        b" 1\r\n",
        b"1,\r\n",
        b"1\n",
        b"1\ra",
        b"1;a\n",
        b"1;a\rb\r\n",
        b"1;\x00\r\n",
        b"1;\r\r\n",
        b"11111111111111111\r\n",
        b"0" * 17,
        b"1\r\nab",
        b"1\r\na\n",
        b"1\r\na\rb",
        b"0\r\na\r\n",
        b"0\r\n a: b\r\n",
        b"0\r\na: b\n",
        b"0\r\na : b\r\n",
        b"0\r\na: \x00\r\n",
        b"0\r\na: b\rc\r\n",
    ],
)
def test_chunks_that_are_none_are_refused_wherever_they_are_cut(data: bytes) -> None:
    for cut in range(len(data) + 1):
        with pytest.raises(Refusal):
            decoded(data[:cut], data[cut:])


@pytest.mark.parametrize(
    "data",
    [
        b"1;" + b"a" * 101,
        b"".join(b"1;aaaaaaaaa\r\na\r\n" for _ in range(11)),
        b"0\r\na: " + b"b" * 100,
        b"0\r\n" + b"a: bbbbbbb\r\n" * 11,
    ],
)
def test_extensions_and_trailers_have_a_limit(data: bytes) -> None:
    with pytest.raises(Refusal, match="too long"):
        decoded(data, limit=100)


def test_many_small_chunks_are_decoded_in_turns() -> None:
    data = b"1\r\na\r\n" * 5000 + b"0\r\n\r\n"
    content, at = Chunks(LIMIT).decode(data, 0)
    assert 0 < len(content) < 2000
    assert at == 6 * len(content)
    assert decoded(data) == (b"a" * 5000, b"", True)


@pytest.mark.parametrize("part", [b"", b"GET /", b"GET / HTTP/1.1\r", b"a\r\nb\r\n\r"])
def test_the_beginning_of_a_head_is_not_broken(part: bytes) -> None:
    assert not is_broken(part)
