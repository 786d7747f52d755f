"""Options of a command that are keys of ``settings.TORNJANGO``: each is made from what the key says of itself."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction
from collections.abc import Callable
from typing import Any

from tornjango.conf import Config

FIELDS = {field.name: field for field in dataclasses.fields(Config) if field.metadata.get("flag")}


def add_option(parser: ArgumentParser, key: str) -> None:
    """Adds the option that sets ``key``; where it is not given, its value is None. A wrong value ends the program."""
    field = FIELDS[key]
    what: dict[str, Any] = {"metavar": key.rpartition("_")[2], "type": _reader(field)}
    if isinstance(field.default, bool):
        what = {"action": BooleanOptionalAction}
    elif isinstance(field.default, tuple):
        what["action"] = "append"
    help = f'{field.metadata["help"]} (TORNJANGO["{key}"])'
    parser.add_argument(
        field.metadata["flag"],
        dest=key.lower(),
        default=None,
        help=help.replace("%", "%%"),
        **what,
    )


def given(options: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """The keys of ``settings.TORNJANGO`` that the command line sets, with their values."""
    values = {key: options.get(key.lower()) for key in keys}
    return {key: value for key, value in values.items() if value is not None}


def _reader(field: dataclasses.Field[Any]) -> Callable[[str], Any]:
    kind, several = _kind(field), isinstance(field.default, tuple)

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = text
        if not field.metadata["valid"]([value] if several else value):
            raise ArgumentTypeError(f"it must be {field.metadata['expects']}, not {text!r}")
        return value

    return read


def _kind(field: dataclasses.Field[Any]) -> type:
    if field.metadata["unit"] == "s":
        return float
    return int if isinstance(field.default, int) else str
