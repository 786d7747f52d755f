"""Every template the project can load, compiled at start; rendering then opens no file.

Before ``registry.fill()`` everything here works too, on Django's own loading. `arender` is for the event loop: what a
template queries does not block. `render` is for worker threads and green code; on the loop it queries nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from django.apps import apps
from django.conf import settings
from django.forms.renderers import get_default_renderer
from django.http import HttpRequest
from django.template import engines
from django.template.backends.base import BaseEngine
from django.template.backends.django import DjangoTemplates
from django.template.engine import Engine
from django.utils import formats, timezone, translation
from django.utils.autoreload import is_django_path
from django.utils.translation import check_for_language

from tornjango import db, green
from tornjango.db.connection import in_transaction
from tornjango.templating import files, loader
from tornjango.templating.problems import TemplateProblem
from tornjango.templating.rendering import querysets, render

__all__ = ["Registry", "TemplateProblem", "arender", "querysets", "registry", "render"]

logger = logging.getLogger("tornjango.templates")


async def arender(
    template_name: str | Sequence[str],
    context: Mapping[str, Any] | None = None,
    request: HttpRequest | None = None,
    *,
    using: str | None = None,
) -> str:
    """`render`, awaited: a template that queries while it is rendered, for a relation say, waits without blocking.

    The querysets in ``context`` are fetched first, several at once side by side. What is queried after that is one
    query after the other: in development (``DEBUG``) the log of ``tornjango.templates`` names each place, once, as a
    hint to fetch it before. Raises what `render` raises, and what the queries raise.
    """
    values = {**(context or {})}
    await _fetch([*querysets(values).values()])
    _take_known_user(request)
    return await green.run(render, template_name, values, request, using=using)


async def _fetch(querysets: list[Any]) -> None:
    if len(querysets) == 1 or in_transaction():  # it has one connection
        for queryset in querysets:
            await _fill(queryset)
    else:
        await asyncio.gather(*map(_fill, querysets))


async def _fill(queryset: Any) -> None:
    queryset._result_cache = await db.fetch(queryset)
    queryset._prefetch_done = True  # by the fetch


def _take_known_user(request: Any) -> None:
    """A view that has awaited ``request.auser()`` has its user where ``request.user`` does not look."""
    if hasattr(request, "_acached_user") and not hasattr(request, "_cached_user"):
        request._cached_user = request._acached_user


class Registry:
    """Every template of the project's backends, and of its form renderer, compiled and kept in memory.

    It keeps the backends, engines and environments of the project, their options and their ``Origin`` objects; it only
    stands in for their loaders. A loader that cannot list its templates stays at work in its place, and is named in the
    log; so is a backend that is neither Django's nor Jinja2's. Safe to use from several threads: a template is replaced
    in one step, and a rendering in progress goes on with what it holds.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._problems: list[TemplateProblem] = []

    def fill(self) -> list[TemplateProblem]:
        """Compiles all templates, and loads what Django would load at the first rendering: the catalogs and formats of
        the project's languages (of those in a LANGUAGES of its own, and of LANGUAGE_CODE), the time zone, context
        processors and the static files' storage. Reads files: call it before serving.

        Returns what is wrong. A broken template raises its own error when it is rendered, as in Django.
        """
        with self._lock:
            warnings = [*_warm()]
            self._problems = [*_compile()]
        for kind, engine in _known():
            for thing in kind.unlisted(engine):
                name = f"{type(thing).__module__}.{type(thing).__qualname__}"
                logger.warning(
                    "%s cannot list its templates: each is loaded at its first use.", name
                )
        return warnings + self._problems

    def holds(self, path: str | os.PathLike[str]) -> bool:
        """Whether a file lies in a folder of templates, Python files excepted."""
        folders = [folder for kind, engine in _known() for folder in kind.folders(engine)]
        return not os.fspath(path).endswith(".py") and files.inside(path, folders)

    def refresh(self, path: str | os.PathLike[str]) -> bool:
        """Takes in that a file has changed, appeared or vanished, and logs what is newly wrong as an error.

        True if the file lies in a folder of templates, Python files excepted: then all templates are up to date, those
        that extend or include it too, and nothing needs to restart. Reads files: not for the event loop's thread.
        """
        if not self.holds(path):
            return False
        with self._lock:
            known = set(self._problems)
            self._problems = [*_compile()]
        for problem in self._problems:
            if problem not in known:
                logger.error("%s", problem)
        return True


def _backends() -> list[BaseEngine]:
    renderer = getattr(get_default_renderer(), "engine", None)
    return engines.all() if renderer is None else [*engines.all(), renderer]


class _Strange:
    """How a backend of an unknown kind is dealt with: not at all, and it is told."""

    @staticmethod
    def install(backend: BaseEngine) -> list[TemplateProblem]:
        return []

    @staticmethod
    def folders(backend: BaseEngine) -> list[str]:
        return []

    @staticmethod
    def unlisted(backend: BaseEngine) -> list[BaseEngine]:
        return [backend]


def _known() -> Iterator[tuple[Any, Any]]:
    """Each backend's engine or environment, after what knows its kind."""
    jinja2 = sys.modules.get("jinja2")
    for backend in _backends():
        if isinstance(backend, DjangoTemplates):
            yield loader, backend.engine
        # Third parties' backends call it "env" too.
        elif jinja2 and isinstance(
            environment := getattr(backend, "env", None), jinja2.Environment
        ):
            from tornjango.templating import jinja

            yield jinja, environment
        else:
            yield _Strange, backend


def _compile() -> Iterator[TemplateProblem]:
    for kind, engine in _known():
        yield from kind.install(engine)
    yield from _unresolved([engine for kind, engine in _known() if kind is loader])


def _unresolved(django_engines: list[Engine]) -> Iterator[TemplateProblem]:
    """``extends`` and ``include`` of names that no engine has.

    A name that only another engine has is left alone: the templates of the admin's widgets, for one, are found by both
    the project's engine and the form renderer's, but include what only the latter can load. So are Django's own
    templates, which do so even where the form renderer is Jinja2's.
    """
    if any(loader.unlisted(engine) for engine in django_engines):
        return
    loaders = [each for engine in django_engines for each in loader.installed(engine)]
    for reference in (reference for each in loaders for reference in each.references()):
        if not is_django_path(reference.path) and not any(
            each.has(reference.target, skip=reference.skip) for each in loaders
        ):
            yield reference.problem()


def _warm() -> Iterator[TemplateProblem]:
    timezone.get_default_timezone()
    for language in _languages():
        yield from _attempt(f"language {language!r}", _load_language, language)
    for backend in _backends():
        yield from _attempt(f"context_processors of {backend.name!r}", _load_processors, backend)
    if apps.is_installed("django.contrib.staticfiles"):
        yield from _attempt("the static files' storage", _load_static_storage)


def _attempt(what: str, load: Callable[..., None], *args: Any) -> Iterator[TemplateProblem]:
    try:
        load(*args)
    except Exception as exc:  # noqa: BLE001 The project's own code runs here; what it raises is told to the caller.
        yield TemplateProblem("", what, None, f"{type(exc).__name__}: {exc}")


def _languages() -> list[str]:
    """The languages to load now. Django's own LANGUAGES, a hundred, stands for no choice of the project's."""
    own = settings.USE_I18N and settings.is_overridden("LANGUAGES")  # type: ignore[misc]
    chosen = [code for code, _ in settings.LANGUAGES if own and check_for_language(code)]
    return [settings.LANGUAGE_CODE, *(code for code in chosen if code != settings.LANGUAGE_CODE)]


def _load_language(language: str) -> None:
    with translation.override(language):
        translation.gettext("Yes")
        formats.get_format_modules(language)


def _load_processors(backend: Any) -> None:
    owner = getattr(backend, "engine", backend)
    if hasattr(type(owner), "template_context_processors"):
        owner.template_context_processors  # noqa: B018 A cached property.


def _load_static_storage() -> None:
    # Its module reads settings when it is imported, and is there only for projects with that app.
    from django.contrib.staticfiles.storage import staticfiles_storage

    staticfiles_storage.url  # noqa: B018 Any attribute makes the storage, which reads its manifest.


registry = Registry()
