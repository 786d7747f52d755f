"""Templates that query while they are rendered: on the loop, without blocking it, and not without being told of."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.contrib.sessions.backends.db import SessionStore
from django.template import TemplateDoesNotExist
from django.test import RequestFactory, override_settings
from django.utils.functional import SimpleLazyObject

from tests.app.models import Author, Blog, Entry
from tests.database import opened
from tests.test_asyncdjango import warm_up
from tests.test_templates import (  # noqa: F401
    Configure,
    configure,
    django_backend,
    jinja_backend,
    write,
)
from tests.threads import started_threads
from tornjango import db, green, templates
from tornjango.exceptions import TemplateQueryError
from tornjango.shortcuts import arender
from tornjango.templates import render
from tornjango.templating import hints

RELATIONS = """{% for entry in entries %}
{{ entry.title }} in {{ entry.blog.name }}
{% for author in entry.authors.all %}{{ author.name }}{% endfor %}
{% endfor %}"""


@pytest.fixture(autouse=True)
def _nothing_told() -> Iterator[None]:
    hints._told.clear()
    yield
    hints._told.clear()


@pytest.fixture
def folder(tmp_path: Path, configure: Configure) -> Path:  # noqa: F811
    configure(django_backend(DIRS=[tmp_path]))
    return tmp_path


@pytest.fixture
def entries(database: None) -> None:
    ann = Author.objects.create(name="Ann")
    for name in ("a", "b"):
        entry = Entry.objects.create(title=name, blog=Blog.objects.create(name=f"Blog {name}"))
        entry.authors.add(ann)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "tornjango.templates")
    return caplog


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage() for record in caplog.records if record.name == "tornjango.templates"
    ]


@pytest.mark.gen_test
async def test_a_template_may_traverse_relations_and_needs_no_thread(
    folder: Path, entries: None, told: Any
) -> None:
    write(folder, {"page.html": RELATIONS})
    async with opened():
        await warm_up()
        with started_threads() as names:
            page = await templates.arender("page.html", {"entries": Entry.objects.all()})
        assert page.split() == ["a", "in", "Blog", "a", "Ann", "b", "in", "Blog", "b", "Ann"]
        assert names == []
        with pytest.raises(TemplateQueryError, match=r"Await arender\(\)"):
            render("page.html", {"entries": await db.fetch(Entry.objects.all())})
    assert messages(told) == []


@pytest.mark.gen_test
async def test_in_development_each_place_is_told_of_once(
    folder: Path, entries: None, told: Any
) -> None:
    write(
        folder,
        {
            "page.html": "{% include 'list.html' %}\n{{ count }}{{ blogs.count }}",
            "list.html": RELATIONS,
        },
    )
    with override_settings(DEBUG=True):
        async with opened():
            for _ in range(2):
                entries = Entry.objects.defer("title")
                context = {"entries": entries, "blogs": Blog.objects}
                await templates.arender("page.html", context)
    assert messages(told) == [
        "entry.title in template 'list.html', line 2 queried the database while it was rendered (2 times on one page), "
        "for Entry.title. The query behind it leaves that field out.",
        "entry.blog.name in template 'list.html', line 2 queried the database while it was rendered (2 times on one "
        'page), for Entry.blog. Add select_related("blog") to the query behind it.',
        "entry.authors.all in template 'list.html', line 3 queried the database while it was rendered (2 times on one "
        "page), for Author objects of one Entry. Add prefetch_related() to the query behind it.",
        "blogs.count in template 'page.html', line 2 queried the database while it was rendered (once), "
        "for Blog objects. Put the QuerySet itself into the context.",
    ]


@pytest.mark.gen_test
async def test_what_was_fetched_before_is_not_told_of(
    folder: Path, entries: None, told: Any
) -> None:
    write(folder, {"page.html": RELATIONS})
    with override_settings(DEBUG=True):
        async with opened():
            entries = Entry.objects.select_related("blog").prefetch_related("authors")
            await templates.arender("page.html", {"entries": entries})
    assert messages(told) == []


@pytest.mark.gen_test
async def test_jinja_templates_may_query_and_are_told_of(
    tmp_path: Path,
    configure: Configure,  # noqa: F811
    entries: None,
    told: Any,
) -> None:
    write(tmp_path, {"page.html": "\n{% for e in entries %}{{ e.blog.name }} {% endfor %}"})
    configure(jinja_backend(tmp_path), DEBUG=True)
    async with opened():
        page = await templates.arender("page.html", {"entries": Entry.objects.all()})
    assert page.split() == ["Blog", "a", "Blog", "b"]
    [message] = messages(told)
    assert "template 'page.html', line 2 queried" in message
    assert "2 times on one page), for Entry.blog." in message


def logged_in(user: User, session: SessionStore) -> Any:
    from django.contrib.auth.middleware import auser, get_user

    request: Any = RequestFactory().get("/")
    request.session = SessionStore(session.session_key)
    request.user = SimpleLazyObject(lambda: get_user(request))

    async def awaits() -> Any:
        return await auser(request)

    request.auser = awaits
    return request


@pytest.mark.gen_test
async def test_the_user_is_there_and_is_the_one_that_the_view_awaited(
    folder: Path, database: None, told: Any
) -> None:
    from django.contrib.auth import alogin

    write(folder, {"page.html": "{{ request.user.username }}"})
    async with opened():
        user = await User.objects.acreate(username="ann")
        session = SessionStore()
        request = SimpleNamespace(session=session, META={}, user=None)
        await alogin(request, user, "django.contrib.auth.backends.ModelBackend")
        await session.asave()
        with override_settings(DEBUG=True):
            request = logged_in(user, session)
            assert (await arender(request, "page.html", {"request": request})).content == b"ann"
            request = logged_in(user, session)
            seen = await request.auser()
            assert (await arender(request, "page.html", {"request": request})).content == b"ann"
            assert request._cached_user is seen
    assert messages(told) == []


@pytest.mark.gen_test
async def test_what_is_rendered_in_a_transaction_shows_what_it_wrote(
    folder: Path, entries: None
) -> None:
    write(folder, {"page.html": "{% for b in blogs %}{{ b.name }}{% endfor %} {{ more|length }}"})
    async with opened(), db.atomic():
        await Blog.objects.all().aupdate(name="new")
        context = {"blogs": Blog.objects.all(), "more": Entry.objects.all()}
        assert await templates.arender("page.html", context) == "newnew 2"


@pytest.mark.gen_test
async def test_an_error_of_rendering_or_of_a_query_is_raised(folder: Path, database: None) -> None:
    write(folder, {"page.html": "{{ rows.0 }}"})
    async with opened():
        with pytest.raises(TemplateDoesNotExist):
            await templates.arender("gone.html")
        with pytest.raises(Exception, match="division by zero"):
            await templates.arender("page.html", {"rows": Blog.objects.raw("select 1/0 as id")})


def test_outside_of_tornjangos_server_the_callers_connection_is_used(
    folder: Path, database: None
) -> None:
    from asgiref.sync import async_to_sync
    from django.db import transaction

    write(folder, {"page.html": "{% for e in entries %}{{ e.blog.name }}{% endfor %}"})
    with transaction.atomic():
        Entry.objects.create(blog=Blog.objects.create(name="not committed"))
        context = {"entries": Entry.objects.all()}
        assert async_to_sync(templates.arender)("page.html", context) == "not committed"
        transaction.set_rollback(True)


@pytest.mark.gen_test
async def test_rendering_in_green_code_queries(folder: Path, entries: None) -> None:
    write(folder, {"page.html": RELATIONS})
    async with opened():
        page = await green.run(render, "page.html", {"entries": Entry.objects.all()})
    assert "Blog b" in page
