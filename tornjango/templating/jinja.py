"""The registry for Jinja2 environments; imported only where the project uses them."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, MutableMapping
from typing import Any

import jinja2
from jinja2 import nodes

from tornjango.templating import files
from tornjango.templating.problems import TemplateProblem

Source = tuple[str, str | None]

REFERENCES = (nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)


class Loader(jinja2.BaseLoader):
    """Answers for the environment's own loader from memory. It never changes once it is in use: Jinja2 caches by
    loader, so a new one is seen whole or not at all."""

    def __init__(self, environment: jinja2.Environment, loader: jinja2.BaseLoader) -> None:
        self.environment = environment
        self.loader = loader
        self.sources: dict[str, Source] = {}
        self.compiled: dict[str, jinja2.Template] = {}
        # Read when somebody asks for them.
        self.later: set[str] = set()

    def get_source(
        self, environment: jinja2.Environment, template: str
    ) -> tuple[str, str | None, None]:
        name = self._known(template)
        if name in self.later:
            source, path, _ = self.loader.get_source(environment, name)
            return source, path, None
        return *self.sources[name], None

    def list_templates(self) -> list[str]:
        return sorted([*self.sources, *self.later])

    def load(
        self,
        environment: jinja2.Environment,
        name: str,
        globals: MutableMapping[str, Any] | None = None,
    ) -> jinja2.Template:
        """Compiles only for another environment that shares this loader (an overlay), or what could not be compiled."""
        known = self._known(name)
        template = self.compiled.get(known)
        if template is None or environment is not self.environment:
            return super().load(environment, known, globals)
        # Jinja2 puts what get_template() was given before the environment's own.
        if isinstance(globals, ChainMap):
            template.globals.update(globals.maps[0])
        return template

    def fill(self, before: Loader | None) -> Iterator[TemplateProblem]:
        for name in self.loader.list_templates():
            if files.foreign(name, size=0):
                self.later.add(name)
                continue
            try:
                self._add(name, before)
            except jinja2.TemplateSyntaxError as exc:
                path = exc.filename or exc.name or name
                yield TemplateProblem(name, path, exc.lineno, exc.message or str(exc))
            except jinja2.TemplateNotFound:  # The file vanished just now.
                continue
            except Exception as exc:  # noqa: BLE001 An extension may raise anything; it is told to the caller.
                if name not in self.sources:
                    self.later.add(name)
                # Not of an image, say, that lies among the templates.
                if not (isinstance(exc, UnicodeDecodeError) and b"\0" in exc.object):
                    yield TemplateProblem(name, name, None, f"{type(exc).__name__}: {exc}")

    def _known(self, name: str) -> str:
        """``name`` as it was listed; "a//./b.html" is "a/b.html", as for Jinja2's own loaders."""
        if name in self.sources or name in self.later:
            return name
        plain = "/".join(part for part in name.split("/") if part not in ("", "."))
        if plain in self.sources or plain in self.later:
            return plain
        raise jinja2.TemplateNotFound(name)

    def _add(self, name: str, before: Loader | None) -> None:
        source, path, _ = self.loader.get_source(self.environment, name)
        self.sources[name] = (source, path)
        if before and before.sources.get(name) == (source, path) and name in before.compiled:
            self.compiled[name] = before.compiled[name]
        else:
            made = self.environment.make_globals(None)
            self.compiled[name] = self.loader.load(self.environment, name, made)

    def missing(self) -> Iterator[TemplateProblem]:
        """What the templates extend, include or import by a literal name, and nobody has."""
        for name in self.compiled:
            source, path = self.sources[name]
            for node in self.environment.parse(source, name, path).find_all(REFERENCES):
                target = _target(node)
                if target is not None and not self._has(self.environment.join_path(target, name)):
                    message = f"It needs the template {target!r}, and there is none."
                    yield TemplateProblem(name, path or name, node.lineno, message)

    def _has(self, name: str) -> bool:
        try:
            return bool(self._known(name))
        except jinja2.TemplateNotFound:
            return False


def _target(node: Any) -> str | None:
    if getattr(node, "ignore_missing", False) or not isinstance(node.template, nodes.Const):
        return None
    return node.template.value if isinstance(node.template.value, str) else None


def install(environment: jinja2.Environment) -> list[TemplateProblem]:
    """Compiles all that the environment's loader lists, and has the environment load from memory.

    When that was done before, what has not changed since is kept. A loader that cannot be listed is left as it is.
    """
    present = environment.loader
    if present is None or unlisted(environment):
        return []
    before = present if isinstance(present, Loader) else None
    loader = Loader(environment, before.loader if before else present)
    problems = [*loader.fill(before), *loader.missing()]
    environment.auto_reload = False  # It would ask the file system at each use.
    environment.loader = loader
    return problems


def unlisted(environment: jinja2.Environment) -> list[object]:
    """The environment's loader if it cannot list its templates."""
    try:
        if environment.loader is not None:
            environment.loader.list_templates()
    except TypeError:  # Jinja2's way to say that a loader cannot.
        return [environment.loader]
    return []


def folders(environment: jinja2.Environment) -> list[str]:
    """The folders that the environment's templates lie in, as far as its loader tells."""
    loader = environment.loader
    return [*_folders(loader.loader if isinstance(loader, Loader) else loader)]


def _folders(loader: jinja2.BaseLoader | None) -> Iterator[str]:
    if isinstance(loader, jinja2.FileSystemLoader):
        yield from loader.searchpath
    elif isinstance(loader, jinja2.PackageLoader):
        yield loader._template_root
    elif isinstance(loader, jinja2.ChoiceLoader):
        for inner in loader.loaders:
            yield from _folders(inner)
    elif isinstance(loader, jinja2.PrefixLoader):
        for inner in loader.mapping.values():
            yield from _folders(inner)
