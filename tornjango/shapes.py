"""What a path looks like that a URL pattern matches, as far as this can be told without trying. No I/O.

A shape says less than its pattern: a path that does not fit it is surely not matched, one that fits may be.
"""

from __future__ import annotations

import re
from functools import lru_cache
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

from django.urls.resolvers import RegexPattern, RoutePattern

#: In a shape: text without a slash, or none. A pattern that has this character itself means it so, too.
ANY = "\0"

_PARAMETER = re.compile("<([^>]+)>")
_ZERO_WIDTH = {op.AT, op.ASSERT, op.ASSERT_NOT}
_SLASHLESS = {op.CATEGORY_DIGIT, op.CATEGORY_SPACE, op.CATEGORY_WORD}
_SLASH = ord("/")


class Shape(NamedTuple):
    text: str
    #: Whether nothing of the pattern is left out at the end, so that what it includes follows there.
    whole: bool
    #: Whether the path ends with the text.
    exact: bool

    def then(self, other: Shape) -> Shape:
        """Of a pattern that this one, which is whole, includes."""
        return Shape(self.text + other.text, other.whole, other.exact)


#: Of a pattern that may match any path.
UNKNOWN = Shape("", False, False)


def shape_of(pattern: object) -> Shape:
    """``UNKNOWN`` for patterns that are not Django's own, and for regular expressions not bound to the path's start.

    A translated pattern is taken in the language that is active.
    """
    if type(pattern) is RoutePattern:
        return _of_route(pattern)
    if type(pattern) is RegexPattern:
        return _of_regex(pattern)
    return UNKNOWN


def is_translated(pattern: object) -> bool:
    """Whether it is another pattern in another language."""
    given = getattr(pattern, "_route" if type(pattern) is RoutePattern else "_regex", "")
    return not isinstance(given, str)


def _of_route(pattern: Any) -> Shape:
    # What stands between is the parameter of the piece before, in turn.
    pieces = _PARAMETER.split(str(pattern._route))
    text = pieces[0]
    for parameter, literal in zip(pieces[1::2], pieces[2::2], strict=True):
        converter = pattern.converters.get(parameter.rpartition(":")[2])
        if converter is None or _may_hold_slash(converter.regex):
            return Shape(text, False, False)
        text += ANY + literal
    return Shape(text, True, pattern._is_endpoint)


def _of_regex(pattern: Any) -> Shape:
    source = str(pattern._regex)
    try:
        parsed = parser.parse(source)
    except re.error:  # Django says so, of the pattern that it names
        return UNKNOWN
    items = list(parsed)
    # With flags, a letter is not that letter only, or a line's start may be anywhere.
    if parsed.state.flags & (re.IGNORECASE | re.MULTILINE) or not items or not _is_start(items[0]):
        return UNKNOWN
    text = ""
    for code, argument in items[1:]:
        if _holds_slash(code, argument) and code is not op.LITERAL:
            return Shape(text, False, False)
        if code not in _ZERO_WIDTH:
            text += chr(argument) if code is op.LITERAL else ANY
    # RegexPattern.match: such a pattern has to match the path to its end.
    return Shape(text, True, pattern._is_endpoint and source.endswith("$"))


def _is_start(item: tuple[Any, Any]) -> bool:
    return item in ((op.AT, op.AT_BEGINNING), (op.AT, op.AT_BEGINNING_STRING))


@lru_cache
def _may_hold_slash(regex: str) -> bool:
    try:
        return any(_holds_slash(*item) for item in parser.parse(regex))
    except re.error:
        return True


def _holds_slash(code: Any, argument: Any) -> bool:
    """Whether a piece of a parsed regular expression may match text with a slash in it."""
    match code:
        case op.LITERAL:
            return bool(argument == _SLASH)
        case op.NOT_LITERAL:
            return bool(argument != _SLASH)
        case op.IN:
            return _set_holds_slash(argument)
        case op.MAX_REPEAT | op.MIN_REPEAT | op.POSSESSIVE_REPEAT:
            return any(_holds_slash(*item) for item in argument[2])
        case op.SUBPATTERN:
            return any(_holds_slash(*item) for item in argument[3])
        case op.ATOMIC_GROUP:
            return any(_holds_slash(*item) for item in argument)
        case op.BRANCH:
            return any(_holds_slash(*item) for branch in argument[1] for item in branch)
    # Any character, what another group matched, and what a later Python may add.
    return code not in _ZERO_WIDTH


def _set_holds_slash(items: list[tuple[Any, Any]]) -> bool:
    negated = items[0][0] is op.NEGATE
    return negated != any(_member_is_slash(*item) for item in items)


def _member_is_slash(code: Any, argument: Any) -> bool:
    match code:
        case op.LITERAL:
            return bool(argument == _SLASH)
        case op.RANGE:
            return bool(argument[0] <= _SLASH <= argument[1])
        case op.CATEGORY:
            return argument not in _SLASHLESS
    return False  # the sign of negation
