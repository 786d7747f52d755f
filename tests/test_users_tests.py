"""Tests of projects that use tornjango: what they call sees what they wrote, and those that want the server have it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.postgres import Postgres
from tests.projects import MANAGE, ROOT

SETTINGS = """
import os
SECRET_KEY = "only for tests"
ROOT_URLCONF = "urls"
INSTALLED_APPS = [
    "django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions",
    "tornjango", "django.contrib.staticfiles",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
STATIC_URL = "static/"
STATICFILES_DIRS = ["files"]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
LOGGING = {"version": 1, "disable_existing_loggers": False, "handlers": {"c": {"class": "logging.StreamHandler"}}, "root": {"handlers": ["c"], "level": "WARNING"}}
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "DIRS": ["templates"]}]
DATABASES = {"default": {
    "ENGINE": "django.db.backends.postgresql", "NAME": "users_tests", "USER": os.environ["PGUSER"],
    "HOST": os.environ.get("PGHOST", ""), "PORT": os.environ.get("PGPORT", ""), "PASSWORD": os.environ.get("PGPASSWORD", ""),
}}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
"""
URLS = """
from django.contrib.auth.models import User
from django.http import HttpResponse
from django.urls import path
from tornjango import deferred, db
from tornjango.shortcuts import arender
from tornjango.views import green

async def asynchronous(request):
    async with db.atomic():
        names = [user.username for user in await db.fetch(User.objects.order_by("pk"))]
    return HttpResponse(" ".join(names))

@deferred
def by_callback(request, response):
    def done(users):
        response.render("users.html", {"users": users})
    db.execute_async(User.objects.order_by("pk"), done)

@green
def sync(request):
    return HttpResponse(" ".join(user.username for user in User.objects.order_by("pk")))

async def rendered(request):
    return await arender(request, "users.html", {"users": User.objects.order_by("pk")})

urlpatterns = [
    path("async/", asynchronous), path("deferred/", by_callback), path("green/", sync), path("rendered/", rendered),
]
"""
TESTS = """
from urllib.request import urlopen

from django.contrib.auth.forms import UserCreationForm
from django.contrib.auth.models import User
from django.db import transaction
from django.test import AsyncClient, Client, TestCase

from tornjango import db, forms
from tornjango.db import pools
from tornjango.testing import LiveServerTestCase

PATHS = ("/async/", "/deferred/", "/green/", "/rendered/")


class Uncommitted(TestCase):
    @classmethod
    def setUpTestData(cls):
        User.objects.create(username="ann")

    async def test_calls(self):
        assert not pools.is_open()
        [user] = await db.fetch(User.objects.all())
        assert (await User.objects.aget()) == user
        assert await db.query("select username from auth_user") == [("ann",)]
        async with db.atomic():
            await User.objects.acreate(username="bob")
            async with db.atomic():
                await User.objects.acreate(username="cid")
                transaction.set_rollback(True)
        assert await User.objects.acount() == 2
        assert [user.username async for user in db.stream(User.objects.order_by("pk"))] == ["ann", "bob"]

    async def test_forms(self):
        password = "a long enough one, 2009"
        taken = UserCreationForm({"username": "ann", "password1": password, "password2": password})
        assert not await forms.is_valid(taken)
        free = UserCreationForm({"username": "bob", "password1": password, "password2": password})
        assert await forms.is_valid(free)
        assert (await forms.save(free)).pk
        assert await User.objects.acount() == 2

    def test_client(self):
        User.objects.create(username="bob")
        for path in PATHS:
            assert Client().get(path).content.decode().split() == ["ann", "bob"], path

    async def test_async_client(self):
        for path in PATHS:
            assert (await AsyncClient().get(path)).content.decode().split() == ["ann"], path


class Live(LiveServerTestCase):
    def read(self, path):
        with urlopen(self.live_server_url + path) as answer:
            return answer.read().decode().split()

    def test_what_is_committed_is_seen(self):
        User.objects.create(username="ann")
        assert pools.is_open()
        for path in PATHS:
            assert self.read(path) == ["ann"], path

    def test_tables_are_empty_again(self):
        assert self.read("/async/") == []
        User.objects.create(username="bob")
        assert self.read("/async/") == ["bob"]

    def test_static_files_are_served(self):
        assert self.read("/static/a.css") == ["a"]

    async def test_async(self):
        await User.objects.acreate(username="cid")
        assert self.read("/green/") == ["cid"]
"""
PYTEST = """
from urllib.request import urlopen

import django
import pytest
from django.core.management import call_command

from tornjango import db, testing
from tornjango.db import pools


@pytest.fixture(autouse=True, scope="session")
def tables():
    call_command("migrate", verbosity=0)


def test_served(tornjango_server):
    with urlopen(tornjango_server.url + "/async/") as answer:
        assert answer.read() == b""
    assert pools.is_open()


def test_pools():
    import asyncio

    async def ask():
        async with testing.open_pools():
            assert "default" in pools.status()
            return await db.query("select 1")

    assert asyncio.run(ask()) == [(1,)]
    assert not pools.is_open()
"""


@pytest.fixture
def project(tmp_path: Path, postgres: Postgres) -> Path:
    postgres.create_database("users_tests")
    files = {
        "settings.py": SETTINGS,
        "urls.py": URLS,
        "manage.py": MANAGE,
        "templates/users.html": "{% for user in users %}{{ user.username }} {% endfor %}",
        "files/a.css": "a",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def run(folder: Path, *arguments: str) -> str:
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "settings",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",  # what it says, in the order in which it says it
    }
    command = [sys.executable, "-W", "error", *arguments]
    result = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.slow
def test_djangos_test_cases_see_their_own_transaction_and_live_ones_have_a_server(
    project: Path,
) -> None:
    (project / "tests.py").write_text(TESTS)
    output = run(project, "manage.py", "test", "--noinput")
    assert "Ran 8 tests" in output
    assert output.strip().endswith("Destroying test database for alias 'default'...")


@pytest.mark.slow
def test_pytest_has_a_server_and_pools(project: Path) -> None:
    setup = "import django\ndjango.setup()\npytest_plugins = ['tornjango.pytest_plugin']\n"
    (project / "conftest.py").write_text(setup)
    (project / "test_it.py").write_text(PYTEST)
    options = ("-p", "no:randomly", "-p", "no:tornado", "-q", "-W", "ignore::DeprecationWarning")
    assert "2 passed" in run(project, "-m", "pytest", *options, "test_it.py")


@pytest.mark.slow
def test_in_a_shell_the_calls_use_djangos_own_connection(project: Path) -> None:
    run(project, "manage.py", "migrate", "--verbosity", "0")
    code = """
import asyncio
from django.contrib.auth.models import User
from django.db import transaction
from tornjango import db
async def main():
    async with db.atomic():
        await User.objects.acreate(username="ann")
        print(await db.query("select username from auth_user"), len(await db.fetch(User.objects.all())))
        transaction.set_rollback(True)
    assert not await User.objects.aexists()
asyncio.run(main())
"""
    assert "[('ann',)] 1" in run(project, "manage.py", "shell", "-c", code)
