"""The URLconf, walked once at start: from Django's URL patterns to routes. No I/O, no Tornado loop."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from django.urls import ResolverMatch, URLPattern, URLResolver, get_resolver
from django.urls.resolvers import RoutePattern
from django.utils import translation
from tornado.web import RequestHandler

from tornjango.resolving import Index

#: Where a resolver of Django's keeps its index.
_INDEX = "_tornjango_index"


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
    """The routes of ``ROOT_URLCONF`` as they were at start, and the match that Django's resolver finds for a path."""

    def __init__(self) -> None:
        """Raises what importing the URLconf raises."""
        self.routes = tuple(_walk(get_resolver(), "", (), frozenset(), {}, set()))
        indexed()

    def __iter__(self) -> Iterator[Route]:
        return iter(self.routes)

    @property
    def vary(self) -> bool:
        """Whether middleware may change what a path means, by the language it sets, say."""
        return indexed().varies

    def match(self, path_info: str) -> ResolverMatch | None:
        """What Django's resolver answers for a path; None where it has no answer, or fails.

        Where languages matter the answer is that for the language in the path, as ``LocaleMiddleware`` would set it.
        """
        try:
            return self._match(path_info)
        except Exception:  # noqa: BLE001  a converter's: it fails again in Django's chain, which answers and logs it
            return None

    def _match(self, path_info: str) -> ResolverMatch | None:
        index = indexed()
        if not index.varies:
            return index.find(path_info)
        language = translation.get_language_from_path(path_info)
        with translation.override(language or translation.get_language()):
            return index.find(path_info)


def indexed(urlconf: Any = None) -> Index:
    """The index of a URLconf, by default of ``ROOT_URLCONF``; Django's own ``resolve()`` uses it from then on.

    It is made at the first call: again after ``clear_url_caches()``, without which changed patterns are not seen.
    """
    resolver = get_resolver(urlconf)
    index: Index | None = resolver.__dict__.get(_INDEX)
    if index is None:
        index = Index(resolver)
        resolver.__dict__.update({_INDEX: index, "resolve": index.resolve})
    return index


def is_translated() -> bool:
    """Whether the project's routes, where they are known by now, are others in other languages."""
    index = get_resolver().__dict__.get(_INDEX)
    return index is not None and index.translated


def _walk(
    resolver: URLResolver,
    prefix: str,
    namespaces: tuple[str, ...],
    groups: frozenset[str],
    default_args: dict[str, Any],
    within: set[int],
) -> Iterator[Route]:
    if id(resolver) in within:  # a URLconf that includes itself has no end
        return
    within.add(id(resolver))
    for entry in resolver.url_patterns:
        # A pattern that is included stands for a whole path only up to its end: "^blog/" + "^$".
        shown = prefix + _shown(entry.pattern, bool(prefix))
        named = groups | _groups(entry.pattern)
        if isinstance(entry, URLPattern):
            name = ":".join((*namespaces, entry.name)) if entry.name else ""
            yield Route(shown, name, entry.callback, named, {**default_args, **entry.default_args})
        else:
            inner = (*namespaces, entry.namespace) if entry.namespace else namespaces
            arguments = {**default_args, **entry.default_kwargs}
            yield from _walk(entry, shown, inner, named, arguments, within)
    within.discard(id(resolver))


def _groups(pattern: Any) -> frozenset[str]:
    # The regular expression of a route is compiled when it is first needed.
    if type(pattern) is RoutePattern:
        return frozenset(pattern.converters)
    return frozenset(pattern.regex.groupindex)


def _shown(pattern: Any, inside: bool) -> str:
    text = str(pattern)
    return re.sub(r"^\^", "", text) if inside else text
