"""Tags and filters that tests of templates load."""

from __future__ import annotations

from typing import Any

from django import template
from django.template.base import Node, Parser, Token

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


@register.filter
def careless(value: Any) -> str:
    try:
        return str(value.count())
    except Exception:  # noqa: BLE001 As third parties' filters do.
        return ""
