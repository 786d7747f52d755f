"""Makes the two scripts that pages load, a module and a classic one, from comet.source.js: without comments, and shorter.

Run it after each change of the source; a test holds them in step.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import count
from pathlib import Path

STATIC = Path(__file__).parent.parent / "tornjango" / "static" / "tornjango"
SOURCE = STATIC / "comet.source.js"
MODULE = STATIC / "comet.js"
CLASSIC = STATIC / "comet.classic.js"

_HEAD = "// Made from comet.source.js by bin/_comet_client.py.\n"
_COMMENT = re.compile(r"^\s*(?:/\*\*.*?\*/|//[^\n]*)\n", re.MULTILINE | re.DOTALL)
_BLANK = re.compile(r"^\s+", re.MULTILINE)
# Strings stay as they are; a template of ours has no other inside.
_STRING = re.compile(r"""("[^"\n]*"|`[^`]*`)""")
_SPACE = re.compile(r" ?([-=+*/<>!?:;,&|(){}\[\]]+) ?")
_PRIVATE = re.compile(r"#([A-Za-z]\w*)")


def shortened(source: str) -> str:
    """Without comments and unneeded blanks; private names, which no page can use, are letters."""
    text = _BLANK.sub("", _COMMENT.sub("", source))
    parts = _STRING.split(text)
    parts[::2] = [_SPACE.sub(r"\1", part) for part in parts[::2]]
    text = "".join(parts)
    names = [name for name, _ in Counter(_PRIVATE.findall(text)).most_common()]
    letters = dict(zip(names, map(_letters, count()), strict=False))
    return _PRIVATE.sub(lambda found: f"#{letters[found[1]]}", text)


def _letters(number: int) -> str:
    rest, last = divmod(number, 26)
    return (_letters(rest - 1) if rest else "") + chr(ord("a") + last)


def module(source: str) -> str:
    return _HEAD + shortened(source)


def classic(source: str) -> str:
    """The same for a page without modules: it makes ``window.Comet``."""
    text = shortened(source).replace("export class", "class")
    return f'{_HEAD}(() => {{\n"use strict"\n{text}window.Comet = Comet\n}})()\n'


if __name__ == "__main__":
    source = SOURCE.read_text()
    MODULE.write_text(module(source))
    CLASSIC.write_text(classic(source))
