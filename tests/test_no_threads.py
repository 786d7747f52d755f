"""What waits on the loop costs no thread: counted in a server, over sessions, users, the ORM and transactions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil
import pytest
from django.contrib.auth.models import Permission, User
from django.core.cache import cache

from tests.app.models import Author, Blog, Entry, Tag
from tests.serving import serving
from tests.test_asyncdjango import LOOP, warm_up
from tests.threads import started_threads, worker_calls
from tornjango.testing import RawClient, Response

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.locale.LocaleMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
PBKDF2 = ["django.contrib.auth.hashers.PBKDF2PasswordHasher"]


class Browser:
    """Keeps cookies."""

    def __init__(self, client: RawClient) -> None:
        self.client = client
        self.cookies: dict[str, str] = {}

    async def get(self, path: str, **options: Any) -> Response:
        headers = [*options.pop("headers", []), ("Cookie", self._cookie())]
        answer = await self.client.request(path, headers=headers, **options)
        for line in answer.all("Set-Cookie"):
            name, _, value = line.partition(";")[0].partition("=")
            self.cookies[name] = value
        return answer

    async def post(self, path: str, data: Any) -> Response:
        headers = [("Content-Type", "application/x-www-form-urlencoded")]
        body = urlencode(data, doseq=True).encode()
        return await self.get(path, method="POST", headers=headers, body=body)

    def _cookie(self) -> str:
        return "; ".join(f"{name}={value}" for name, value in self.cookies.items()) or "none=1"


@asynccontextmanager
async def browsing(**settings: Any) -> AsyncIterator[Browser]:
    cache.clear()
    options = {"ROOT_URLCONF": "tests.loop_views", "MIDDLEWARE": MIDDLEWARE, **settings}
    async with serving(**options) as site, await site.connect() as client:
        await _fill()
        await warm_up()
        yield Browser(client)


async def _fill() -> None:
    user = await User.objects.acreate_user("ann", password="secret")
    await user.user_permissions.aadd(await Permission.objects.aget(codename="add_blog"))
    ann = await Author.objects.acreate(name="Ann")
    entry = await Entry.objects.acreate(blog=await Blog.objects.acreate(name="a"), title="one")
    await entry.authors.aadd(ann)
    await entry.tag.aadd(await Tag.objects.acreate(slug="x"))


async def visit(browser: Browser) -> None:
    """All that a site's visitors do."""
    assert [(await browser.get("/count/")).body for _ in range(2)] == [b"1", b"2"]
    assert (await browser.get("/members/")).status == 302
    assert (await browser.get("/enter/")).body == b"in"
    assert (await browser.get("/members/")).body == b"user: ann"
    await browser.get("/greet/")
    assert (await browser.get("/greetings/")).body == b"hello;\n"
    page = b"one in a\nby Ann \nfor ann\n"
    assert (await browser.get("/entry/1/")).body == page
    assert (await browser.get("/deferred-entry/1/")).body == page
    assert (await browser.get("/green/")).body == page
    assert (await browser.get("/green-list/")).body == b"Ann: a " + LOOP.encode()
    assert (await browser.get("/transfer/")).body == b"a!"
    form = {"blog": 1, "authors": 1, "tag": 1, "title": "two"}
    assert (await browser.post("/create/", form)).body == b"2"
    assert b"not one of the available" in (await browser.post("/create/", {**form, "tag": 9})).body
    assert (await browser.get("/logout/")).body == b"out"
    assert (await browser.get("/members/")).status == 302


@pytest.mark.gen_test
@pytest.mark.parametrize("engine", ["db", "cached_db", "cache", "signed_cookies"])
async def test_no_thread_is_used_or_started(database: None, engine: str) -> None:
    settings = {"SESSION_ENGINE": f"django.contrib.sessions.backends.{engine}"}
    async with browsing(**settings) as browser:
        process = psutil.Process()
        before = process.num_threads()
        with started_threads() as names, worker_calls() as calls:
            await visit(browser)
        assert (names, calls, process.num_threads()) == ([], [], before)


@pytest.mark.gen_test
async def test_a_token_in_the_session_needs_none(database: None) -> None:
    async with browsing(CSRF_USE_SESSIONS=True) as browser:
        with worker_calls() as calls:
            await visit(browser)
        assert calls == []


@pytest.mark.gen_test
async def test_a_password_is_hashed_in_a_worker_thread_and_nothing_else(database: None) -> None:
    async with browsing(PASSWORD_HASHERS=PBKDF2) as browser:
        for password, status in (("wrong", 403), ("secret", 200)):
            with worker_calls() as calls:
                assert (await browser.post("/login/", {"password": password})).status == status
            assert {_hasher(call) for call in calls} <= {"verify", "encode", "log_response"}
            assert "verify" in {_hasher(call) for call in calls}


def _hasher(call: Any) -> str:
    """The name of what was handed over, through the wrappers around it."""
    fn, args = call
    while not hasattr(fn, "__qualname__"):
        fn, args = fn.func, (*fn.args, *args)
    inner = [it for it in args if callable(it)]
    return _hasher((inner[-1], ())) if inner else str(fn.__name__)


@pytest.mark.gen_test
async def test_a_session_in_a_file_is_read_and_written_in_threads(
    database: None, tmp_path: Path
) -> None:
    settings = {
        "SESSION_ENGINE": "django.contrib.sessions.backends.file",
        "SESSION_FILE_PATH": str(tmp_path),
    }
    async with browsing(**settings) as browser:
        with worker_calls() as calls:
            await visit(browser)
        assert calls
