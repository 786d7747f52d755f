from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class TemplateProblem:
    """Something wrong with a template, found before anybody asked for the page.

    ``name`` is the template's name; ``path`` its file, or what its loader calls it. ``line`` counts from 1, and is
    None where nothing tells it.
    """

    name: str
    path: str
    line: int | None
    message: str

    def __str__(self) -> str:
        return f"{self.path}{f':{self.line}' if self.line else ''}: {self.message}"
