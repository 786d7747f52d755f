from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.models import Group, Permission, User
from django.contrib.contenttypes.models import ContentType
from django.db import connection
from django.db.models import Prefetch, QuerySet
from django.test import override_settings
from tornado.ioloop import IOLoop

from tests.app.models import Author, Blog, Draft, Entry, Tag
from tests.database import QUERYSETS, Watcher, fill, opened, outcome, until
from tests.postgres import Postgres
from tornjango import db
from tornjango.db import pools, prefetching
from tornjango.db.compiler import AnyQuerySet

pytestmark = pytest.mark.usefixtures("database")

Fetch = Callable[[AnyQuerySet], list[Any]]


@pytest.fixture
def watcher(postgres: Postgres) -> Iterator[Watcher]:
    watcher = Watcher(postgres.dsn("tornjango"))
    yield watcher
    watcher.close()


@pytest.fixture
def fetch(io_loop: IOLoop) -> Iterator[Fetch]:
    fill()
    Group.objects.create(name="staff").permissions.set(Permission.objects.all()[:3])
    user = User.objects.create(username="ann")
    user.groups.set(Group.objects.all())
    user.user_permissions.set(Permission.objects.all()[2:5])
    pool = opened(POOL_SIZE=2)
    io_loop.run_sync(pool.__aenter__)
    yield lambda queryset: io_loop.run_sync(lambda: db.fetch(queryset))
    io_loop.run_sync(lambda: pool.__aexit__(None, None, None))


def rated() -> QuerySet[Entry]:
    return Entry.objects.filter(rating__gt=1)


PREFETCHING: dict[str, Callable[[], Any]] = {
    "nested": lambda: Blog.objects.prefetch_related("entries__authors", "entries__tag"),
    "nested three deep": lambda: Blog.objects.prefetch_related(
        "entries__authors__edited__tag", "entries__authors__entries", "entries__editor"
    ),
    "a level of its own": lambda: Blog.objects.prefetch_related(
        "entries", "entries__tag", "entries__authors"
    ),
    "twice": lambda: Entry.objects.prefetch_related("tag", "authors", "tag", "authors__edited"),
    "back again": lambda: Blog.objects.prefetch_related("entries__blog__entries__blog"),
    "to_attr": lambda: Blog.objects.prefetch_related(
        Prefetch("entries", rated(), to_attr="rated"),
        Prefetch("entries", rated().filter(title__contains="1"), to_attr="ones"),
        "rated__tag",
        "ones__authors",
        "entries__tag",
    ),
    "to_attr of one": lambda: Entry.objects.prefetch_related(
        Prefetch("editor", Author.objects.filter(name="Ann"), to_attr="ann"), "ann__edited"
    ),
    "with a queryset": lambda: Blog.objects.prefetch_related(
        Prefetch("entries", rated()), "entries__tag"
    ),
    "a queryset that prefetches": lambda: Blog.objects.prefetch_related(
        Prefetch("entries", rated().prefetch_related("tag", "authors__edited")), "entries__editor"
    ),
    "a queryset that prefetches by querysets": lambda: Blog.objects.prefetch_related(
        Prefetch(
            "entries",
            rated().prefetch_related(
                Prefetch("tag", Tag.objects.filter(slug="news"), to_attr="news"), "authors"
            ),
            to_attr="rated",
        ),
        "rated__news__entries",
    ),
    "selected already": lambda: Entry.objects.select_related("blog", "editor").prefetch_related(
        "blog__entries", "editor__edited", "editor__entries"
    ),
    "over a parent": lambda: Draft.objects.prefetch_related("authors", "tag", "blog__entries"),
    "one to one": lambda: Entry.objects.prefetch_related("draft__tag", "draft__blog", "tag"),
    "known related objects": lambda: Blog.objects.get(name="Django").entries.prefetch_related(
        "blog__entries", "tag"
    ),
    "nothing to prefetch for": lambda: Entry.objects.filter(rating=-1).prefetch_related("tag", "x"),
    "nothing found": lambda: Entry.objects.prefetch_related(
        Prefetch("tag", Tag.objects.none()), "tag__entries__nothing", "authors"
    ),
    "raw": lambda: Entry.objects.raw("select * from app_entry order by id").prefetch_related(
        "authors__edited", "tag"
    ),
    "of permissions": lambda: User.objects.prefetch_related(
        "groups__permissions__content_type", "user_permissions__content_type", "logentry_set"
    ),
    "of content types": lambda: ContentType.objects.prefetch_related("permission_set__group_set"),
    "no such lookup": lambda: Entry.objects.prefetch_related("tag", "nothing"),
    "no such lookup below": lambda: Blog.objects.prefetch_related(
        "entries__tag", "entries__nothing__more"
    ),
    "no such lookup first": lambda: Entry.objects.prefetch_related("nothing", "wrong"),
    "not a relation": lambda: Entry.objects.prefetch_related("tag", "authors", "title"),
    "not a relation below": lambda: Blog.objects.prefetch_related("entries__tag", "entries__title"),
    "a field's name": lambda: Blog.objects.prefetch_related(
        Prefetch("entries", rated(), to_attr="name"), "entries"
    ),
    "wrong SQL": lambda: Blog.objects.prefetch_related(
        Prefetch("entries", Entry.objects.extra(where=["nothing"]), to_attr="x"), "entries"
    ),
    "values": lambda: Entry.objects.values("title").prefetch_related("tag", "authors"),
}


def test_it_is_what_django_prefetches(fetch: Fetch) -> None:
    querysets = {name: it for name, it in QUERYSETS.items() if "prefetch" in name} | PREFETCHING
    for name, make in querysets.items():
        assert outcome(fetch, make) == outcome(list, make), name
    assert len(querysets) > len(PREFETCHING)


def test_a_lookup_again_with_another_queryset_is_refused_as_by_django(fetch: Fetch) -> None:
    for make in (
        lambda: Blog.objects.prefetch_related("entries", Prefetch("entries", rated())),
        lambda: Blog.objects.prefetch_related("entries__tag", Prefetch("entries", rated())),
        lambda: Blog.objects.prefetch_related(
            "entries", "entries__tag", Prefetch("entries__tag", Tag.objects.all())
        ),
    ):
        for evaluate in (list, fetch):
            with pytest.raises(ValueError, match="with a different queryset"):
                evaluate(make())


def test_it_asks_no_more_queries_than_django(
    fetch: Fetch, caplog: pytest.LogCaptureFixture
) -> None:
    def statements(evaluate: Fetch, make: Callable[[], Any]) -> list[str]:
        caplog.clear()
        outcome(evaluate, make)
        return sorted(record.sql for record in caplog.records)  # type: ignore[attr-defined]

    caplog.set_level(logging.DEBUG, logger="django.db.backends")
    with override_settings(DEBUG=True):
        for name in ("nested", "nested three deep", "twice", "to_attr", "selected already"):
            make = PREFETCHING[name]
            assert statements(fetch, make) == statements(list, make), name
    connection.queries_log.clear()


def asleep(queryset: Any) -> Any:
    return queryset.extra(where=["(select true from pg_sleep(60))"])


def sleepy() -> Any:
    """Lookups of one level that are under way until they are ended, and others below them."""
    return Blog.objects.prefetch_related(
        Prefetch("entries", asleep(Entry.objects.all()), to_attr="a"),
        Prefetch("entries", asleep(Entry.objects.all()), to_attr="b"),
        "a__tag",
        Prefetch("entries", asleep(Entry.objects.all()), to_attr="c"),
    )


@pytest.mark.gen_test
async def test_lookups_of_one_level_are_under_way_at_one_time(watcher: Watcher) -> None:
    async with opened():
        await Blog.objects.acreate(name="x")
        task = asyncio.create_task(db.fetch(sleepy()))
        await until(lambda: len(watcher.running("pg_sleep(60)")) == 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not watcher.running("pg_sleep(60)"))
        await until(lambda: pools.status()["default"]["in_use"] == 0)


@pytest.mark.gen_test
async def test_no_more_are_under_way_than_the_limit(
    watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetching, "SIDE_BY_SIDE", 2)
    async with opened():
        await Blog.objects.acreate(name="x")
        task = asyncio.create_task(db.fetch(sleepy()))
        await until(lambda: len(watcher.running("pg_sleep(60)")) == 2)
        for _ in range(20):
            await asyncio.sleep(0.005)
            assert len(watcher.running("pg_sleep(60)")) == 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.gen_test
async def test_one_connection_is_enough(watcher: Watcher) -> None:
    async with opened(POOL_SIZE=1):
        blog = await Blog.objects.acreate(name="x")
        await Entry.objects.abulk_create(Entry(blog=blog, title=str(n)) for n in range(3))
        lookups = PREFETCHING["nested three deep"]()
        results = await asyncio.gather(*(db.fetch(lookups.all()) for _ in range(10)))
        assert [
            len(it) for [it] in ([blog.entries.all() for blog in them] for them in results)
        ] == [3] * 10


@pytest.mark.gen_test
async def test_the_first_error_ends_the_lookups_after_it(watcher: Watcher) -> None:
    async with opened():
        await Blog.objects.acreate(name="x")
        with pytest.raises(AttributeError, match="Cannot find 'nothing' on Blog object"):
            await db.fetch(
                Blog.objects.prefetch_related(
                    "nothing", Prefetch("entries", asleep(Entry.objects.all()), to_attr="a")
                )
            )
        await until(lambda: not watcher.running("pg_sleep(60)"))


@pytest.mark.gen_test
async def test_in_a_transaction_lookups_are_on_its_connection() -> None:
    async with opened(), db.atomic():
        blog = await Blog.objects.acreate(name="not committed")
        entry = await Entry.objects.acreate(blog=blog, title="x")
        await entry.tag.acreate(slug="x")
        [found] = await db.fetch(Blog.objects.prefetch_related("entries__tag", "entries__authors"))
        assert pools.status()["default"]["in_use"] == 1
        assert [[tag.slug for tag in it.tag.all()] for it in found.entries.all()] == [["x"]]
