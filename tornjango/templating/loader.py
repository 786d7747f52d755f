"""What stands in a Django engine's ``template_loaders`` once the registry is filled.

The project's own loaders stay behind it: they name the places a template may be at, in their order, and read a file
when the registry is filled. After that their ``get_contents`` too answers from memory, because Django itself calls it
through ``origin.loader`` (for the source that the debug page shows of a template partial).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import cast

from django.template import Origin, Template, TemplateDoesNotExist
from django.template.base import FilterExpression, Node
from django.template.engine import Engine
from django.template.exceptions import TemplateSyntaxError
from django.template.loader_tags import ExtendsNode, IncludeNode
from django.template.loaders import app_directories, base, cached, filesystem, locmem

from tornjango.templating import files
from tornjango.templating.problems import TemplateProblem

# Exactly these: a subclass may answer differently from one request to the next (by tenant, by theme).
LISTABLE = (filesystem.Loader, app_directories.Loader, locmem.Loader)

# Names that no walk saw: misses (the admin asks for some on every page), and odd spellings such as "a//b.html". Bounded,
# because a name may come from a URL.
REMEMBERED_NAMES = 1024

# Their base class, which they share with loaders of quite another kind, does not declare get_contents().
Listable = filesystem.Loader | locmem.Loader

Sources = Callable[[str], tuple[Origin, ...]]


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """A template extends or includes ``target``; ``skip`` is what it cannot mean: a template never extends itself."""

    name: str
    path: str
    line: int | None
    target: str
    skip: Origin | None

    def problem(self) -> TemplateProblem:
        message = f"It extends or includes {self.target!r}, and there is no such template."
        return TemplateProblem(self.name, self.path, self.line, message)


class Entry:
    """One template at one of its places, compiled; or, where that fails, compiled at each use, so that each use raises
    an error of its own, as Django's plain loading does."""

    __slots__ = ("compiled", "engine", "foreign", "origin", "read", "source")

    def __init__(
        self, engine: Engine, origin: Origin, read: Callable[[Origin], str], foreign: bool
    ) -> None:
        self.engine = engine
        self.origin = origin
        self.read = read
        self.foreign = foreign
        self.source: str | None = None
        self.compiled: Template | None = None

    def contents(self) -> str:
        return self.read(self.origin) if self.source is None else self.source

    def template(self) -> Template:
        if self.compiled is None:
            name = str(self.origin.template_name)
            self.compiled = Template(self.contents(), self.origin, name, self.engine)
        return self.compiled

    def prepare(self, before: Entry | None) -> TemplateProblem | None:
        """Reads and compiles, unless ``before``, compiled of the same source, will do."""
        if self.foreign:
            return None
        try:
            self.source = self.contents()
            if before and before.source == self.source:
                self.compiled = before.compiled
            self.template()
        except UnicodeDecodeError as exc:
            # An image, say, that lies among the templates. Loading it by name still raises this.
            return None if b"\0" in exc.object else self._problem(exc)
        except TemplateDoesNotExist:  # The file vanished just now.
            return None
        except Exception as exc:  # noqa: BLE001 A tag's compile function may raise anything; it is told to the caller.
            return self._problem(exc)
        return None

    def _problem(self, exc: Exception) -> TemplateProblem:
        token = getattr(exc, "token", None)
        message = getattr(exc, "raw_error_message", None) or str(exc)
        if not isinstance(exc, TemplateSyntaxError):
            message = f"{type(exc).__name__}: {message}"
        line = token.lineno if token else None
        return TemplateProblem(str(self.origin.template_name), self.origin.name, line, message)


class Table:
    """A filled loader's whole state, never changed once it is in use: to replace it is one assignment."""

    def __init__(self, entries: Iterable[Entry], sources: Sources) -> None:
        self.names: dict[str, tuple[Entry, ...]] = {}
        self.places: dict[tuple[int, str], Entry] = {}
        for entry in entries:
            name = str(entry.origin.template_name)
            self.names[name] = (*self.names.get(name, ()), entry)
            self.places.setdefault(_place(entry.origin), entry)
        self.sources: Sources = functools.lru_cache(REMEMBERED_NAMES)(sources)

    def find(self, name: str) -> tuple[Entry, ...]:
        """The templates of that name, in the order in which the project's loaders would be asked."""
        entries = self.names.get(name)
        if entries is not None:
            return entries
        places = (_place(origin) for origin in self.sources(name))
        return tuple(self.places[place] for place in places if place in self.places)


class Loader(cached.Loader):
    """Answers for some of the project's loaders, in their order, from memory."""

    def __init__(self, engine: Engine, loaders: Iterable[Listable]) -> None:
        super().__init__(engine, [])
        self._listable = list(loaders)
        self.loaders = [*self._listable]
        self.table = Table([], self._sources)
        self._readers = {id(loader): loader.get_contents for loader in self._listable}

    def get_template(self, template_name: str, skip: list[Origin] | None = None) -> Template:
        table = self.table
        for entry in table.find(template_name):
            if not skip or entry.origin not in skip:
                return entry.template()
        tried = [(origin, _reason(origin, skip)) for origin in table.sources(template_name)]
        raise TemplateDoesNotExist(template_name, tried=tried)

    def get_contents(self, origin: Origin) -> str:
        entry = self.table.places.get(_place(origin))
        if entry is None:
            raise TemplateDoesNotExist(origin)
        return entry.contents()

    def reset(self) -> None:
        """Reads everything again. Django's own autoreloader calls this when a template has changed."""
        self.fill()

    def fill(self) -> list[TemplateProblem]:
        """Compiles what is new or has changed since the last time, and forgets what has gone."""
        before = self.table.places
        entries = [*self._entries()]
        problems = [entry.prepare(before.get(_place(entry.origin))) for entry in entries]
        self.table = Table(entries, self._sources)
        for loader in self._listable:
            vars(loader)["get_contents"] = self.get_contents
        return [problem for problem in problems if problem]

    def has(self, name: str, *, skip: Origin | None = None) -> bool:
        return any(entry.origin != skip for entry in self.table.find(name))

    def references(self) -> Iterator[Reference]:
        """What these templates extend and include by a literal name."""
        for entry in self.table.places.values():
            if entry.compiled:
                yield from _references(entry.compiled)

    def _sources(self, template_name: str) -> tuple[Origin, ...]:
        return tuple(self.get_template_sources(template_name))

    def _entries(self) -> Iterator[Entry]:
        for loader in self._listable:
            read = self._readers[id(loader)]
            for name, path, foreign in _listed(loader):
                yield Entry(self.engine, Origin(path, name, loader), read, foreign)


def _place(origin: Origin) -> tuple[int, str]:
    return id(origin.loader), origin.name


def _reason(origin: Origin, skip: list[Origin] | None) -> str:
    skipped = skip and origin in skip
    return "Skipped to avoid recursion" if skipped else "Source does not exist"


def _listed(loader: Listable) -> Iterator[tuple[str, str, bool]]:
    """Each template of a loader: its name, what its origin is called, and whether it is foreign."""
    if isinstance(loader, filesystem.Loader):
        for folder in loader.get_dirs():
            for name, path, size in files.walk(os.fspath(folder)):
                yield name, path, files.foreign(name, size)
    else:
        yield from ((name, name, False) for name in loader.templates_dict)


def _references(template: Template) -> Iterator[Reference]:
    for node in template.nodelist.get_nodes_by_type(Node):
        if isinstance(node, ExtendsNode):
            yield from _literal(template.origin, node, node.parent_name, skip=template.origin)
        elif isinstance(node, IncludeNode):
            yield from _literal(template.origin, node, node.template, skip=None)


def _literal(
    origin: Origin, node: Node, expression: FilterExpression | Node, *, skip: Origin | None
) -> Iterator[Reference]:
    if isinstance(expression, FilterExpression) and not (expression.is_var or expression.filters):
        line = node.token.lineno if node.token else None
        name, path = str(origin.template_name), origin.name
        yield Reference(name, path, line, str(expression.var).partition("#")[0], skip)


def install(engine: Engine) -> list[TemplateProblem]:
    """Compiles all that the engine's loaders list, and has the engine load from memory.

    When that was done before, what has not changed since is kept. A loader that cannot be listed keeps its place in the
    search order, and its cache if the project gave it one.
    """
    loaders = engine.template_loaders
    if not installed(engine):
        loaders = [*_grouped(engine, _flat(engine, loaders))]
    # Until all is compiled the engine loads as before: a tag may ask for another template when it is compiled.
    problems = [
        problem for loader in loaders if isinstance(loader, Loader) for problem in loader.fill()
    ]
    engine.template_loaders = loaders
    return problems


def installed(engine: Engine) -> list[Loader]:
    return [loader for loader in engine.template_loaders if isinstance(loader, Loader)]


def _flat(engine: Engine, loaders: Iterable[base.Loader]) -> Iterator[base.Loader]:
    for loader in loaders:
        if type(loader) is not cached.Loader:
            yield loader
            continue
        for inner in _flat(engine, loader.loaders):
            yield inner if _listable(inner) else _cached(engine, inner)


def _cached(engine: Engine, loader: base.Loader) -> base.Loader:
    if type(loader) is cached.Loader:
        return loader
    wrapper = cached.Loader(engine, [])
    wrapper.loaders = [loader]
    return wrapper


def _grouped(engine: Engine, loaders: Iterable[base.Loader]) -> Iterator[base.Loader]:
    for listable, group in itertools.groupby(loaders, _listable):
        if listable:
            yield Loader(engine, cast(Iterator[Listable], group))
        else:
            yield from group


def _listable(loader: base.Loader) -> bool:
    return type(loader) in LISTABLE


def folders(engine: Engine) -> list[str]:
    """The folders that the registry has listed."""
    return [os.fspath(folder) for loader in installed(engine) for folder in loader.get_dirs()]


def unlisted(engine: Engine) -> list[base.Loader]:
    """The project's loaders that the registry could not stand in for."""
    others = [loader for loader in engine.template_loaders if not isinstance(loader, Loader)]
    return [loader.loaders[0] if type(loader) is cached.Loader else loader for loader in others]
