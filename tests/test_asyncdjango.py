from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any
from unittest import mock

import pytest
from asgiref.sync import AsyncToSync, async_to_sync, sync_to_async
from django import VERSION
from django.contrib.auth import (
    aauthenticate,
    aget_user,
    alogin,
    alogout,
    hashers,
)
from django.contrib.auth.backends import BaseBackend, ModelBackend
from django.contrib.auth.base_user import AbstractBaseUser
from django.contrib.auth.decorators import login_required, permission_required
from django.contrib.auth.hashers import MD5PasswordHasher
from django.contrib.auth.models import AnonymousUser, Permission, User
from django.contrib.contenttypes.models import ContentType
from django.contrib.sessions.backends.base import SessionBase
from django.contrib.sessions.backends.cached_db import SessionStore as CachedStore
from django.contrib.sessions.backends.db import SessionStore
from django.core import paginator
from django.core.cache import cache
from django.db import connection, transaction
from django.db.models import Func, IntegerField
from django.dispatch import Signal
from django.http import HttpRequest, HttpResponse
from django.shortcuts import aget_list_or_404, aget_object_or_404
from django.test import RequestFactory, override_settings
from django.views.debug import technical_500_response

from tests.app.models import Author, Blog, Entry, Tag
from tests.database import opened
from tests.threads import started_threads, thread_name
from tornjango import asyncdjango, db, green
from tornjango.db import pools

LOOP = threading.main_thread().name
HERE = __name__


def replaceable() -> dict[str, Any]:
    """What stands at every place that is changed while tornjango serves."""
    places = {f"{name}.sync_to_async" for name in asyncdjango.MODULES}
    places |= {f"{twin.cls}.{twin.name}" for twin in asyncdjango.TWINS}
    places |= {
        "django.contrib.auth.hashers.get_hashers",
        "django.dispatch.dispatcher.sync_to_async",
        "django.core.files.storage.base.Storage.save",
        "django.core.files.storage.filesystem.FileSystemStorage.exists",
        "django.core.cache.backends.filebased.FileBasedCache.get",
        "django.core.mail.backends.smtp.EmailBackend.send_messages",
    }
    return {place: found for place in places if (found := _at(place)) is not None} | {
        "async_to_sync": AsyncToSync.__call__
    }


def _at(place: str) -> Any:
    owner, _, name = place.rpartition(".")
    if owner in sys.modules:
        return getattr(sys.modules[owner], name, None)
    module, _, cls = owner.rpartition(".")
    return vars(getattr(importlib.import_module(module), cls)).get(name)


@pytest.mark.gen_test
async def test_what_is_changed_while_the_pools_are_open_is_as_before_afterwards() -> None:
    before = replaceable()
    async with opened():
        during = replaceable()
    changed = {place for place, found in during.items() if found is not before[place]}
    assert changed == set(before)
    assert replaceable() == before
    assert not vars(hashers.get_hashers_by_algorithm()["md5"])


@pytest.mark.gen_test
async def test_a_replaced_method_has_the_signature_of_its_own() -> None:
    """``aauthenticate()`` asks each backend's for it."""
    before = inspect.signature(ModelBackend.aauthenticate)
    async with opened():
        assert inspect.signature(ModelBackend.aauthenticate) == before
        assert await aauthenticate(HttpRequest(), token="for another backend") is None


@pytest.mark.gen_test
async def test_what_a_project_wraps_itself_runs_in_a_thread() -> None:
    async with opened():
        assert await sync_to_async(thread_name)() != LOOP
        assert await sync_to_async(thread_name, thread_sensitive=False)() != LOOP


# Without a thread


class Requests:
    """What views are given, whose session is in the database."""

    def __init__(self) -> None:
        self.request = RequestFactory().get("/")
        self.request.session = SessionStore()

        async def auser() -> Any:
            return await aget_user(self.request)

        self.request.auser = auser
        self.request.user = AnonymousUser()


async def sessions() -> None:
    store = SessionStore()
    await store.aset("count", 1)
    await store.asave()
    again = SessionStore(store.session_key)
    assert await again.aget("count") == 1
    await again.acycle_key()
    assert await again.aexists(again.session_key)
    await again.aflush()
    await SessionStore.aclear_expired()


async def cached_sessions() -> None:
    store = CachedStore()
    await store.aset("count", 1)
    await store.asave()
    assert await CachedStore(store.session_key).aget("count") == 1
    await store.aflush()


async def logging_in() -> None:
    await User.objects.acreate_user("ann", password="secret")
    request = Requests().request
    user = await aauthenticate(request, username="ann", password="secret")
    assert user is not None
    await alogin(request, user)
    await request.session.asave()
    assert await request.auser() == user
    await alogout(request)
    assert await aauthenticate(request, username="ann", password="wrong") is None
    assert await aauthenticate(request, username="bob", password="secret") is None


async def permissions() -> None:
    user = await User.objects.acreate(username="ann")
    await user.user_permissions.aadd(await Permission.objects.aget(codename="add_blog"))
    request = Requests().request
    await alogin(request, user, "django.contrib.auth.backends.ModelBackend")
    user = await User.objects.aget(pk=user.pk)
    assert await user.ahas_perm("app.add_blog")

    @login_required
    @permission_required("app.add_blog")
    async def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse("in")

    assert (await view(request)).content == b"in"


async def models() -> None:
    blog = await Blog.objects.acreate(name="a")
    blog.name = "b"
    await blog.asave()
    await blog.arefresh_from_db()
    await Blog.objects.abulk_create([Blog(name="c"), Blog(name="d")])
    assert await Blog.objects.acount() == 3
    assert [it.name async for it in Blog.objects.order_by("name")] == ["b", "c", "d"]
    assert len([it async for it in Blog.objects.aiterator(chunk_size=1)]) == 3
    assert await Blog.objects.filter(name="c").aupdate(name="e") == 1
    _, created = await Blog.objects.aget_or_create(name="f")
    assert created
    assert await Blog.objects.filter(name="f").aexists()
    await blog.adelete()
    assert (await ContentType.objects.aget(app_label="app", model="blog")).model_class() is Blog


async def relations() -> None:
    blog = await Blog.objects.acreate(name="a")
    entry = await blog.entries.acreate(title="one")
    ann, bob = await Author.objects.abulk_create([Author(name="Ann"), Author(name="Bob")])
    await entry.authors.aset([ann, bob])
    await entry.authors.aremove(bob)
    assert [author.name async for author in entry.authors.all()] == ["Ann"]
    await entry.tag.acreate(slug="x")
    await entry.tag.aclear()
    found = [it async for it in Entry.objects.prefetch_related("authors", "blog__entries")]
    assert found[0].authors.all()[0] == ann


async def shortcuts() -> None:
    await Tag.objects.acreate(slug="x")
    assert (await aget_object_or_404(Tag, slug="x")).slug == "x"
    assert len(await aget_list_or_404(Tag)) == 1


async def pages() -> None:
    await Blog.objects.abulk_create([Blog(name=str(number)) for number in range(5)])
    pages = paginator.AsyncPaginator(Blog.objects.order_by("pk"), 2)
    assert await pages.acount() == 5
    page = await pages.apage(3)
    assert len(await page.aget_object_list()) == 1
    assert [blog.name async for blog in page] == ["4"]


async def transactions() -> None:
    async with db.atomic():
        await Blog.objects.acreate(name="a")
        async with db.atomic():
            await Blog.objects.acreate(name="b")
            transaction.set_rollback(True)
    assert await Blog.objects.acount() == 1


async def signals() -> None:
    user = await User.objects.acreate(username="ann", last_login=None)
    signal = Signal()

    def update(sender: Any, **kwargs: Any) -> None: ...

    await signal.asend(sender=User)
    request = Requests().request
    await alogin(request, user, "django.contrib.auth.backends.ModelBackend")
    await user.arefresh_from_db()
    assert user.last_login is not None


async def quick_caches() -> None:
    await cache.aset("key", "value")
    assert await cache.aget("key") == "value"
    await cache.adelete("key")
    assert await cache.ahas_key("key") is False


async def warm_up() -> None:
    """Connecting looks up host names, in threads."""
    await asyncio.gather(*(db.fetch(Blog.objects.all()) for _ in range(3)))
    async with db.atomic():
        await Blog.objects.acount()


WORK: list[Callable[[], Coroutine[Any, Any, None]]] = [
    sessions,
    cached_sessions,
    permissions,
    models,
    relations,
    shortcuts,
    transactions,
    signals,
    quick_caches,
]
if hasattr(paginator, "AsyncPaginator"):  # Django 6.0
    WORK.append(pages)


@pytest.mark.gen_test
@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
async def test_djangos_async_methods_need_no_thread(database: None, work: Any) -> None:
    cache.clear()
    async with opened():
        await warm_up()
        with started_threads() as names:
            await work()
        assert names == []


# Hashing


class Tell(MD5PasswordHasher):
    """Notes the threads that it computes in."""

    algorithm = "tell"
    threads: list[str] = []

    def encode(self, password: str, salt: str) -> str:
        self.threads.append(thread_name())
        return super().encode(password, salt)


@pytest.mark.gen_test
@override_settings(PASSWORD_HASHERS=[f"{HERE}.Tell"])
async def test_no_password_is_hashed_on_the_loop(database: None) -> None:
    Tell.threads.clear()
    async with opened():
        await logging_in()
        user = await green.run(User.objects.create_user, "cid", None, "secret")
        assert await green.run(user.check_password, "secret")
        assert await user.acheck_password("secret")
    # Made; right; wrong; of nobody; and the three of Cid.
    assert len(Tell.threads) >= 7
    assert LOOP not in Tell.threads


@pytest.mark.gen_test
@override_settings(
    PASSWORD_HASHERS=[f"{HERE}.Tell", "django.contrib.auth.hashers.MD5PasswordHasher"]
)
async def test_an_old_hash_is_renewed_at_a_login(database: None) -> None:
    user = User(username="ann", password=hashers.make_password("secret", hasher="md5"))
    async with opened():
        await user.asave()
        Tell.threads.clear()
        assert await aauthenticate(HttpRequest(), username="ann", password="secret") == user
        await user.arefresh_from_db()
        assert user.password.startswith("tell$")
    assert LOOP not in Tell.threads


# What others have put in Django's place


class Elsewhere(BaseBackend):
    """Asks somebody over the network."""

    threads: list[str] = []

    def authenticate(self, request: Any, **credentials: Any) -> None:
        self.threads.append(thread_name())

    def get_user(self, user_id: Any) -> None:
        self.threads.append(thread_name())


class Store(SessionBase):
    threads: list[str] = []

    def load(self) -> dict[str, Any]:
        self.threads.append(thread_name())
        return {}

    def exists(self, session_key: str) -> bool:
        self.threads.append(thread_name())
        return False

    def save(self, must_create: bool = False) -> None:
        self.threads.append(thread_name())


@pytest.mark.gen_test
@override_settings(AUTHENTICATION_BACKENDS=[f"{HERE}.Elsewhere"])
async def test_others_auth_backends_run_in_threads(database: None) -> None:
    Elsewhere.threads.clear()
    async with opened():
        assert await aauthenticate(HttpRequest(), username="ann", password="x") is None
        assert await Elsewhere().aget_user(1) is None
    assert len(Elsewhere.threads) == 2
    assert LOOP not in Elsewhere.threads


@pytest.mark.gen_test
async def test_others_session_stores_run_in_threads() -> None:
    Store.threads.clear()
    async with opened():
        store = Store()
        await store.aset("a", 1)
        await store.asave()
        await store.aexists("x")
        assert await green.run(Store("a-good-key").get, "a") is None
        await green.run(store.save)
    assert len(Store.threads) == 4
    assert LOOP not in Store.threads


@pytest.mark.gen_test
async def test_a_projects_own_user_checks_passwords_its_own_way(
    database: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asks_a_server(user: User, password: str) -> bool:
        raise AssertionError("called on the loop")

    async def asks_without_waiting(user: User, password: str) -> bool:
        return password == "right"

    monkeypatch.setattr(User, "check_password", asks_a_server)
    monkeypatch.setattr(User, "acheck_password", asks_without_waiting)
    async with opened():
        user = await User.objects.acreate(username="ann")
        assert await aauthenticate(HttpRequest(), username="ann", password="right") == user
        assert await aauthenticate(HttpRequest(), username="ann", password="wrong") is None


@pytest.mark.gen_test
async def test_receivers_of_others_are_called_in_a_thread() -> None:
    signal, threads = Signal(), []

    def receiver(**kwargs: Any) -> None:
        threads.append(thread_name())

    signal.connect(receiver)
    async with opened():
        await signal.asend(sender=None)
    assert threads
    assert LOOP not in threads


# Made, so that it is not in the lines of code that a report shows.
SECRET = "".join(reversed("drowssapym"))


@pytest.mark.gen_test
async def test_an_error_report_shows_no_password(
    database: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, user: object) -> None:
        raise TypeError("at a login")

    monkeypatch.setattr(ModelBackend, "user_can_authenticate", fail)
    async with opened():
        await User.objects.acreate_user("ann", password=SECRET)
        try:
            await aauthenticate(HttpRequest(), username="ann", password=SECRET)
        except TypeError:
            report = technical_500_response(
                RequestFactory().get("/"), *sys.exc_info()
            ).content.decode()
    assert "at a login" in report
    assert "_drive" in report
    # Django 5.2 itself shows it in this one.
    shown = [frame for frame in report.split('class="frame') if SECRET in frame]
    assert all("django/contrib/auth/backends.py</code>" in frame for frame in shown)
    assert VERSION < (6, 0) or not shown


@pytest.mark.gen_test
async def test_djangos_receivers_are_in_the_senders_transaction(database: None) -> None:
    async with opened(), db.atomic():
        user = await User.objects.acreate(username="ann", last_login=None)
        await alogin(Requests().request, user, "django.contrib.auth.backends.ModelBackend")
        await user.arefresh_from_db()
        assert user.last_login is not None
        assert await asyncio.gather(user.arefresh_from_db(), return_exceptions=True) != [None]


# Between sync and async


@pytest.mark.gen_test
async def test_async_to_sync_waits_in_green_code(database: None) -> None:
    async def counts() -> int:
        await Blog.objects.acreate(name="a")
        return await Blog.objects.acount()

    def code() -> tuple[int, str]:
        with transaction.atomic():
            counted = async_to_sync(counts)()
            transaction.set_rollback(True)
        return counted, thread_name()

    async with opened():
        assert await green.run(code) == (1, LOOP)
        assert await Blog.objects.acount() == 0


@pytest.mark.gen_test
async def test_async_code_that_a_thread_waits_for_is_in_its_transaction(database: None) -> None:
    prepared = db.prepare(lambda name: Blog.objects.filter(name=name))
    committed: list[str] = []

    async def counts() -> list[int]:
        async with db.atomic():
            transaction.on_commit(lambda: committed.append("too early"))
            return [
                await Blog.objects.acount(),
                len([blog async for blog in Blog.objects.all()]),
                len(await db.fetch(Blog.objects.all())),
                len(await db.query("select * from app_blog")),
                await prepared.count(name="not committed"),
                len([blog async for blog in db.stream(Blog.objects.all())]),
            ]

    def view() -> list[int]:
        with transaction.atomic():
            Blog.objects.create(name="not committed")
            seen = async_to_sync(counts)()
            assert connection.in_atomic_block
            transaction.set_rollback(True)
        return seen

    async with opened():
        assert await sync_to_async(view)() == [1] * 6
        assert await Blog.objects.acount() == 0
    assert committed == []


@pytest.mark.gen_test
async def test_async_code_that_a_thread_waits_for_uses_the_pool_outside_a_transaction(
    database: None,
) -> None:
    async def backend() -> int:
        [(pid,)] = await db.query("select pg_backend_pid()")
        found = await Blog.objects.annotate(
            pid=Func(function="pg_backend_pid", output_field=IntegerField())
        ).afirst()
        assert found is not None
        assert pools.status()["default"]["free"] == 1
        return int(pid)

    def view() -> tuple[int, int]:
        Blog.objects.create(name="x")
        with connection.cursor() as cursor:
            cursor.execute("select pg_backend_pid()")
            own = cursor.fetchone()[0]
        return own, async_to_sync(backend)()

    async with opened():
        own, others = await sync_to_async(view)()
        assert own != others


@pytest.mark.gen_test
async def test_an_async_transaction_that_a_thread_waits_for_is_whole(database: None) -> None:
    """Under sync-only middleware every view is one that a thread waits for."""

    async def view() -> int:
        async with db.atomic():
            await Blog.objects.acreate(name="a")
            await db.query("insert into app_blog (name) values ('b')")
            seen = len(await db.fetch(Blog.objects.all()))
            transaction.set_rollback(True)
        return seen

    async with opened():
        assert await sync_to_async(async_to_sync(view))() == 2
        assert await Blog.objects.acount() == 0


@pytest.mark.gen_test
async def test_on_a_loop_that_is_not_served_djangos_own_coroutines_run() -> None:
    user = User(password=hashers.make_password("right", hasher="md5"))
    with mock.patch.object(AbstractBaseUser, "check_password", side_effect=AssertionError):
        asyncdjango.install()
        try:
            assert await user.acheck_password("right")
        finally:
            asyncdjango.uninstall()


def test_a_project_without_users_that_has_imported_their_modules_is_served() -> None:
    with override_settings(INSTALLED_APPS=["django.contrib.contenttypes"]):
        asyncdjango.install()
        asyncdjango.uninstall()
