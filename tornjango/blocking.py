"""What of Django waits for something else than a query: files, mail, caches and session stores elsewhere, hashing.

While tornjango serves, green code that calls it goes on in a worker thread for that call, by itself. Called by anybody
else it is as ever.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from django.conf import settings
from django.utils.module_loading import import_string

from tornjango import green


class Kind(NamedTuple):
    """A base class of Django's, by its name, and which methods of its subclasses block."""

    base: str
    methods: tuple[str, ...]
    #: The classes that the project has chosen, by their names: they are imported first.
    chosen: Callable[[], Iterable[str]]
    #: Classes that do not block: they compute a little, or they query.
    quick: tuple[str, ...] = ()


def _storages() -> Iterable[str]:
    return [options["BACKEND"] for options in settings.STORAGES.values()]


def _caches() -> Iterable[str]:
    return [options["BACKEND"] for options in settings.CACHES.values()]


def _mailers() -> Iterable[str]:
    """Django 6.1 has MAILERS in the place of EMAIL_BACKEND."""
    smtp = "django.core.mail.backends.smtp.EmailBackend"
    mailers = getattr(settings, "MAILERS", None)
    if mailers is not None:
        return [options.get("BACKEND", smtp) for options in mailers.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        return [smtp, settings.EMAIL_BACKEND]


def _session_stores() -> Iterable[str]:
    return [f"{settings.SESSION_ENGINE}.SessionStore"]


CACHES = Kind(
    "django.core.cache.backends.base.BaseCache",
    (
        *(
            "add",
            "clear",
            "close",
            "decr",
            "decr_version",
            "delete",
            "delete_many",
            "get",
            "get_many",
        ),
        *("has_key", "incr", "incr_version", "set", "set_many", "touch"),
    ),
    _caches,
    quick=(
        "django.core.cache.backends.base.BaseCache",
        "django.core.cache.backends.db.BaseDatabaseCache",
        "django.core.cache.backends.db.DatabaseCache",
        "django.core.cache.backends.dummy.DummyCache",
        "django.core.cache.backends.locmem.LocMemCache",
    ),
)
STORAGES = Kind(
    "django.core.files.storage.base.Storage",
    (
        *("delete", "exists", "get_accessed_time", "get_created_time", "get_modified_time"),
        *("listdir", "open", "save", "size"),
    ),
    _storages,
)
MAILERS = Kind(
    "django.core.mail.backends.base.BaseEmailBackend",
    ("open", "close", "send_messages"),
    _mailers,
    quick=(
        "django.core.mail.backends.base.BaseEmailBackend",
        "django.core.mail.backends.dummy.EmailBackend",
        "django.core.mail.backends.locmem.EmailBackend",
    ),
)
# Those that are quick query, or ask a cache, which knows for itself. What others do, a project's own, nobody can tell.
SESSION_STORES = Kind(
    "django.contrib.sessions.backends.base.SessionBase",
    ("create", "cycle_key", "delete", "exists", "flush", "load", "save"),
    _session_stores,
    quick=(
        "django.contrib.sessions.backends.base.SessionBase",
        "django.contrib.sessions.backends.cache.SessionStore",
        "django.contrib.sessions.backends.cached_db.SessionStore",
        "django.contrib.sessions.backends.db.SessionStore",
        "django.contrib.sessions.backends.signed_cookies.SessionStore",
    ),
)
KINDS = (CACHES, STORAGES, MAILERS, SESSION_STORES)


def is_quick(kind: Kind, cls: type[Any]) -> bool:
    return f"{cls.__module__}.{cls.__qualname__}" in kind.quick


def replacements() -> Iterator[tuple[Any, str, Any]]:
    """Owner, name, and what is to be there while tornjango serves."""
    for kind in KINDS:
        for name in kind.chosen():
            with contextlib.suppress(ImportError):  # Django tells of it when somebody uses it
                import_string(name)
        for cls in _with_subclasses(import_string(kind.base)):
            if not is_quick(kind, cls):
                yield from _aside(cls, kind.methods)
    yield _get_hashers()


def forget() -> None:
    """What Django has kept of what was there, or will be, is made anew."""
    from django.contrib.auth import hashers

    by_algorithm: Any = hashers.get_hashers_by_algorithm
    by_algorithm.cache_clear()


def _with_subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    seen, waiting = set(), [cls]
    while waiting:
        cls = waiting.pop()
        if cls not in seen:
            seen.add(cls)
            yield cls
            waiting += cls.__subclasses__()


def _aside(cls: type[Any], methods: Iterable[str]) -> Iterator[tuple[Any, str, Any]]:
    for name in methods:
        method = vars(cls).get(name)
        if inspect.isfunction(method):
            yield cls, name, green.blocking(method)


def _get_hashers() -> tuple[Any, str, Any]:
    """Hashing a password takes a tenth of a second on purpose."""
    from django.contrib.auth import hashers

    make: Any = getattr(hashers.get_hashers, "__wrapped__")  # noqa: B009 - not known to type checkers

    # Kept, as Django keeps its own, and like those forgotten when the setting changes.
    @functools.lru_cache
    def get_hashers() -> list[Any]:
        return [_computing_aside(hasher) for hasher in make()]

    return hashers, "get_hashers", get_hashers


def _computing_aside(hasher: Any) -> Any:
    """``hasher``, its own attributes before its class's."""
    for name in ("encode", "verify", "harden_runtime"):
        setattr(hasher, name, green.blocking(getattr(hasher, name)))
    return hasher
