"""``{% load comet %}{% comet "room:7" other_channel %}``: what a page's script needs to follow channels, put into the page.

In Jinja2, make ``script`` a global of the environment: ``{{ comet(request, "room:7") }}``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from django import template
from django.http import HttpRequest
from django.template import Context
from django.urls import URLResolver, get_resolver, get_urlconf, reverse
from django.utils.html import json_script
from django.utils.safestring import SafeString, mark_safe

from tornjango import comet
from tornjango.comet import cursors, urls
from tornjango.comet.log import EPOCH_BYTES, Position
from tornjango.exceptions import BrokerUnavailable

register = template.Library()

#: Of no log: whoever comes with it is told of a gap, and fetches the state afresh.
_UNKNOWN = Position(bytes(EPOCH_BYTES), 0)


@register.simple_tag(name="comet", takes_context=True)
def comet_tag(context: Context, *channels: Any) -> SafeString:
    """As `script`, for the request that the context has: see ``django.template.context_processors.request``."""
    return script(context.get("request"), *channels)


def script(request: HttpRequest | None, *channels: Any) -> SafeString:
    """A ``<script type="application/json" data-comet>`` with ``channels``, ``cursor`` and ``urls``, from which
    ``new Comet()`` starts: one for each page, which names all its channels.

    The cursor is from when tornjango began to answer the request, before any of the view's queries. So what they have
    missed comes to the page; what was published between comes, too, though the page may show it already: it should know
    by their ids what it shows. Under another server, and without a request, it is from now: there the view takes
    ``comet.cursor(...)`` before its queries, and passes it on. While the broker is away the page's first answer will be a
    gap. There is no grant: that would ask every authoriser before the page is there, and the script's first request does.

    ``urls`` has the addresses by name (``poll``, ``sse`` and so on), wherever the URLconf includes
    ``tornjango.comet.urls``; it is empty where it does not. Raises UnknownChannel, and CometError for none or too many.
    """
    names = [str(channel) for channel in channels]
    start = {
        "channels": names,
        "cursor": _cursor(request, names),
        "urls": _addresses(getattr(request, "urlconf", None) or get_urlconf()),
    }
    element = json_script(start)  # in which the first "<" is that of the tag
    return mark_safe(element.replace("<script ", "<script data-comet ", 1))


def _cursor(request: HttpRequest | None, names: list[str]) -> str:
    try:
        return comet.cursor(*names, request=request)
    except BrokerUnavailable:
        return cursors.encode(dict.fromkeys(names, _UNKNOWN))


def _addresses(urlconf: Any) -> dict[str, str]:
    namespaces = _namespaces(get_resolver(urlconf))
    if namespaces is None:
        return {}
    names = [pattern.name for pattern in urls.urlpatterns if pattern.name]
    return {name: reverse(":".join([*namespaces, name]), urlconf) for name in names}


@lru_cache(maxsize=8)
def _namespaces(resolver: URLResolver) -> tuple[str, ...] | None:
    """Those in which the URLconf includes ``tornjango.comet.urls``; None where it does not."""
    for pattern in resolver.url_patterns:
        if not isinstance(pattern, URLResolver):
            continue
        own = (pattern.namespace,) if pattern.namespace else ()
        if pattern.url_patterns is urls.urlpatterns:
            return own
        if (inner := _namespaces(pattern)) is not None:
            return own + inner
    return None
