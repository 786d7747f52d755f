"""Forms in async and deferred views: what validating and saving them queries does not block."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from tornjango import green

Saved = TypeVar("Saved", covariant=True)


class Validated(Protocol):
    def is_valid(self) -> bool: ...


class Savable(Protocol[Saved]):
    def save(self, *args: Any, **kwargs: Any) -> Saved: ...


async def is_valid(form: Validated) -> bool:
    """``form.is_valid()``, for a form, a ModelForm or a formset: choices from the database, unique checks and all.

    What the form's own ``clean`` methods do, they do on the event loop: they may query, and must not block otherwise.
    """
    return await green.run(form.is_valid)


async def save(form: Savable[Saved], *args: Any, **kwargs: Any) -> Saved:
    """``form.save()``, with its arguments; gives what it returns. Uploaded files are stored in a worker thread.

    What the view has to add to a ModelForm it sets on ``form.instance`` before. As in Django, many-to-many relations
    take queries of their own: ``async with db.atomic()`` makes it all or nothing.
    """
    return await green.run(form.save, *args, **kwargs)
