"""Django's ``a``-prefixed methods without a thread.

Django writes them as ``await sync_to_async(method)(...)``. While tornjango serves, the modules of `MODULES` find another
``sync_to_async`` there, one that runs the method on the loop (``tornjango.green``), where its queries do not block. Nobody
else's ``sync_to_async`` changes: what a project wraps by itself still has a thread, because it may block on anything.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, ParamSpec, TypeVar

import asgiref.sync
from asgiref.sync import AsyncToSync
from django.apps import apps

from tornjango import green

P = ParamSpec("P")
T = TypeVar("T")

Function = Callable[..., Any]


def _any(fn: Function) -> bool:
    return True


def _of_django(fn: Function) -> bool:
    """Not what a project, or a library of its, has put in the place of Django's: a login that asks LDAP, say."""
    fn = inspect.unwrap(getattr(fn, "__func__", fn))
    return (getattr(fn, "__module__", None) or "").startswith("django.")


def _receivers_of_django(fn: Function) -> bool:
    """`Signal.asend` hands all of a signal's sync receivers over together."""
    receivers = inspect.getclosurevars(fn).nonlocals.get("sync_receivers")
    return receivers is not None and all(_of_django(receiver) for receiver in receivers)


#: Modules of Django, and which of the functions that they hand to ``sync_to_async`` run green.
MODULES: dict[str, Callable[[Function], bool]] = {
    "django.db.models.base": _any,
    "django.db.models.query": _any,
    "django.db.models.fields.related_descriptors": _any,
    "django.contrib.contenttypes.fields": _any,
    "django.contrib.sessions.backends.db": _any,
    "django.core.paginator": _any,
    "django.contrib.auth.backends": _of_django,
    "django.contrib.auth.decorators": _of_django,
    "django.contrib.sessions.backends.base": _of_django,
    "django.dispatch.dispatcher": _receivers_of_django,
}

#: Modules that cannot be imported where their app is not installed.
APPS = ("django.contrib.contenttypes", "django.contrib.sessions", "django.contrib.auth")


class Replacement(NamedTuple):
    owner: Any
    name: str
    before: Any


_replaced: list[Replacement] = []


async def run(fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Sync code that does nothing that blocks but to query: on the loop in a process that tornjango serves.

    In any other, in a thread, with Django's own connection of the caller.
    """
    if _replaced and (green.current() is not None or not _for_a_thread()):
        return await green.run(fn, *args, **kwargs)
    return await asgiref.sync.sync_to_async(fn)(*args, **kwargs)


def _for_a_thread() -> bool:
    """Whether sync code in a thread waits for this, by ``async_to_sync``: its transaction is on that thread."""
    return getattr(AsyncToSync.executors, "current", None) is not None


def install() -> None:
    """Until `uninstall`, Django's own ``a``-prefixed methods run green, and ``async_to_sync`` waits in green code."""
    for name, runs_green in MODULES.items():
        module = _module(name)
        if module is not None and hasattr(module, "sync_to_async"):
            _replace(module, "sync_to_async", functools.partial(_sync_to_async, runs_green))
    _replace(AsyncToSync, "__call__", _async_to_sync(AsyncToSync.__call__))
    _keep_computing_aside()


def uninstall() -> None:
    while _replaced:
        owner, name, before = _replaced.pop()
        setattr(owner, name, before)


def _replace(owner: Any, name: str, value: Any) -> None:
    _replaced.append(Replacement(owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def _module(name: str) -> Any:
    app = next((app for app in APPS if name.startswith(app)), None)
    if app is None or apps.is_installed(app):
        return importlib.import_module(name)
    return sys.modules.get(name)


def _sync_to_async(
    runs_green: Callable[[Function], bool],
    fn: Function,
    *,
    thread_sensitive: bool = True,
    **options: Any,
) -> Callable[..., Coroutine[Any, Any, Any]]:
    if thread_sensitive and runs_green(fn):
        return functools.partial(run, fn)
    return asgiref.sync.sync_to_async(fn, thread_sensitive=thread_sensitive, **options)


def _async_to_sync(before: Function) -> Function:
    @functools.wraps(before)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if green.active():
            return green.wait(self.awaitable(*args, **kwargs))
        return before(self, *args, **kwargs)

    return call


def _keep_computing_aside() -> None:
    """Hashing a password takes a tenth of a second on purpose."""
    from django.contrib.auth import hashers

    # Kept, as Django keeps its own, and like those forgotten when the setting changes.
    @functools.lru_cache
    def get_hashers() -> list[Any]:
        return [_aside(hasher) for hasher in make()]

    make: Any = getattr(hashers.get_hashers, "__wrapped__")  # noqa: B009 - not known to type checkers
    by_algorithm: Any = hashers.get_hashers_by_algorithm
    by_algorithm.cache_clear()
    _replace(hashers, "get_hashers", get_hashers)


def _aside(hasher: Any) -> Any:
    """``hasher``, its own attributes before its class's."""
    for name in ("encode", "verify", "harden_runtime"):
        setattr(hasher, name, green.blocking(getattr(hasher, name)))
    return hasher
