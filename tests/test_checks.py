from __future__ import annotations

from typing import Any

import pytest
from django.core.checks import run_checks
from django.test import override_settings

from tornjango.checks import check_app_order, check_settings

STATIC = "django.contrib.staticfiles"


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
