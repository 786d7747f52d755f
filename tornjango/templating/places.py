"""From an exception that came out of a rendering to the place in the template, as its author wrote it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from itertools import pairwise
from types import FrameType
from typing import Any

from django.template.base import (
    UNKNOWN_SOURCE,
    FilterExpression,
    Node,
    Template,
    TokenType,
    Variable,
)
from django.template.loader_tags import BlockNode, ExtendsNode

from tornjango.exceptions import TemplateQueryError

ADVICE = (
    "Await arender() in the place of render(): it waits for queries without blocking. "
    "Or fetch it before rendering: put the QuerySet itself into the context of response.render() or arender(), add "
    "select_related() or prefetch_related() to the query behind it, or await db.fetch() in the view."
)

JINJA_TAG = re.compile(r"\{[{%].*?[%}]\}")
JINJA_FRAME = re.compile(r"\{%[-+]?\s*(extends|block)\b")

# Between the call of a template and the project's own code.
MACHINERY = ("django.template", "django.utils", "tornjango.templating", "contextlib", "jinja2")


@dataclasses.dataclass(slots=True)
class Place:
    """One step on the way to the query. ``frame`` is a step that says nothing: a block, an ``extends``."""

    template: str
    line: int | None
    text: str
    frame: bool
    node: Node | None = None

    def __str__(self) -> str:
        line = f", line {self.line}" if self.line else ""
        return f"template {self.template!r}{line}"


def explain(exc: BaseException) -> TemplateQueryError:
    """An error that says which expression of which template (or which context processor) would have queried."""
    frames = [*_frames(exc)]
    steps = [*_steps(_places(frames))]
    if not steps:
        return TemplateQueryError(f"{_caller(frames)} {_complaint()}")
    place = steps[-1]
    way = "".join(f" It is reached from {step.text} in {step}." for step in reversed(steps[:-1]))
    error = TemplateQueryError(f"{place.text} in {place} {_complaint()}{way}")
    _annotate(error, place, frames)
    return error


def innermost(frames: list[tuple[FrameType, int]]) -> Place | None:
    """The place that the code of ``frames``, outermost first, was called from; None outside of templates."""
    return next(reversed([*_steps(_places(frames))]), None)


def _complaint() -> str:
    return f"would query the database in the middle of rendering, on the event loop. {ADVICE}"


def _frames(exc: BaseException) -> Iterator[tuple[FrameType, int]]:
    step = exc.__traceback__
    while step:
        yield step.tb_frame, step.tb_lineno
        step = step.tb_next


def is_a(owner: Any, *classes: type[Any]) -> bool:
    """``isinstance``, that does not load a lazy object (``request.user``): its ``__class__`` is that of what it loads."""
    return issubclass(type(owner), classes)


def _places(frames: list[tuple[FrameType, int]]) -> list[Place]:
    places: list[Place] = []
    resolved = False
    for frame, line in frames:
        owner: Any = frame.f_locals.get("self")
        if is_a(owner, Node) and frame.f_code.co_name == "render_annotated":
            places.append(_node_place(owner))
            resolved = False
        elif is_a(owner, FilterExpression, Variable) and places and not resolved:
            # The first is the whole expression; within it, more may be resolved.
            places[-1].text = str(owner)
            resolved = True
        elif template := frame.f_globals.get("__jinja_template__"):
            places.append(_jinja_place(template, line))
    return places


def _node_place(node: Node) -> Place:
    origin = getattr(node, "origin", None)  # A tag may render a node that no template holds.
    name = getattr(origin, "template_name", None) or UNKNOWN_SOURCE
    line = node.token.lineno if node.token else None
    frame = isinstance(node, ExtendsNode | BlockNode)
    return Place(name, line, _written(node), frame, node)


def _written(node: Node) -> str:
    if sequence := getattr(node, "sequence", None):  # What {% for %} goes through.
        return str(sequence)
    if node.token is None:
        return repr(node)
    contents = node.token.contents
    return contents if node.token.token_type is TokenType.VAR else f"{{% {contents} %}}"


def _jinja_place(template: Any, line: int) -> Place:
    number = template.get_corresponding_lineno(line)
    text = _jinja_line(template, number)
    tags = " ".join(JINJA_TAG.findall(text)) or text or "Something"
    return Place(template.name or UNKNOWN_SOURCE, number, tags, bool(JINJA_FRAME.match(text)))


def _jinja_line(template: Any, number: int) -> str:
    loader = template.environment.loader
    if template.name is None or not loader.has_source_access:
        return ""
    source, *_ = loader.get_source(template.environment, template.name)
    return "".join(source.splitlines()[number - 1 : number]).strip()


def _steps(places: list[Place]) -> Iterator[Place]:
    """The innermost place of each template on the way."""
    for place, after in pairwise(places):
        if after.template != place.template and not place.frame:
            yield place
    yield from places[-1:]


def _caller(frames: list[tuple[FrameType, int]]) -> str:
    outside = [step for step in frames if not _module(step[0]).startswith(MACHINERY)]
    frame, line = (outside or frames)[0]
    name = f"{_module(frame)}.{frame.f_code.co_qualname}"
    return f"{name}, line {line}, called for a template's context,"


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def _annotate(error: TemplateQueryError, place: Place, frames: list[tuple[FrameType, int]]) -> None:
    """Lets Django's debug page show the source of the template around the place."""
    node = place.node
    # Positions are kept by engines in debug mode only.
    if node is None or node.token is None or node.token.position is None:
        return
    for frame, _ in frames:
        template = frame.f_locals.get("self")
        if isinstance(template, Template) and template.origin == node.origin:
            shown = template.get_exception_info(error, node.token)
            error.template_debug = shown  # type: ignore[attr-defined]
