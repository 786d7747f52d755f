"""Every template the project can load, compiled at start; rendering then opens no file.

Before ``registry.fill()`` everything here works too, on Django's own loading.
"""

from __future__ import annotations

from tornjango.templates.problems import TemplateProblem
from tornjango.templates.registry import Registry
from tornjango.templates.rendering import querysets, render

__all__ = ["Registry", "TemplateProblem", "querysets", "registry", "render"]

registry = Registry()
