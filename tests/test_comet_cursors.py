from __future__ import annotations

import struct
from base64 import urlsafe_b64encode

import pytest
from django.conf import settings as django_settings
from django.core.signing import Signer
from django.test import override_settings

from tornjango.comet import cursors
from tornjango.comet.log import Position
from tornjango.conf import get_config
from tornjango.exceptions import InvalidCursor

HERE = Position(b"epoch-16", 2**40)
THERE = Position(b"other-16", 0)


def test_cursor_gives_back_the_positions_it_was_made_of() -> None:
    cursor = cursors.encode({"a": HERE, "b": THERE})
    assert cursors.decode(cursor, ["b", "a"]) == {"a": HERE, "b": THERE}


def test_channel_the_cursor_does_not_know_is_left_out() -> None:
    assert cursors.decode(cursors.encode({"a": HERE}), ["a", "b"]) == {"a": HERE}


def test_cursor_fits_in_a_url_as_it_is_and_is_short() -> None:
    cursor = cursors.encode({"entry:7": HERE})
    assert len(cursor) < 80
    assert cursor.replace("-", "").replace("_", "").replace(".", "").isalnum()


def test_cursor_of_all_allowed_channels_with_the_longest_names_is_accepted() -> None:
    positions = {f"{'é' * 190}{n}": HERE for n in range(get_config().COMET.CHANNELS_PER_CLIENT)}
    cursor = cursors.encode(positions)
    assert len(cursor) < 1100
    assert cursors.decode(cursor, positions) == positions


def test_cursor_for_more_channels_than_allowed_is_refused() -> None:
    cursor = cursors.encode(
        {f"{n}": HERE for n in range(get_config().COMET.CHANNELS_PER_CLIENT + 1)}
    )
    with pytest.raises(InvalidCursor, match="too long"):
        cursors.decode(cursor, ["1"])


def test_cursor_survives_a_rotated_secret_key_with_its_fallback() -> None:
    cursor = cursors.encode({"a": HERE})
    with override_settings(SECRET_KEY="new", SECRET_KEY_FALLBACKS=[django_settings.SECRET_KEY]):
        assert cursors.decode(cursor, ["a"]) == {"a": HERE}
    with override_settings(SECRET_KEY="new"), pytest.raises(InvalidCursor):
        cursors.decode(cursor, ["a"])


def _signed(payload: bytes, salt: str = cursors._SALT) -> str:
    return Signer(salt=salt, sep=".").sign(urlsafe_b64encode(payload).rstrip(b"=").decode())


@pytest.mark.parametrize(
    "cursor",
    [
        ".",
        "x",
        "a.b",
        "\x00",
        "é.é",
        "%",
        cursors.encode({"a": HERE})[:-1],
        cursors.encode({"a": HERE})[1:],
        cursors.encode({"a": HERE}) + "=",
        cursors.encode({"a": HERE}).upper(),
        "A" + cursors.encode({"a": HERE}),
        _signed(b"not a whole entry"),
        _signed(struct.pack(">8s8sQ", b"digest", b"epoch", 1), salt="another"),
        "x" * 1_000_000,
    ],
)
def test_anything_else_is_refused_with_what_to_do(cursor: str) -> None:
    with pytest.raises(InvalidCursor, match="Poll without a cursor"):
        cursors.decode(cursor, ["a"])
