"""``serve``: what ``runserver`` is, without autoreload where ``DEBUG`` is off."""

from __future__ import annotations

from typing import Any

from django.conf import settings

from tornjango.management.commands.runserver import Command as RunserverCommand


class Command(RunserverCommand):
    help = "Serves this project on Tornado."

    def run(self, **options: Any) -> None:
        options["use_reloader"] = options["use_reloader"] and settings.DEBUG
        super().run(**options)
