"""``python -m bench.project.fill ROWS``: makes the tables, loads the blogs, and prints what the views must answer.

The answers are rendered by Django's own test client, so that no server of the benchmark is its own judge.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from typing import TYPE_CHECKING

import django

if TYPE_CHECKING:
    from django.test import Client

    from bench.load import Exchange
    from bench.project.models import Blog

BLOGS = 3000
TAGS = [f"tag-{n}" for n in range(19)] + ["sport"]
# One-row requests go through these in turn, so that nothing is measured on a single hot row.
PKS = range(1, BLOGS, BLOGS // 100)
# Other ways to one row, with the same answers: tornjango's own, and sync views.
WAYS = ("fetch", "prepared", "orm", "green")


def year_and_sport(number: int, rows: int) -> tuple[int, bool]:
    """Of 2009 there are ``rows`` blogs without the tag "sport", and as many with it."""
    if number < 2 * rows:
        return 2009, number % 2 == 1
    year = 2004 + number % 20
    return (2024 if year == 2009 else year), number % 7 == 0


def fill(rows: int) -> None:
    from bench.project.models import Blog, Tag

    tags = Tag.objects.bulk_create([Tag(slug=slug) for slug in TAGS])
    blogs, links = [], []
    for number in range(BLOGS):
        year, sport = year_and_sport(number, rows)
        blogs.append(blog(number, year))
        linked = {number % 19, number * 7 % 19} | ({19} if sport else set())
        links += [(number, tags[tag].pk) for tag in sorted(linked)]
    saved = Blog.objects.bulk_create(blogs)
    through = Tag.blogs.through
    through.objects.bulk_create(
        [through(blog_id=saved[number].pk, tag_id=tag) for number, tag in links]
    )


def blog(number: int, year: int) -> Blog:
    from bench.project.models import Blog

    start = datetime.datetime(year, 1, 1, tzinfo=datetime.UTC)
    return Blog(
        pk=number + 1,
        title=f"Entry {number + 1} & what came of it",
        slug=f"entry-{number + 1}",
        summary=f"What happened on day {number % 365}, in a sentence or two. " * 2,
        body=f"Paragraph {number}. " * 40,
        pubdate=start + datetime.timedelta(days=number % 365, seconds=number),
    )


def log_in(client: Client) -> str:
    """The cookie of somebody's session."""
    from django.contrib.auth.models import User

    user = User.objects.create_user("ann", first_name="Ann", last_name="O'Neill & Co")
    User.objects.update(date_joined=datetime.datetime(2009, 9, 9, tzinfo=datetime.UTC))
    client.force_login(user)
    return "; ".join(f"{name}={morsel.value}" for name, morsel in client.cookies.items())


def answers() -> dict[str, list[Exchange]]:
    """For each view what is asked for, with paths below the spelling's prefix, and what must come back."""
    from django.test import Client

    client = Client(HTTP_HOST="127.0.0.1")
    session = log_in(client)

    def ask(*paths: str, cookie: str = "") -> list[Exchange]:
        return [(path, cookie, client.get(f"/wsgi/{path}").content.decode()) for path in paths]

    rows = ask(*(f"row/{pk}/" for pk in PKS))
    return {
        "json": ask("json/"),
        "row": rows,
        **{
            way: [(path.replace("row", way), cookie, body) for path, cookie, body in rows]
            for way in WAYS
        },
        "twenty": ask(*(f"twenty/{pk}/" for pk in PKS)),
        "2009": ask("2009/"),
        "page": ask("page/", cookie=session),
    }


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "bench.project.settings")
    os.environ["BENCH_MIDDLEWARE"] = "default"
    django.setup()
    from django.core.management import call_command
    from django.db import connection

    call_command("migrate", run_syncdb=True, verbosity=0)
    fill(int(sys.argv[1]))
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")
    json.dump(answers(), sys.stdout)


if __name__ == "__main__":
    main()
