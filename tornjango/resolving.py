"""Django's URL resolver, with an index: of 10,000 patterns only those are tried that a path's text leaves possible.

Every pattern is matched by Django's own code, in Django's order; so an index that lets too many through is slower, and
not wrong. What is not understood (other classes of patterns, odd regular expressions) is tried at its place, always.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

from django.urls import Resolver404, ResolverMatch, URLPattern, URLResolver
from django.urls.resolvers import RegexPattern, RoutePattern
from django.utils.translation import get_language

from tornjango.shapes import ANY, UNKNOWN, Shape, is_translated, shape_of

# After text that nobody knows, the next thing known is a slash.
_UNKNOWN_TO_SLASH = re.compile(f"{ANY}[^/]*")


class Index:
    """One root resolver of Django's, and what it answers."""

    def __init__(self, resolver: URLResolver) -> None:
        """Imports every URLconf that is included. Raises what importing them raises."""
        self._resolver = resolver
        walk = _Walk()
        self._root = walk.branch(resolver)
        for branch in walk.branches.values():
            branch.plant()
        #: Whether middleware may change what a path means: by a language, or by what patterns of other classes look at.
        self.varies = walk.varies
        #: Whether there are patterns given as translated strings.
        self.translated = walk.translated

    def find(self, path: str) -> ResolverMatch | None:
        """What the resolver answers for a path in the active language; None where it has no answer."""
        found = self._root.find(path)
        return None if found is None else found.as_match(Tried(self._resolver, path))

    def resolve(self, path: Any) -> ResolverMatch:
        """Takes the place of ``URLResolver.resolve``. Raises ``Resolver404``."""
        path = str(path)  # it may be lazy
        match = self.find(path)
        if match is not None:
            return match
        begun = self._resolver.pattern.match(path)
        if not begun:
            raise Resolver404({"path": path})
        raise Resolver404({"tried": Tried(self._resolver, path), "path": begun[0]})


class Tried(Sequence[list[Any]]):
    """Django's list of the patterns tried for a path, made by Django's resolver when somebody looks at it."""

    __slots__ = ("_path", "_resolver", "_tried")

    def __init__(self, resolver: URLResolver, path: str) -> None:
        self._resolver = resolver
        self._path = path
        self._tried: list[list[Any]] | None = None

    def _list(self) -> list[list[Any]]:
        if self._tried is None:
            try:
                self._tried = URLResolver.resolve(self._resolver, self._path).tried or []
            except Resolver404 as exc:
                self._tried = exc.args[0].get("tried", [])
        return self._tried

    def __len__(self) -> int:
        return len(self._list())

    def __getitem__(self, index: Any) -> Any:
        return self._list()[index]

    def __eq__(self, other: object) -> bool:
        return self._list() == (other._list() if isinstance(other, Tried) else other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._list())


class Found:
    """What becomes a ``ResolverMatch`` once every pattern that includes the view's own has added to it."""

    __slots__ = (
        "app_names",
        "args",
        "captured",
        "extra",
        "func",
        "kwargs",
        "namespaces",
        "route",
        "url_name",
    )

    def __init__(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        url_name: str | None,
        route: str,
        captured: dict[str, Any],
        extra: dict[str, Any],
        app_names: list[str | None],
        namespaces: list[str | None],
    ) -> None:
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.url_name = url_name
        self.route = route
        self.captured = captured
        self.extra = extra
        self.app_names = app_names
        self.namespaces = namespaces

    def add(self, resolver: URLResolver, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What a resolver that includes this has captured, and what it gives to all its patterns."""
        given = resolver.default_kwargs
        if kwargs or given:
            self.kwargs = {**kwargs, **given, **self.kwargs}
        if args and not self.kwargs:
            self.args = args + self.args
        if given:
            self.extra = {**given, **self.extra}
        if resolver.app_name:
            self.app_names.insert(0, resolver.app_name)
        if resolver.namespace:
            self.namespaces.insert(0, resolver.namespace)

    def as_match(self, tried: Any) -> ResolverMatch:
        return ResolverMatch(
            self.func,
            self.args,
            self.kwargs,
            self.url_name,
            self.app_names,
            self.namespaces,
            self.route,
            tried,
            captured_kwargs=self.captured,
            extra_kwargs=self.extra,
        )


class Reach(NamedTuple):
    """All the paths that a pattern may match."""

    shapes: Sequence[Shape]
    #: Whether they are others in another language.
    translated: bool


class _Child(Protocol):
    """A pattern in a resolver's list."""

    entry: Any

    def find(self, path: str) -> Found | None: ...
    def reach(self) -> Reach:
        """In the active language."""
        ...


class Leaf:
    """``URLPattern``: a view."""

    def __init__(self, entry: URLPattern) -> None:
        self.entry = entry

    def reach(self) -> Reach:
        pattern = self.entry.pattern
        return Reach((shape_of(pattern),), is_translated(pattern))

    def find(self, path: str) -> Found | None:
        entry = self.entry
        pattern: Any = entry.pattern
        begun = pattern.match(path)
        if not begun:
            return None
        _, args, captured = begun
        extra = entry.default_args
        return Found(
            entry.callback,
            args,
            {**captured, **extra},
            pattern.name,
            str(pattern),
            captured,
            {**extra},
            [],
            [],
        )


class Foreign:
    """A class of the project's own, which answers in a way of its own."""

    def __init__(self, entry: Any) -> None:
        self.entry = entry

    def reach(self) -> Reach:
        return Reach((UNKNOWN,), False)

    def find(self, path: str) -> Found | None:
        try:
            match = self.entry.resolve(path)
        except Resolver404:
            return None
        if not match:
            return None
        return Found(
            match.func,
            match.args,
            {**match.kwargs},
            match.url_name,
            match.route,
            match.captured_kwargs,
            {**match.extra_kwargs},
            [*match.app_names],
            [*match.namespaces],
        )


class Branch:
    """``URLResolver``: patterns with something before them."""

    def __init__(self, entry: URLResolver) -> None:
        self.entry = entry
        self.children: list[_Child] = []
        self._translated = False
        # By language where that matters, else by None.
        self._trees: dict[str | None, Tree] = {}
        self._is_asked = False

    def find(self, path: str) -> Found | None:
        """As ``URLResolver.resolve``."""
        begun = self.entry.pattern.match(path)
        if not begun:
            return None
        rest, args, kwargs = begun
        for number in self._candidates(rest):
            child = self.children[number]
            found = child.find(rest)
            if found is not None:
                if not isinstance(child.entry, URLPattern):
                    found.route = _joined(str(child.entry.pattern), found.route)
                found.add(self.entry, args, kwargs)
                return found
        return None

    def _candidates(self, path: str) -> Sequence[int]:
        """The numbers of those children that may match, in their order."""
        tree = self._trees.get(get_language() if self._translated else None)
        if tree is None:
            tree = self.plant()
        return tree.find(path)

    def plant(self) -> Tree:
        """Makes the index of its children, in the active language."""
        tree, translated = Tree(), False
        own = {id(child): child.own_reach() for child in self.children if isinstance(child, Branch)}
        alike = Counter(reach.shapes[0].text for reach in own.values())
        for number, child in enumerate(self.children):
            reach = own.get(id(child))
            # What is within an include matters where others begin alike; else it is soon enough to look there then.
            if reach is None or alike[reach.shapes[0].text] > 1:
                reach = child.reach()
            for shape in reach.shapes:
                tree.add(shape, number)
            translated |= reach.translated
        self._trees[get_language() if translated else None] = tree
        self._translated = translated
        return tree

    def own_reach(self) -> Reach:
        """What its own pattern tells: a path begins so, and goes on in any way."""
        pattern = self.entry.pattern
        return Reach((Shape(shape_of(pattern).text, False, False),), is_translated(pattern))

    def reach(self) -> Reach:
        own = shape_of(self.entry.pattern)
        if not own.whole or self._is_asked:  # a URLconf may include itself
            return self.own_reach()
        self._is_asked = True
        try:
            below = [child.reach() for child in self.children]
        finally:
            self._is_asked = False
        shapes = [own.then(shape) for reach in below for shape in reach.shapes]
        translated = is_translated(self.entry.pattern) or any(reach.translated for reach in below)
        return Reach(shapes, translated)


def _joined(before: str, route: str) -> str:
    """As ``URLResolver._join_route``."""
    return before + route.removeprefix("^") if before else route


class _Walk:
    """From Django's patterns to ours. A resolver that is met again, within itself even, is the same again."""

    def __init__(self) -> None:
        self.branches: dict[int, Branch] = {}
        self.varies = False
        self.translated = False

    def branch(self, resolver: URLResolver) -> Branch:
        branch = self.branches.get(id(resolver))
        if branch is None:
            branch = self.branches[id(resolver)] = Branch(resolver)
            branch.children.extend(map(self._child, resolver.url_patterns))
        return branch

    def _child(self, entry: Any) -> _Child:
        self.varies |= not _is_fixed(entry)
        self.translated |= is_translated(getattr(entry, "pattern", None))
        if type(entry) is URLPattern:
            return Leaf(entry)
        return self.branch(entry) if type(entry) is URLResolver else Foreign(entry)


def _is_fixed(entry: Any) -> bool:
    """Whether nothing but the path decides what it matches."""
    known = type(entry) in (URLPattern, URLResolver)
    pattern = getattr(entry, "pattern", None)
    return known and type(pattern) in (RoutePattern, RegexPattern) and not is_translated(pattern)


class Tree:
    """Numbers by the shapes of paths: a tree of segments, with what is wholly known of a path's end kept in one piece.

    Most trees are small: what they do not have takes no memory.
    """

    __slots__ = ("begun", "begun_sizes", "ends", "open_sizes", "opens", "whole")

    def __init__(self) -> None:
        #: Paths that end here, by the text that is left.
        self.ends: dict[str, list[int]] | None = None
        #: By the beginning of a segment, after which nothing is known. The empty one is for any path.
        self.opens: dict[str, list[int]] | None = None
        self.open_sizes: tuple[int, ...] = ()
        #: What follows the slash after a segment.
        self.whole: dict[str, Tree] | None = None
        #: The same, by the beginning of a segment.
        self.begun: dict[str, Tree] | None = None
        self.begun_sizes: tuple[int, ...] = ()

    def add(self, shape: Shape, number: int) -> None:
        """Numbers come in their order."""
        text, tree = shape.text, self
        if ANY in text:
            text = _UNKNOWN_TO_SLASH.sub(ANY, text)
        while not (shape.exact and ANY not in text):
            segment, slash, rest = text.partition("/")
            if not slash:
                tree._add_open(segment.removesuffix(ANY), number)
                return
            tree, text = tree._after(segment), rest
        if tree.ends is None:
            tree.ends = {}
        _add_number(tree.ends, text, number)

    def _add_open(self, beginning: str, number: int) -> None:
        if self.opens is None:
            self.opens = {}
        _add_number(self.opens, beginning, number)
        self.open_sizes = _with_size(self.open_sizes, beginning)

    def _after(self, segment: str) -> Tree:
        if not segment.endswith(ANY):
            if self.whole is None:
                self.whole = {}
            return _tree_at(self.whole, segment)
        beginning = segment.removesuffix(ANY)
        self.begun_sizes = _with_size(self.begun_sizes, beginning)
        if self.begun is None:
            self.begun = {}
        return _tree_at(self.begun, beginning)

    def find(self, path: str) -> Sequence[int]:
        """The numbers whose shapes fit a path, in their order, each once."""
        found: list[list[int]] = []
        self._gather(path, found)
        if len(found) == 1:
            return found[0]
        return sorted(set(chain.from_iterable(found))) if found else ()

    def _gather(self, path: str, found: list[list[int]]) -> None:
        if self.ends is not None and (numbers := self.ends.get(path)):
            found.append(numbers)
        segment, slash, rest = path.partition("/")
        if self.opens is not None:
            for beginning in _beginnings(segment, self.open_sizes):
                if numbers := self.opens.get(beginning):
                    found.append(numbers)
        if not slash:
            return
        if self.whole is not None and (tree := self.whole.get(segment)):
            tree._gather(rest, found)
        if self.begun is not None:
            for beginning in _beginnings(segment, self.begun_sizes):
                if tree := self.begun.get(beginning):
                    tree._gather(rest, found)


def _beginnings(segment: str, sizes: tuple[int, ...]) -> list[str]:
    longest = len(segment)
    return [segment[:size] for size in sizes if size <= longest]


def _add_number(by_text: dict[str, list[int]], text: str, number: int) -> None:
    numbers = by_text.get(text)
    if numbers is None:
        by_text[text] = [number]
    elif numbers[-1] != number:
        numbers.append(number)


def _tree_at(trees: dict[str, Tree], text: str) -> Tree:
    tree = trees.get(text)
    if tree is None:
        tree = trees[text] = Tree()
    return tree


def _with_size(sizes: tuple[int, ...], beginning: str) -> tuple[int, ...]:
    size = len(beginning)
    return sizes if size in sizes else tuple(sorted((*sizes, size)))
