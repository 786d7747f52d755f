from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from inspect import isawaitable, iscoroutinefunction
from typing import Any, NamedTuple, TypeVar

from asgiref.sync import sync_to_async
from django.http import HttpRequest
from django.urls.resolvers import RoutePattern

from tornjango.comet.log import Channel, Limits, Position
from tornjango.conf import get_config
from tornjango.exceptions import ChannelForbidden, CometError, ConfigurationError, UnknownChannel

Authoriser = Callable[..., bool] | Callable[..., Awaitable[bool]]
_A = TypeVar("_A", bound=Authoriser)

MAX_NAME_LENGTH = 200

#: Channels whose names begin so are between the processes of a project; nobody can declare or name them.
INTERNAL = "~"

#: What the name of a presence channel's companion ends with, on which its followers hear who is there.
COMPANION = "@presence"

#: One state, as long as brokers may keep it: who comes when nothing has changed for hours has to hear it, too.
_STATE = Limits(history=1, ttl=24 * 3600, max_bytes=1 << 20, latest=True)


@dataclass(frozen=True, slots=True)
class Declaration:
    """A channel pattern, who may read it, and its own limits where it has any."""

    pattern: str
    route: RoutePattern
    authoriser: Authoriser
    is_async: bool
    history: int | None
    ttl: float | None
    max_bytes: int | None
    latest: bool
    presence: bool
    publisher: Authoriser | None
    is_companion: bool = False

    @property
    def limits(self) -> Limits:
        config = get_config().COMET
        return Limits(
            self.history or config.HISTORY,
            self.ttl or config.TTL,
            self.max_bytes or config.MAX_BYTES,
            self.latest,
        )


class Match(NamedTuple):
    """A channel's name, resolved: its declaration and the values in the name."""

    channel: Channel
    declaration: Declaration
    kwargs: dict[str, Any]

    def begin(self, present: Position) -> Position:
        """Where one stands that was not here before. The last state of who is there is for newcomers, too."""
        return present._replace(offset=0) if self.declaration.is_companion else present

    def ask(self, request: HttpRequest) -> bool | Awaitable[bool]:
        return self.declaration.authoriser(request, **self.kwargs)


_NO_TEXT = re.compile("[\0\ud800-\udfff]")

_declared: dict[str, Declaration] = {}


def channel(
    pattern: str,
    *,
    history: int | None = None,
    ttl: float | None = None,
    max_bytes: int | None = None,
    latest: bool = False,
    presence: bool = False,
    publisher: Authoriser | None = None,
) -> Callable[[_A], _A]:
    """Declares the channels that ``pattern`` matches, over the function that says who may read them.

    The pattern is written as in ``path()``: ``"entry:<int:pk>"``. The function is called as ``can_read(request, pk=7)``
    and answers whether this request may read; what it raises is handled as if a view had raised it. A yes counts for
    ``TORNJANGO["COMET"]["GRANT_TTL"]`` seconds, for this client, or until ``comet.revoke``. A plain function may use the
    database and runs in a worker thread; an ``async def`` runs on the loop, which is cheaper.

    ``history`` (messages), ``ttl`` (seconds) and ``max_bytes`` bound the channel's log, in place of the settings' values.
    With ``latest`` a reader gets the newest message only, and never a gap: for a state that each message tells whole. With
    ``presence`` it is known who follows: see ``comet.presence``. ``publisher`` is a function like the one declared over,
    which says who may publish from a browser; without it nobody may.

    Declare channels in the ``channels`` module of an installed app, which is imported at start. The first declaration
    that matches a name counts. Raises ConfigurationError for a pattern declared twice, or one that cannot be read.
    """
    for option, value in {"history": history, "ttl": ttl, "max_bytes": max_bytes}.items():
        if value is not None and not value > 0:
            raise ConfigurationError(
                f"comet.channel({pattern!r}, {option}=...) must be positive, not {value!r}."
            )

    def declare(authoriser: _A) -> _A:
        bounds = history, ttl, max_bytes
        options = latest, presence, publisher
        _declare(
            Declaration(
                pattern, _route(pattern), authoriser, waits_on_loop(authoriser), *bounds, *options
            )
        )
        return authoriser

    return declare


def _route(pattern: str) -> RoutePattern:
    if pattern.startswith(INTERNAL):
        raise ConfigurationError(
            f"The channel pattern {pattern!r} begins with {INTERNAL!r}: such channels are tornjango's own."
        )
    route = RoutePattern(pattern, is_endpoint=True)
    if pattern.count("<") != len(route.converters) or pattern.count(">") != len(route.converters):
        raise ConfigurationError(
            f"The channel pattern {pattern!r} has a bracket without its partner. "
            'Write parameters as in path(): "entry:<int:pk>".'
        )
    return route


def _declare(declaration: Declaration) -> None:
    first = _declared.setdefault(declaration.pattern, declaration)
    if first is not declaration:
        raise ConfigurationError(
            f"The channel {declaration.pattern!r} is declared twice: over {_name(first.authoriser)} "
            f"and over {_name(declaration.authoriser)}. Remove one of them."
        )


def _name(authoriser: Authoriser) -> str:
    return f"{authoriser.__module__}.{getattr(authoriser, '__qualname__', authoriser)}"


def patterns() -> list[str]:
    """The declared patterns, in the order in which they are tried."""
    return list(_declared)


def has_presence() -> bool:
    """Whether any channel is declared with ``presence``."""
    return any(declaration.presence for declaration in _declared.values())


def companion(name: str) -> Channel | None:
    """The channel on which the followers of a presence channel hear who is there; None if it is not one."""
    match = _find(name)
    if match is None or not match.declaration.presence:
        return None
    return _to_companion(match).channel


def _to_companion(match: Match) -> Match:
    declaration = _companion_of(match.declaration)
    return Match(
        Channel(match.channel.name + COMPANION, declaration.limits), declaration, match.kwargs
    )


@cache
def _companion_of(declaration: Declaration) -> Declaration:
    """Whoever may read the channel may read it, and nobody may publish there."""
    return replace(
        declaration, **_STATE._asdict(), presence=False, publisher=None, is_companion=True
    )


def _find(name: str) -> Match | None:
    # No broker, and no database, takes NUL or half a character for text; who made such a name means no good.
    if len(name) <= MAX_NAME_LENGTH and not _NO_TEXT.search(name):
        for declaration in _declared.values():
            if found := declaration.route.match(name):
                return Match(Channel(name, declaration.limits), declaration, found[2])
    return None


def resolve(name: str) -> Match:
    """What is declared for a channel's full name. Raises UnknownChannel if nothing is."""
    if name.endswith(COMPANION):
        match = _find(name.removesuffix(COMPANION))
        if match is not None and match.declaration.presence:
            return _to_companion(match)
    if (match := _find(name)) is not None:
        return match
    shown = name if len(name) <= MAX_NAME_LENGTH else f"{name[:MAX_NAME_LENGTH]}..."
    raise UnknownChannel(f"There is no channel {shown!r}.")


def limits(name: str) -> Limits:
    """A channel's bounds; the settings', for one that another process declares."""
    try:
        return resolve(name).channel.limits
    except UnknownChannel:
        config = get_config().COMET
        return Limits(config.HISTORY, config.TTL, config.MAX_BYTES)


def resolve_all(names: Iterable[str]) -> list[Match]:
    """Resolves the channels that one reader names, each once. Raises CometError for none or for too many."""
    distinct = list(dict.fromkeys(names))
    most = get_config().COMET.CHANNELS_PER_CLIENT
    if not distinct:
        raise CometError('Name at least one channel, as in "?channel=entry:7".')
    if len(distinct) > most:
        raise CometError(f"{len(distinct)} channels are too many at once; the most is {most}.")
    return [resolve(name) for name in distinct]


async def authorise(request: HttpRequest, matches: Iterable[Match]) -> None:
    """Asks every channel's authoriser, the sync ones together in one worker thread. Raises ChannelForbidden."""
    on_loop = [match for match in matches if match.declaration.is_async]
    in_thread = [match for match in matches if not match.declaration.is_async]
    if in_thread:
        answers = await sync_to_async(_ask)(request, in_thread)
        for match, answer in zip(in_thread, answers, strict=True):
            await _check(match, answer)
    for match in on_loop:
        await _check(match, match.ask(request))


def _ask(request: HttpRequest, matches: list[Match]) -> list[bool | Awaitable[bool]]:
    return [match.ask(request) for match in matches]


async def _check(match: Match, answer: bool | Awaitable[bool]) -> None:
    # A sync wrapper around an async function answers with a coroutine too, which is true whatever it will say.
    if not (await answer if isawaitable(answer) else answer):
        raise ChannelForbidden(f"This request may not read the channel {match.channel.name!r}.")


def waits_on_loop(authoriser: Authoriser) -> bool:
    """Whether it is a coroutine function, or an instance that is called as one; others belong into a thread."""
    return iscoroutinefunction(authoriser) or iscoroutinefunction(type(authoriser).__call__)
