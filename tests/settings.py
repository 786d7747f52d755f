"""The test project. `conftest.py` puts the addresses of its PostgreSQL servers into the environment, for subprocesses too."""

from __future__ import annotations

import os
import tempfile
from typing import Any


def _postgres(prefix: str = "") -> dict[str, Any]:
    """A database on the server that the usual variables tell; `prefix` is for those of a second server."""
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": os.environ.get(f"{prefix}PGDATABASE", "tornjango"),
        "HOST": os.environ.get(f"{prefix}PGHOST", ""),
        "PORT": os.environ.get(f"{prefix}PGPORT", ""),
        "USER": os.environ.get(f"{prefix}PGUSER", "postgres"),
        "PASSWORD": os.environ.get(f"{prefix}PGPASSWORD", ""),
    }


SECRET_KEY = "only for tests"
DEBUG = False
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "[::1]", "testserver"]
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django.contrib.postgres",
    "tornjango",
    "tests.app",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "tests.urls"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "DIRS": [os.path.join(os.path.dirname(__file__), "templates")],
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]
# "default" for nearly all; "own" is for tests that stop, restart or freeze the server (the fixture own_postgres starts
# it); "sqlite" is a file of the session, empty until a test makes tables in it.
DATABASES = {
    "default": _postgres(),
    "own": _postgres("OWN_"),
    "sqlite": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get(
            "TESTS_SQLITE", os.path.join(tempfile.gettempdir(), "tests.sqlite3")
        ),
    },
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
MIGRATION_MODULES = {"app": None}
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
STATIC_URL = "static/"
USE_TZ = True
TIME_ZONE = "Europe/Berlin"
