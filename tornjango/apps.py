from __future__ import annotations

from django.apps import AppConfig
from django.utils.module_loading import autodiscover_modules


class TornjangoConfig(AppConfig):
    name = "tornjango"

    def ready(self) -> None:
        from tornjango import checks  # noqa: F401  registers the system checks

        autodiscover_modules("channels")
