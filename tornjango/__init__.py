"""Django on Tornado's event loop: nothing in the way that waits."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Loaded on first use: Django imports this package before its settings and its apps are ready.
_PUBLIC = {
    "Application": "tornjango.application",
    "DeferredResponse": "tornjango.responses",
    "deferred": "tornjango.views",
    "comet": "tornjango.comet",
    "db": "tornjango.db",
    "templates": "tornjango.templates",
}

__all__ = ["Application", "DeferredResponse", "__version__", "comet", "db", "deferred", "templates"]

if TYPE_CHECKING:
    from tornjango import comet, db, templates
    from tornjango.application import Application
    from tornjango.responses import DeferredResponse
    from tornjango.views import deferred


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    return module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
