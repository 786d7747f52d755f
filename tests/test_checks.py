from __future__ import annotations

from typing import Any

import pytest
from django.core.checks import run_checks
from django.http import HttpRequest
from django.test import override_settings

from tornjango.checks import check_app_order, check_settings, run
from tornjango.comet import channels

STATIC = "django.contrib.staticfiles"


@pytest.fixture(autouse=True)
def _no_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of other modules of tests are none of these projects'."""
    monkeypatch.setattr(channels, "_declared", {})


def test_the_settings_of_the_tests_are_right() -> None:
    assert check_settings() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "TORNJANGO must be a dict, not list."),
        ({"THREAD": 1}, "TORNJANGO has no key 'THREAD'. It takes: ENGINES,"),
        ({"THREADS": "many"}, "TORNJANGO['THREADS'] must be a positive whole number, not 'many'."),
        (
            {"COMET": {"TTL": -1}},
            "TORNJANGO[\"COMET\"]['TTL'] must be a positive number of seconds",
        ),
    ],
)
def test_a_wrong_setting_is_an_error_with_a_hint(options: Any, message: str) -> None:
    with override_settings(TORNJANGO=options):
        (error,) = (found for found in run_checks() if found.id == "tornjango.E001")
    assert error.msg.startswith(message)
    assert "README" in str(error.hint)


@pytest.mark.parametrize(
    ("apps", "hidden"),
    [
        (["tornjango", STATIC], False),
        ([STATIC, "tornjango"], True),
        (["tornjango"], False),
        ([STATIC], False),
        ([], False),
    ],
)
def test_an_app_that_hides_our_runserver_is_a_warning(apps: list[str], hidden: bool) -> None:
    with override_settings(INSTALLED_APPS=apps):
        found = check_app_order()
    assert [message.id for message in found] == ["tornjango.W001"] * hidden


def _ids(**options: Any) -> list[str | None]:
    with override_settings(TORNJANGO=options):
        return [message.id for message in check_settings()]


def _declare_channel() -> None:
    @channels.channel("live:<int:pk>")
    async def anyone(request: HttpRequest, pk: int) -> bool:
        return True


@pytest.mark.parametrize(
    ("workers", "comet", "found"),
    [
        (0, {}, []),
        (1, {}, []),
        # The database is PostgreSQL.
        (2, {}, []),
        (2, {"BROKER": "memory"}, ["tornjango.E002"]),
        (1, {"BROKER": "memory"}, []),
        (2, {"DATABASE": "sqlite"}, ["tornjango.E002"]),
        (2, {"BROKER": "redis"}, []),
        (1, {"BROKER": "postgres", "DATABASE": "sqlite"}, ["tornjango.E007"]),
        (1, {"BROKER": "postgres", "DATABASE": "elsewhere"}, ["tornjango.E007"]),
    ],
)
def test_a_broker_that_does_not_do_for_the_channels_is_an_error(
    workers: int, comet: dict[str, Any], found: list[str]
) -> None:
    assert _ids(WORKERS=workers, COMET=comet) == []
    _declare_channel()
    assert _ids(WORKERS=workers, COMET=comet) == found


def test_a_broker_without_its_tables_or_its_package_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _declare_channel()
    with override_settings(INSTALLED_APPS=[STATIC]):
        assert _ids(COMET={"BROKER": "postgres"}) == ["tornjango.E007"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert _ids(COMET={"BROKER": "redis"}) == ["tornjango.E007"]


def test_static_files_from_nowhere_are_an_error() -> None:
    assert _ids(STATIC=True) == ["tornjango.E003"]
    with override_settings(STATIC_ROOT="/srv/static"):
        assert _ids(STATIC=True) == []


def test_metrics_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _ids(METRICS="/metrics") == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert _ids(METRICS="/metrics") == ["tornjango.E004"]


def test_metrics_of_several_workers_need_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    assert _ids(METRICS="/metrics", WORKERS=2) == ["tornjango.W002"]
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/run/metrics")
    assert _ids(METRICS="/metrics", WORKERS=2) == []


@pytest.mark.parametrize(
    "engines", [{"sqlite": "momoko"}, {"default": "psycopg"}, {"elsewhere": "threads"}]
)
def test_an_engine_that_a_database_cannot_have_is_an_error(engines: dict[str, str]) -> None:
    assert _ids(ENGINES=engines) == ["tornjango.E005"]
    assert _ids(ENGINES={"sqlite": "threads", "default": "momoko"}) == []


def test_loop_middleware_that_is_no_middleware_is_an_error() -> None:
    assert _ids(LOOP_MIDDLEWARE=["django.middleware.common.CommonMiddleware"]) == []
    assert _ids(LOOP_MIDDLEWARE=["shop.middleware.Mispelt"]) == ["tornjango.E006"]


def test_several_workers_in_development_are_a_warning() -> None:
    with override_settings(DEBUG=True):
        assert _ids(WORKERS=1) == ["tornjango.W003"]
        assert _ids(WORKERS=0) == []


def test_what_the_project_has_silenced_is_not_said() -> None:
    with override_settings(TORNJANGO={"STATIC": True}):
        assert "tornjango.E003" in [message.id for message in run()]
        with override_settings(SILENCED_SYSTEM_CHECKS=["tornjango.E003"]):
            assert "tornjango.E003" not in [message.id for message in run()]
