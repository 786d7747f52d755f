"""Tags and filters that tests of templates load."""

from __future__ import annotations

from typing import Any

from django import template
from django.template.base import (
    FilterExpression,
    Node,
    NodeList,
    Parser,
    TextNode,
    Token,
    VariableNode,
)
from django.template.context import Context
from django.template.loader import get_template

register = template.Library()


@register.simple_tag
def ask(value: Any) -> str:
    return str(value)


@register.simple_tag
def count_all(model: Any) -> int:
    return int(model.objects.count())


@register.tag
def explode(parser: Parser, token: Token) -> Node:
    raise ZeroDivisionError("division by zero")


@register.tag
def paste(parser: Parser, token: Token) -> Node:
    """Loads its template when it is compiled."""
    name = token.split_contents()[1].strip("'")
    return TextNode(get_template(name).render())


class Bare(Node):
    """Renders a node that no template holds."""

    def render(self, context: Context) -> str:
        expression = FilterExpression("entries", Parser([]))
        return NodeList([VariableNode(expression)]).render(context)


@register.tag
def bare(parser: Parser, token: Token) -> Node:
    return Bare()


@register.filter
def careless(value: Any) -> str:
    try:
        return str(value.count())
    except Exception:  # noqa: BLE001 As third parties' filters do.
        return ""
