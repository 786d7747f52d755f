"""Django's ``a``-prefixed methods without a thread.

Django writes them as ``await sync_to_async(method)(...)``. While tornjango serves, the modules of `MODULES` find another
``sync_to_async`` there, one that runs the method on the loop (``tornjango.green``), where its queries do not block. Nobody
else's ``sync_to_async`` changes: what a project wraps by itself still has a thread, because it may block on anything.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, ParamSpec, TypeVar

import asgiref.sync
from asgiref.sync import AsyncToSync
from django.apps import apps
from django.db import connections
from django.dispatch import dispatcher
from django.utils.log import log_response

from tornjango import blocking, failures, green, knots

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


def _of_handler(fn: Function) -> bool:
    """What Django's handler does around a view: not the view, nor a project's middleware."""
    owner = getattr(fn, "__self__", None)
    if fn.__name__ == "process_exception_by_middleware":
        return all(getattr(hook, "on_loop", False) for hook in owner._exception_middleware)  # type: ignore[union-attr]
    return fn is log_response or (fn.__name__ == "render" and getattr(owner, "is_rendered", False))


def _of_quick_cache(fn: Function) -> bool:
    """Not ``get_or_set``, which may call a function of the project's for the value."""
    cache = getattr(fn, "__self__", None)
    return fn.__name__ != "get_or_set" and blocking.is_quick(blocking.CACHES, type(cache))


#: Modules of Django, and which of the functions that they hand to ``sync_to_async`` run green.
MODULES: dict[str, Callable[[Function], bool]] = {
    "django.core.handlers.base": _of_handler,
    "django.core.handlers.exception": _any,
    "django.db.models.base": _any,
    "django.db.models.query": _any,
    "django.db.models.fields.related_descriptors": _any,
    "django.contrib.contenttypes.fields": _any,
    "django.contrib.sessions.backends.db": _any,
    "django.core.cache.backends.base": _of_quick_cache,
    "django.core.paginator": _any,
    "django.contrib.auth.backends": _of_django,
    "django.contrib.auth.decorators": _of_django,
    "django.contrib.sessions.backends.base": _of_django,
}


class Twin(NamedTuple):
    """A coroutine function of Django's that would hold up the loop, and the function that does the same."""

    cls: str
    name: str
    of: str
    #: Whether it is so in this project.
    applies: Callable[[], bool] = lambda: True


def _users_are_djangos() -> bool:
    """What a project's own user does in ``check_password`` is not for the loop."""
    if not apps.is_installed("django.contrib.auth"):  # and its modules were imported all the same
        return False
    from django.contrib.auth import get_user_model

    user: Any = get_user_model()
    lookup = getattr(user._default_manager, "get_by_natural_key", None)
    checks = (getattr(user, "check_password", None), getattr(user, "acheck_password", None))
    return all(fn is not None and _of_django(fn) for fn in (lookup, *checks))


#: They hash passwords, or ask a cache, without waiting. In green code these go aside.
TWINS = (
    Twin(
        "django.contrib.auth.backends.ModelBackend",
        "aauthenticate",
        "authenticate",
        _users_are_djangos,
    ),
    Twin("django.contrib.auth.base_user.AbstractBaseUser", "acheck_password", "check_password"),
    Twin("django.contrib.auth.models.UserManager", "_acreate_user", "_create_user"),
    Twin("django.contrib.sessions.backends.cached_db.SessionStore", "aexists", "exists"),
)

#: Modules that cannot be imported where their app is not installed.
APPS = ("django.contrib.contenttypes", "django.contrib.sessions", "django.contrib.auth")


class Replacement(NamedTuple):
    owner: Any
    name: str
    before: Any


#: What is there by inheritance, or from the object's class.
_INHERITED = object()

_replaced: list[Replacement] = []


def install() -> None:
    """Until `uninstall`, Django's own ``a``-prefixed methods run green, ``async_to_sync`` waits in green code, and what
    blocks there goes aside (``tornjango.blocking``)."""
    found = [*blocking.replacements(), *failures.replacements(), *knots.replacements()]
    for name, is_known in MODULES.items():
        module = _module(name)
        if module is not None and hasattr(module, "sync_to_async"):
            _replace(module, "sync_to_async", functools.partial(_sync_to_async, is_known))
    _replace(dispatcher, "sync_to_async", _receivers_to_async)
    for twin in TWINS:
        _install_twin(twin)
    _replace(AsyncToSync, "__call__", _async_to_sync(AsyncToSync.__call__))
    for replacement in found:
        _replace(*replacement)
    blocking.forget()


def uninstall() -> None:
    while _replaced:
        owner, name, before = _replaced.pop()
        if before is _INHERITED:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
    blocking.forget()


def _replace(owner: Any, name: str, value: Any) -> None:
    _replaced.append(Replacement(owner, name, vars(owner).get(name, _INHERITED)))
    setattr(owner, name, value)


def _install_twin(twin: Twin) -> None:
    module, _, name = twin.cls.rpartition(".")
    owner = getattr(_module(module), name, None)
    # Not every release of Django has each of them.
    if owner is None or not {twin.name, twin.of} <= vars(owner).keys() or not twin.applies():
        return
    before, of = vars(owner)[twin.name], vars(owner)[twin.of]

    @functools.wraps(before)
    @green.unreported
    async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not green.is_served():
            return await before(self, *args, **kwargs)
        return await green.run(of, self, *args, **kwargs)

    _replace(owner, twin.name, call)


def _module(name: str) -> Any:
    app = next((app for app in APPS if name.startswith(app)), None)
    if app is None or apps.is_installed(app):
        return importlib.import_module(name)
    return sys.modules.get(name)


def _sync_to_async(
    is_known: Callable[[Function], bool],
    fn: Function,
    *,
    thread_sensitive: bool = True,
    **options: Any,
) -> Callable[..., Coroutine[Any, Any, Any]]:
    if is_known(fn):
        return functools.partial(green.run, fn)
    return asgiref.sync.sync_to_async(fn, thread_sensitive=thread_sensitive, **options)


def _receivers_to_async(fn: Function) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Django 5.2 calls them in a task, which the sender waits for: they are in the sender's transaction all the same."""
    if not _receivers_of_django(fn):
        return asgiref.sync.sync_to_async(fn)
    scope = green.current()
    senders = scope if scope is not None and scope.admits(asyncio.current_task()) else None

    async def call(*args: Any) -> Any:
        with green.lent(senders):
            return await green.run(fn, *args)

    return call


def _in_transaction() -> bool:
    opened = connections.all(initialized_only=True)
    return any(it.in_atomic_block or not it.autocommit for it in opened if it.connection)


def _async_to_sync(before: Function) -> Function:
    @functools.wraps(before)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if green.active():
            return green.wait(self.awaitable(*args, **kwargs))
        token = green.in_threads_transaction.set(_in_transaction())
        try:
            return before(self, *args, **kwargs)
        finally:
            green.in_threads_transaction.reset(token)

    return call
