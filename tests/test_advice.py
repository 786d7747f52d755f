from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.signals import request_finished, request_started
from django.http import HttpRequest, HttpResponse
from django.test import override_settings
from django.urls import path
from django.utils.decorators import sync_and_async_middleware
from django.utils.deprecation import MiddlewareMixin
from django.views import View

from tests.projects import Project
from tornjango import advice
from tornjango.advice import Advice, advise
from tornjango.comet import channels
from tornjango.conf import CometConfig, Config
from tornjango.views import green

HERE = "tests.test_advice"


def of(title: str, config: Config | None = None) -> list[Advice]:
    return next(found.advice for found in advise(config or Config()) if found.title == title)


def facts(title: str, config: Config | None = None) -> list[str]:
    return [found.fact for found in of(title, config)]


# Views


def sync(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


@green
def on_the_loop(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


async def asynchronous(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


class Both(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    def post(self, request: HttpRequest, response: Any) -> None:
        response.finish("")


urlpatterns = [
    path("a/", sync),
    path("a/again/", sync),
    path("b/", on_the_loop),
    path("c/", asynchronous),
    path("d/", Both.as_view()),
    path("e/", functools.partial(sync)),
]


@override_settings(ROOT_URLCONF=HERE)
def test_views_are_counted_and_sync_ones_named() -> None:
    count, found = of("Views", Config(THREADS=5))
    assert count == Advice("4 views: 2 sync, 1 green, 1 async, 1 deferred.")
    assert found.fact == (
        f"2 sync views hold one of 5 worker threads each while they run: {HERE}.sync, {HERE}.Both."
    )
    assert "@green" in found.do


def test_of_many_views_some_are_named() -> None:
    names = [f"v{number}" for number in range(advice.NAMES + 3)]
    assert advice._some(names).endswith(f"v{advice.NAMES - 1} and 3 more")


# Middleware


def plain(get_response: Any) -> Any:
    return get_response


@sync_and_async_middleware
def both(get_response: Any) -> Any:
    return get_response


class Before(MiddlewareMixin):
    def process_request(self, request: HttpRequest) -> None:
        pass


class After(MiddlewareMixin):
    def process_response(self, request: HttpRequest, response: HttpResponse) -> HttpResponse:
        return response


class Errors(MiddlewareMixin):
    def process_exception(self, request: HttpRequest, exception: Exception) -> None:
        pass


@pytest.mark.parametrize(
    ("name", "takes"),
    [("plain", True), ("both", False), ("Before", True), ("After", True), ("Errors", False)],
)
def test_middleware_that_takes_a_thread_is_named(name: str, takes: bool) -> None:
    with override_settings(MIDDLEWARE=[*settings.MIDDLEWARE, f"{HERE}.{name}"]):
        count, *found = of("Middleware")
    total = len(settings.MIDDLEWARE) + 1
    assert count.fact == f"{total - takes} of {total} need no thread of their own."
    assert [each.fact.partition(" ")[0] for each in found] == [f"{HERE}.{name}"] * takes
    assert all("LOOP_MIDDLEWARE" in each.do for each in found)


def test_middleware_that_the_project_has_put_on_the_loop_is_left_alone() -> None:
    with override_settings(MIDDLEWARE=[f"{HERE}.plain"]):
        found = of("Middleware", Config(LOOP_MIDDLEWARE=[f"{HERE}.plain"]))
    assert not any(each.do for each in found)


# Signals


def receiver(**kwargs: object) -> None:
    pass


async def async_receiver(**kwargs: object) -> None:
    pass


def test_sync_receivers_of_a_requests_signals_are_named() -> None:
    assert not any(each.do for each in of("Signals"))
    request_started.connect(receiver)
    request_finished.connect(async_receiver)
    try:
        (found,) = of("Signals")
    finally:
        request_started.disconnect(receiver)
        request_finished.disconnect(async_receiver)
    assert found.fact.startswith(f"{HERE}.receiver is a sync receiver of request_started")


# Databases


@contextmanager
def database(**values: Any) -> Iterator[None]:
    from django.db import connections

    before = dict(connections.settings["default"])
    connections.settings["default"].update(values)
    try:
        yield
    finally:
        connections.settings["default"].clear()
        connections.settings["default"].update(before)


def _of_default(config: Config | None = None) -> list[Advice]:
    return [each for each in of("Databases", config) if each.fact.startswith("default: ")]


def test_engines_and_why_they_are() -> None:
    found = facts("Databases", Config(ENGINES={"own": "threads"}))
    assert "default: engine momoko; queries wait on the event loop." in found
    said = (
        'own: engine threads; a query of async code takes a thread. TORNJANGO["ENGINES"] says so.'
    )
    assert said in found
    sqlite = "sqlite: engine threads; a query of async code takes a thread. The database is SQLite"
    assert any(fact.startswith(sqlite) for fact in found)


def test_a_driver_without_its_engine_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = _of_default()[0]
    assert "pip install --no-deps momoko==2.2.5.1" in found.fact
    assert found.do.startswith("Install it")


def test_a_database_whose_driver_is_missing_is_named_and_the_rest_goes_on() -> None:
    with database(ENGINE="no.such.backend"):
        found = of("Databases")
    assert any("no.such.backend" in each.fact and each.do for each in found)
    assert any(each.fact.startswith("own: engine momoko") for each in found)


def test_transactions_around_requests_are_said_to_hold_connections() -> None:
    assert not any("ATOMIC_REQUESTS" in each.fact for each in _of_default())
    with database(ATOMIC_REQUESTS=True):
        assert any("ATOMIC_REQUESTS" in each.fact and each.do for each in _of_default())


@pytest.mark.parametrize(
    ("values", "urlconf", "told"),
    [
        ({"CONN_MAX_AGE": 0}, "tests.urls", True),
        ({"CONN_MAX_AGE": 60}, "tests.urls", False),
        ({"CONN_MAX_AGE": 0}, "tests.any_path", False),
        ({"CONN_MAX_AGE": 0, "OPTIONS": {"pool": True}}, "tests.urls", False),
    ],
)
def test_threads_that_open_connections_again_and_again_are_noted(
    values: dict[str, Any], urlconf: str, told: bool
) -> None:
    with override_settings(ROOT_URLCONF=urlconf), database(**values):
        assert any("CONN_MAX_AGE is 0" in each.fact for each in _of_default()) is told


@pytest.mark.parametrize(
    ("options", "pool", "fact"),
    [
        ({}, {}, "26 connections (10 of the pool, 16 of worker threads)."),
        ({"WORKERS": 4}, {}, "104 connections (10 of the pool, 16 of worker threads, in each of 4"),
        ({"POOL_SIZE": 3}, {"pool": True}, "7 connections (3 of the pool, 4 of worker threads)."),
        ({}, {"pool": {"max_size": 20}}, "30 connections (10 of the pool, 20 of worker threads)."),
    ],
)
def test_connections_are_added_up(
    options: Any, pool: Any, fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "_declared", {})
    with database(OPTIONS=pool):
        (found,) = (e for e in _of_default(Config(**options)) if "at most" in e.fact)
    assert f"default: at most {fact}" in found.fact
    assert bool(found.do) is (options.get("WORKERS") == 4)


def test_connections_of_the_broker_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "_declared", {})
    config = Config(COMET=CometConfig(BROKER="postgres"))
    assert not any("COMET" in each.fact for each in _of_default(config))

    @channels.channel("live")
    async def anyone(request: HttpRequest) -> bool:
        return True

    (found,) = (each for each in _of_default(config) if "at most" in each.fact)
    assert (
        "33 connections (10 of the pool, 16 of worker threads, 7 of COMET's broker)" in found.fact
    )


def test_nothing_is_asked_of_a_database(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(self: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr("django.db.backends.base.base.BaseDatabaseWrapper.connect", connect)
    assert len(advise(Config())) == 6


# Back ends and templates


def test_back_ends_that_take_a_thread_are_named() -> None:
    redis = "django.core.cache.backends.redis.RedisCache"
    caches = {"default": {"BACKEND": redis, "LOCATION": "redis://127.0.0.1:1"}}
    with override_settings(CACHES=caches, SESSION_ENGINE="django.contrib.sessions.backends.cache"):
        found = facts("Back ends")
    assert f"Cache {redis}: each call takes a worker thread, for as long as it lasts." in found
    assert any(fact.startswith(f"Sessions are in a cache, {redis}") for fact in found)
    assert not any("LocMem" in fact or "Sessions are in" in fact for fact in facts("Back ends"))


def test_a_back_end_that_cannot_be_imported_is_named() -> None:
    with override_settings(SESSION_ENGINE="no.such.engine"):
        assert any(
            "Session store no.such.engine.SessionStore cannot" in f for f in facts("Back ends")
        )


def test_templates_that_do_not_compile_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.html").write_text("{% nothing %}")
    backend = "django.template.backends.django.DjangoTemplates"
    try:
        with override_settings(TEMPLATES=[{"BACKEND": backend, "DIRS": [str(tmp_path)]}]):
            (found,) = (each for each in of("Templates") if "broken.html" in each.fact)
    finally:
        assert facts("Templates") == ["All compile."]
    assert "nothing" in found.fact
    assert found.do


# The command

pytestmark = pytest.mark.slow


def test_the_command_shows_what_to_do(tmp_path: Path) -> None:
    done = Project(tmp_path, options='{"POOL_SIZE": 3}').run("-m", "tornjango", "check")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Views\n  - 4 views: 2 async, 2 sync.\n  ! 2 sync views hold" in done.stdout
    assert "\n    > Where many wait" in done.stdout
    assert done.stdout.endswith("Errors: 0. Warnings: 0. Could be better: 1.\n")


def test_the_command_fails_for_errors_where_the_app_is_not_installed(tmp_path: Path) -> None:
    project = Project(tmp_path, apps=(), options='{"STATIC": True, "LOOP_MIDDLEWARE": ["a.B"]}')
    done = project.run("-m", "tornjango", "check", "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    errors = [(each["id"], each["error"]) for each in told["checks"]]
    assert errors == [("tornjango.E003", True), ("tornjango.E006", True)]
    assert [section["title"] for section in told["sections"]][:2] == ["Views", "Middleware"]


def test_of_wrong_settings_only_that_is_said(tmp_path: Path) -> None:
    done = Project(tmp_path, options='{"THREADS": 0}').run("manage.py", "tornjango_check")
    assert done.returncode == 1
    assert "! (tornjango.E001) TORNJANGO['THREADS'] must be a positive" in done.stdout
    assert "Views" not in done.stdout
    assert "Traceback" not in done.stderr
