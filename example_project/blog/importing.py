"""Entries of another blog's JSON feed. It takes a while, and tells how far it is, from wherever it runs: a view, a command."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from django.contrib.admin.views.decorators import staff_member_required
from django.db import transaction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.utils.dateparse import parse_datetime
from django.utils.html import strip_tags
from django.utils.text import slugify

from tornjango import comet

from .models import Author, Blog


class NoFeed(ValueError):
    """What was given is no JSON feed."""


@staff_member_required(login_url="login")
def page(request: HttpRequest) -> HttpResponse:
    """A plain view: it runs in a worker thread, may block there, and publishes from there."""
    if request.method != "POST":
        return render(request, "blog/import.html")
    try:
        count = import_feed(request.FILES["feed"].read() if "feed" in request.FILES else b"")
    except NoFeed as error:
        return JsonResponse({"error": str(error)}, status=422)
    return JsonResponse({"entries": count})


def import_feed(text: str | bytes) -> int:
    """How many entries are there now of those that the feed has. All of them or, where one is no entry, none."""
    items = items_of(text)
    try:
        with transaction.atomic():
            for done, item in enumerate(items, 1):
                save(item)
                # Not on commit, as usual: how far it is, is of interest before.
                if done % 10 == 0 or done == len(items):
                    comet.publish("import", {"done": done, "of": len(items)}, now=True)
    except NoFeed as error:
        comet.publish("import", {"error": str(error)})
        raise
    return len(items)


def items_of(text: str | bytes) -> list[Any]:
    try:
        items = json.loads(text)["items"]
    except (ValueError, KeyError, TypeError) as error:
        raise NoFeed("This is no JSON feed: it has no items.") from error
    if not isinstance(items, list):
        raise NoFeed("This is no JSON feed: its items are no list.")
    return items


def save(item: Any) -> None:
    try:
        title, published = item["title"], parse_datetime(item["date_published"])
        body = strip_tags(item["content_html"])
        names: Iterable[str] = [author["name"] for author in item.get("authors", [])]
    except (KeyError, TypeError, ValueError) as error:
        raise NoFeed(f"An item lacks something, or has something odd: {error!r}.") from error
    if published is None or not slugify(title):
        raise NoFeed(f"The item {title!r} has no date, or no title.")
    name = next(iter(names), "Somebody")
    author, _ = Author.objects.get_or_create(slug=slugify(name), defaults={"name": name})
    given = {"title": title[:200], "pubdate": published, "body": body, "author": author}
    summary = str(item.get("summary", ""))[:400]
    Blog.objects.update_or_create(slug=slugify(title)[:200], defaults=given | {"summary": summary})
