from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

from tornjango.conf import CometConfig, Config, configure, get_config


def test_what_is_not_set_has_its_default() -> None:
    config = Config.from_dict({"THREADS": 3, "COMET": {"TTL": 1.5}})
    assert config == Config(THREADS=3, COMET=CometConfig(TTL=1.5))


@pytest.mark.parametrize("cls", [Config, CometConfig])
def test_every_default_is_one_that_may_be_set(cls: Any) -> None:
    for field in dataclasses.fields(cls):
        if "valid" in field.metadata:
            assert field.metadata["valid"](getattr(cls(), field.name))
            assert field.metadata["help"]


@pytest.mark.parametrize(
    "values",
    [
        None,
        "text",
        {"UNKNOWN": 1},
        {"THREADS": True},
        {"THREADS": 1.5},
        {"POOL_TIMEOUT": 0},
        {"POOL_TIMEOUT": "1"},
        {"ENGINES": {"default": "asyncpg"}},
        {"ENGINES": "momoko"},
        {"COMET": 1},
        {"COMET": {"UNKNOWN": 1}},
    ],
)
def test_what_cannot_be_is_refused(values: Any) -> None:
    with pytest.raises(ImproperlyConfigured, match="TORNJANGO"):
        Config.from_dict(values)


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().THREADS = 1  # type: ignore[misc]


def test_settings_are_read_once_until_a_test_overrides_them() -> None:
    assert get_config() is get_config()
    with override_settings(TORNJANGO={"THREADS": 3}):
        assert get_config().THREADS == 3
    assert get_config().THREADS == Config().THREADS


def test_what_the_command_line_says_goes_before_the_settings() -> None:
    try:
        with override_settings(TORNJANGO={"WORKERS": 1, "THREADS": 3}):
            config = configure(WORKERS=2)
            assert config is get_config()
            assert (config.WORKERS, config.THREADS) == (2, 3)
            with pytest.raises(ImproperlyConfigured, match="WORKERS"):
                configure(WORKERS=-1)
            assert get_config().WORKERS == 2
    finally:
        configure()
    assert get_config().WORKERS == 0
