"""What a changed file means in development: what is no code is taken in by the server, all else restarts it.

Templates are recompiled, catalogs of translations are read again; static files are looked for at every request. URL
patterns are Python. Django's ``StatReloader`` sees what changes, and not what appears or vanishes: here it does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from django.template import autoreload as django_templates
from django.utils import translation
from django.utils.autoreload import (
    StatReloader,
    autoreload_started,
    file_changed,
    trigger_reload,
)

from tornjango import routing, templates

logger = logging.getLogger("tornjango.reloader")


def install() -> None:
    """Takes the place of Django's own receiver, which empties template caches so that the next request fills them.

    For the files that appear and vanish, it comes before the autoreloader starts; a second time it does nothing.
    """
    translation.get_language()  # Django connects its receivers for catalogs when they are first needed, or too late
    file_changed.disconnect(dispatch_uid="template_loaders_file_changed")
    file_changed.connect(_changes.take, dispatch_uid="tornjango.reloader")
    autoreload_started.connect(_changes.follow, dispatch_uid="tornjango.reloader")


class Changes:
    """Takes in what has changed; many templates at once are compiled once, when the reloader has seen them all."""

    def __init__(self) -> None:
        #: Templates that were seen to change, for the end of the reloader's round; None where it has no rounds.
        self._templates: list[Path] | None = None
        #: What there was in the round before.
        self._seen: set[Path] | None = None

    def take(self, sender: Any, file_path: Path, **kwargs: Any) -> bool | None:
        """Receives ``file_changed``: True says that nothing has to restart."""
        if file_path.suffix == ".py":
            return None
        if file_path.suffix == ".mo" and routing.is_translated():
            # Django keeps what it has made of translated URL patterns, in many places.
            trigger_reload(str(file_path))
        if not templates.registry.holds(file_path):
            # Loaders that the registry cannot look into keep Django's way.
            return django_templates.template_changed(sender, file_path, **kwargs)
        if self._templates is None:
            _recompile([file_path])
        else:
            self._templates.append(file_path)
        return True

    def follow(self, sender: Any, **kwargs: Any) -> None:
        """Receives ``autoreload_started``. Other reloaders than this one are told by the system what appears."""
        if isinstance(sender, StatReloader):
            sender.snapshot_files = partial(self._snapshot, sender)  # type: ignore[method-assign]

    def _snapshot(self, reloader: StatReloader) -> Iterator[tuple[Path, float]]:
        seen = set()
        self._templates = []
        for path, mtime in StatReloader.snapshot_files(reloader):
            seen.add(path)
            yield path, mtime  # and the reloader sends `file_changed`
        before, self._seen = self._seen, seen
        for path in sorted(seen ^ before) if before is not None else ():
            if _is_watched(reloader, path):
                reloader.notify_file_changed(path)
        if self._templates:
            _recompile(self._templates)


_changes = Changes()


def _is_watched(reloader: StatReloader, path: Path) -> bool:
    """Modules that are imported later are no change."""
    folders = reloader.directory_globs
    return path.suffix != ".py" and any(folder in path.parents for folder in folders)


def _recompile(paths: list[Path]) -> None:
    templates.registry.refresh(paths[0])
    for path in paths:
        logger.info("%s changed: recompiled", path)
