"""What in a project costs worker threads, holds up the event loop or holds connections, and what to do about it.

Read from the settings, the URLconf and the templates: nothing here connects to a database, a cache or a mail server.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from asgiref.sync import iscoroutinefunction
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import got_request_exception, request_finished, request_started
from django.db import connections
from django.utils.deprecation import MiddlewareMixin
from django.utils.module_loading import import_string

from tornjango import blocking, templates
from tornjango.comet import brokers, channels
from tornjango.conf import Config
from tornjango.db import pools
from tornjango.green import runs_green
from tornjango.middleware import is_sync_inside
from tornjango.routing import Route, Routes
from tornjango.views import Kind, kind_of, methods_of, view_name

#: What PostgreSQL allows at one time, unless its ``max_connections`` says otherwise.
MAX_CONNECTIONS = 100

#: Those of the PostgreSQL broker in one process, when all that it does is done at once; it keeps three.
BROKER_CONNECTIONS = 7

#: Names in one piece of advice; there may be thousands of sync views.
NAMES = 10


@dataclasses.dataclass(frozen=True)
class Advice:
    """A fact of the project; with ``do``, one that costs something, and what helps."""

    fact: str
    do: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    advice: list[Advice]


def advise(config: Config) -> list[Section]:
    """Raises what importing the project's URLconf or middleware raises."""
    routes = list(Routes())
    sections: dict[str, Iterable[Advice]] = {
        "Views": _views(config, routes),
        "Middleware": _middleware(config),
        "Signals": _signals(),
        "Databases": _databases(config, routes),
        "Back ends": _back_ends(),
        "Templates": _templates(),
    }
    return [Section(title, list(advice)) for title, advice in sections.items()]


# Views


def _views(config: Config, routes: list[Route]) -> Iterator[Advice]:
    ways = {view_name(route.callback): _ways(route) for route in routes}
    count = Counter(way for found in ways.values() for way in found)
    told = ", ".join(f"{number} {way}" for way, number in count.most_common())
    yield Advice(f"{len(ways)} views: {told}." if ways else "The URLconf has no views.")
    sync = [name for name, found in ways.items() if "sync" in found]
    if sync:
        yield Advice(
            f"{len(sync)} sync views hold one of {config.THREADS} worker threads each while they run: {_some(sync)}.",
            "Where many wait at a time, make them async, or mark those that only query and render @green "
            '(TORNJANGO["SYNC_VIEWS"] = "green" does it for all).',
        )


def _ways(route: Route) -> set[str]:
    """How the view's methods are called."""
    if route.is_handler:
        return {"Tornado handler"}
    view, groups = route.callback, route.groups
    sync = "green" if runs_green(view) else "sync"
    kinds = {kind_of(method, groups) for method in methods_of(view).values()}
    kinds = kinds or {kind_of(view, groups)}
    return {sync if kind is Kind.SYNC else kind.value for kind in kinds}


# Middleware


def _middleware(config: Config) -> Iterator[Advice]:
    sync: list[str] = []
    for path in settings.MIDDLEWARE:
        if path in config.LOOP_MIDDLEWARE:
            yield Advice(f'{path} runs on the event loop, as TORNJANGO["LOOP_MIDDLEWARE"] says.')
        elif takes_thread(import_string(path)):
            sync.append(path)
    others = len(settings.MIDDLEWARE) - len(sync)
    yield Advice(f"{others} of {len(settings.MIDDLEWARE)} need no thread of their own.")
    for path in sync:
        yield Advice(
            f"{path} is sync: each request takes a worker thread for it.",
            "Give it an async form (django.utils.decorators.sync_and_async_middleware); or, if it waits for nothing "
            'but queries, name it in TORNJANGO["LOOP_MIDDLEWARE"].',
        )


def takes_thread(middleware: Any) -> bool:
    """Whether middleware is sync, or hands hooks of its own to a thread while it looks async."""
    if not getattr(middleware, "async_capable", False) or is_sync_inside(middleware):
        return True
    if not isinstance(middleware, type) or not issubclass(middleware, MiddlewareMixin):
        return False
    own = not middleware.__module__.startswith("django.")
    calls_hooks = middleware.__acall__ is MiddlewareMixin.__acall__
    hook = getattr(middleware, "process_response", None)
    return own and calls_hooks and hook is not None and not iscoroutinefunction(hook)


# Signals


def _signals() -> Iterator[Advice]:
    signals = {
        "request_started": request_started,
        "request_finished": request_finished,
        "got_request_exception": got_request_exception,
    }
    receivers = [(name, got) for name, signal in signals.items() for got in _sync_receivers(signal)]
    if not receivers:
        yield Advice("Sending those of a request takes no thread.")
    for name, receiver in receivers:
        yield Advice(
            f"{receiver} is a sync receiver of {name}: sending it takes a worker thread.",
            "Make it async def, unless it has to wait for something.",
        )


def _sync_receivers(signal: Any) -> Iterator[str]:
    for _, receiver, *_, is_async in signal.receivers:
        # Of a weak reference, what it refers to.
        receiver = receiver() if hasattr(receiver, "__callback__") else receiver
        if receiver is None or is_async:
            continue
        name = view_name(getattr(receiver, "__func__", receiver))
        if not name.startswith(("django.", "tornjango.")):
            yield name


# Databases


def _databases(config: Config, routes: list[Route]) -> Iterator[Advice]:
    threads = any("sync" in _ways(route) for route in routes) or any(
        takes_thread(import_string(path)) for path in settings.MIDDLEWARE
    )
    for alias in connections:
        try:
            engine, why = pools.choice(alias, config)
        except ImproperlyConfigured as exc:
            yield Advice(f"{alias}: {exc}", "Install the driver, or mend DATABASES.")
            continue
        yield from _engine(alias, engine, why)
        yield from _connections(alias, config, threads)


def _engine(alias: str, engine: str, why: str) -> Iterator[Advice]:
    if engine != "threads":
        yield Advice(f"{alias}: engine {engine}; queries wait on the event loop.")
    elif "install" in why:
        yield Advice(
            f"{alias}: engine threads; a query of async code takes a thread. {why}",
            "Install it, and queries wait on the event loop.",
        )
    else:
        yield Advice(
            f"{alias}: engine threads; a query of async code takes a thread. {why}".rstrip()
        )


def _connections(alias: str, config: Config, threads: bool) -> Iterator[Advice]:
    database = connections.settings[alias]
    if database["ATOMIC_REQUESTS"]:
        yield Advice(
            f"{alias}: ATOMIC_REQUESTS has each request hold a connection while its view runs, or waits.",
            "Put @transaction.non_atomic_requests on views that wait for something else, "
            "and db.atomic() around what belongs together.",
        )
    pool = database["OPTIONS"].get("pool")
    if pool:
        yield Advice(
            f'{alias}: OPTIONS["pool"] is Django\'s, for its connections in worker threads; '
            'tornjango\'s own is another (TORNJANGO["POOL_SIZE"]).'
        )
    elif threads and database["CONN_MAX_AGE"] == 0 and _is_server(database):
        yield Advice(
            f"{alias}: CONN_MAX_AGE is 0, so each call in a worker thread that queries opens a connection and closes it.",
            "Set CONN_MAX_AGE (60, say) and CONN_HEALTH_CHECKS: worker threads last, and so can their connections.",
        )
    yield from _count(alias, config, _pool_size(pool) if pool else config.THREADS, threads)


def _is_server(database: dict[str, Any]) -> bool:
    return "sqlite" not in database["ENGINE"]


def _pool_size(pool: Any) -> int:
    """psycopg_pool's: ``max_size`` is ``min_size`` unless given, and that is 4."""
    options = pool if isinstance(pool, dict) else {}
    return int(options.get("max_size") or options.get("min_size", 4))


def _count(alias: str, config: Config, in_threads: int, threads: bool) -> Iterator[Advice]:
    database = connections.settings[alias]
    if not _is_server(database):
        return
    each = config.POOL_SIZE + (in_threads if threads else 0)
    workers = max(config.WORKERS, 1)
    parts = f"{config.POOL_SIZE} of the pool" + (
        f", {in_threads} of worker threads" if threads else ""
    )
    if _has_broker(alias, config):
        each += BROKER_CONNECTIONS
        parts += f", {BROKER_CONNECTIONS} of COMET's broker"
    fact = f"{alias}: at most {each * workers} connections ({parts}"
    fact += f", in each of {workers} workers)." if workers > 1 else ")."
    if "postg" in database["ENGINE"] and each * workers >= MAX_CONNECTIONS:
        yield Advice(
            f"{fact} PostgreSQL allows {MAX_CONNECTIONS} unless its max_connections says otherwise.",
            'Lower TORNJANGO["POOL_SIZE"], ["THREADS"] or ["WORKERS"], or raise max_connections.',
        )
    else:
        yield Advice(fact)


def _has_broker(alias: str, config: Config) -> bool:
    is_here = brokers.chosen(config) == brokers.POSTGRES and alias == config.COMET.DATABASE
    return is_here and bool(channels.patterns())


# Back ends


_KINDS = {
    "Cache": blocking.CACHES,
    "File storage": blocking.STORAGES,
    "Mail": blocking.MAILERS,
    "Session store": blocking.SESSION_STORES,
}


def _back_ends() -> Iterator[Advice]:
    for title, kind in _KINDS.items():
        for name in dict.fromkeys(kind.chosen()):
            try:
                quick = blocking.is_quick(kind, import_string(name))
            except ImportError as exc:
                yield Advice(
                    f"{title} {name} cannot be imported: {exc}", "Install it, or mend the setting."
                )
                continue
            if not quick:
                yield Advice(
                    f"{title} {name}: each call takes a worker thread, for as long as it lasts."
                )
    engine = settings.SESSION_ENGINE
    if engine in (
        "django.contrib.sessions.backends.cache",
        "django.contrib.sessions.backends.cached_db",
    ):
        cache = settings.CACHES[settings.SESSION_CACHE_ALIAS]["BACKEND"]
        if not blocking.is_quick(blocking.CACHES, import_string(cache)):
            yield Advice(
                f"Sessions are in a cache, {cache}: each request that looks at its session takes a worker thread for it.",
                "Sessions in the database, or in signed cookies, need none.",
            )


# Templates


def _templates() -> Iterator[Advice]:
    problems = templates.registry.fill()
    if not problems:
        yield Advice("All compile.")
    for problem in problems:
        yield Advice(str(problem), "Mend it: the page that uses it fails.")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES])
    return f"{shown} and {len(names) - NAMES} more" if len(names) > NAMES else shown
