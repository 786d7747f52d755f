from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tornjango.ranges import Part, Unsatisfiable, wanted

ETAG = '"abc"'
DATE = "Sun, 06 Nov 1994 08:49:37 GMT"


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-0", Part(0, 1)),
        ("bytes=0-", Part(0, 100)),
        ("bytes=10-19", Part(10, 10)),
        ("bytes=99-", Part(99, 1)),
        ("bytes=90-1000", Part(90, 10)),
        ("bytes=-1", Part(99, 1)),
        ("bytes=-1000", Part(0, 100)),
        ("Bytes=0-9", Part(0, 10)),
        ("bytes= 0-9", Part(0, 10)),
        ("bytes=,0-9,", Part(0, 10)),
        ("bytes=00-09", Part(0, 10)),
    ],
)
def test_one_range_is_a_part(asked: str, part: Part) -> None:
    assert wanted(asked, 100) == part


@pytest.mark.parametrize(
    "asked",
    [
        *(None, "", "bytes", "bytes=", "bytes=-", "bytes=a-b", "bytes=1", "bytes=9-1", "bytes=--1"),
        *("bytes=-1-2", "bytes=1-2-3", "bytes=0x1-2", "bytes=+1-2", "bytes=1 - 2", "bytes=\u0661-"),
        *("items=0-9", "bytes=0-1,5-6", "bytes=0-9, -5", "bytes=0-" + "9" * 5000),
    ],
)
def test_what_is_no_single_range_of_bytes_is_ignored(asked: str | None) -> None:
    assert wanted(asked, 100) is None


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        *(("bytes=100-", 100), ("bytes=100-200", 100), ("bytes=-0", 100), ("bytes=0-", 0)),
        *(("bytes=-5", 0), ("bytes=99999999999999999999-", 100)),
    ],
)
def test_a_range_that_is_not_there_is_unsatisfiable(asked: str, size: int) -> None:
    with pytest.raises(Unsatisfiable) as failure:
        wanted(asked, size)
    assert failure.value.content_range == f"bytes */{size}"


@pytest.mark.parametrize(
    ("if_range", "partial"),
    [
        (None, True),
        (ETAG, True),
        ('"other"', False),
        (f"W/{ETAG}", False),
        (DATE, True),
        ("Sun, 06 Nov 1994 08:49:38 GMT", False),
        ("Sunday, 06-Nov-94 08:49:37 GMT", False),
        ("", False),
        ("nonsense", False),
    ],
)
def test_a_part_of_another_version_is_not_given(if_range: str | None, partial: bool) -> None:
    part = wanted("bytes=0-9", 100, if_range=if_range, etag=ETAG, last_modified=DATE)
    assert part == (Part(0, 10) if partial else None)


def test_a_weak_etag_names_no_part() -> None:
    weak = f"W/{ETAG}"
    assert wanted("bytes=0-9", 100, if_range=weak, etag=weak) is None


def test_without_validators_every_if_range_is_of_another_version() -> None:
    assert wanted("bytes=0-9", 100, if_range=ETAG) is None
    assert wanted("bytes=0-9", 100, if_range=DATE) is None


def test_a_part_says_where_it_is() -> None:
    assert Part(10, 5).content_range(100) == "bytes 10-14/100"


@given(st.text(st.sampled_from("bytes=0123456789-, ")), st.integers(0, 2**70))
def test_a_part_is_never_empty_and_never_outside(asked: str, size: int) -> None:
    for header in (asked, f"bytes={asked}"):
        try:
            part = wanted(header, size)
        except Unsatisfiable:
            continue
        if part is not None:
            assert part.length > 0
            assert 0 <= part.start < part.start + part.length <= size
