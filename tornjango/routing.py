"""The URLconf, walked once at start: from Django's URL patterns to routes. No I/O, no Tornado loop."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from django.urls import (
    LocalePrefixPattern,
    Resolver404,
    ResolverMatch,
    URLPattern,
    URLResolver,
    get_resolver,
)
from django.utils import translation
from tornado.web import RequestHandler


@dataclass(frozen=True)
class Route:
    """One URL pattern, with what stands before it in the patterns that include it."""

    pattern: str
    name: str
    callback: Callable[..., Any]
    groups: frozenset[str]
    default_args: dict[str, Any]

    @property
    def is_handler(self) -> bool:
        """Whether a Tornado handler of the project's own stands here, and not a Django view."""
        return is_handler(self.callback)


def is_handler(callback: object) -> bool:
    return isinstance(callback, type) and issubclass(callback, RequestHandler)


class Routes:
    """All routes of ``ROOT_URLCONF``, and the match that Django's resolver finds for a path."""

    def __init__(self) -> None:
        """Raises what importing the URLconf raises."""
        self._resolver: URLResolver = get_resolver()
        self.routes = tuple(_walk(self._resolver.url_patterns, "", (), frozenset(), {}))
        #: Whether a path may mean another view in another language.
        self.by_language = any(_by_language(self._resolver))

    def __iter__(self) -> Iterator[Route]:
        return iter(self.routes)

    def match(self, path_info: str) -> ResolverMatch | None:
        """What Django's resolver answers for a path; None where it has no answer.

        Where languages matter the answer is that for the language in the path, as ``LocaleMiddleware`` would set it.
        """
        try:
            if not self.by_language:
                return self._resolver.resolve(path_info)
            language = translation.get_language_from_path(path_info)
            with translation.override(language or translation.get_language()):
                return self._resolver.resolve(path_info)
        except Resolver404:
            return None


def _walk(
    patterns: list[Any],
    prefix: str,
    namespaces: tuple[str, ...],
    groups: frozenset[str],
    default_args: dict[str, Any],
) -> Iterator[Route]:
    for entry in patterns:
        # A pattern that is included stands for a whole path only up to its end: "^blog/" + "^$".
        shown = prefix + _shown(entry.pattern, bool(prefix))
        named = groups | frozenset(entry.pattern.regex.groupindex)
        if isinstance(entry, URLPattern):
            name = ":".join((*namespaces, entry.name)) if entry.name else ""
            yield Route(shown, name, entry.callback, named, {**default_args, **entry.default_args})
        else:
            inner = (*namespaces, entry.namespace) if entry.namespace else namespaces
            arguments = {**default_args, **entry.default_kwargs}
            yield from _walk(entry.url_patterns, shown, inner, named, arguments)


def _shown(pattern: Any, inside: bool) -> str:
    text = str(pattern)
    return re.sub(r"^\^", "", text) if inside else text


def _by_language(resolver: URLResolver) -> Iterator[bool]:
    """Prefixes of ``i18n_patterns``, and patterns given as lazily translated strings."""
    for entry in resolver.url_patterns:
        pattern = entry.pattern
        route = getattr(pattern, "_route", getattr(pattern, "_regex", ""))
        yield isinstance(pattern, LocalePrefixPattern) or not isinstance(route, str)
        if isinstance(entry, URLResolver):
            yield from _by_language(entry)
