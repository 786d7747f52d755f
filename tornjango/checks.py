"""System checks: what is wrong in a project is said before it is a crash.

tornjango.E001  a wrong key or value in ``settings.TORNJANGO``
tornjango.W001  another app's ``runserver`` hides tornjango's
"""

from __future__ import annotations

from typing import Any

from django.apps import apps
from django.core.checks import CheckMessage, Error, Warning, register

from tornjango.conf import get_config
from tornjango.exceptions import ConfigurationError


@register
def check_settings(**kwargs: Any) -> list[CheckMessage]:
    try:
        get_config()
    except ConfigurationError as exc:
        hint = "The keys and what they take are listed in tornjango's README, under Settings."
        return [Error(str(exc), hint=hint, id="tornjango.E001")]
    return []


@register
def check_app_order(**kwargs: Any) -> list[CheckMessage]:
    """Django takes a command from the app that comes first."""
    labels = [config.name for config in apps.get_app_configs()]
    if "tornjango" not in labels:  # `tornjango serve` needs no app
        return []
    for other in ("django.contrib.staticfiles", "daphne"):
        if other in labels and labels.index(other) < labels.index("tornjango"):
            return [
                Warning(
                    f"{other!r} stands before 'tornjango' in INSTALLED_APPS, so manage.py runserver is its.",
                    hint=f"Move 'tornjango' before {other!r}.",
                    id="tornjango.W001",
                )
            ]
    return []
