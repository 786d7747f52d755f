"""What a changed file means in development: templates are recompiled in place, everything else restarts the server."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from django.template import autoreload as django_templates
from django.utils.autoreload import file_changed

from tornjango import templates

logger = logging.getLogger("tornjango.reloader")


def install() -> None:
    """Takes the place of Django's own receiver, which empties template caches so that the next request fills them."""
    file_changed.disconnect(dispatch_uid="template_loaders_file_changed")
    file_changed.connect(_changed, dispatch_uid="tornjango.reloader")


def _changed(sender: Any, file_path: Path, **kwargs: Any) -> bool | None:
    if file_path.suffix == ".py":
        return None
    if templates.registry.refresh(file_path):
        logger.info("%s changed: recompiled", file_path)
        return True
    # Loaders that the registry cannot look into keep Django's way.
    return django_templates.template_changed(sender, file_path, **kwargs)
