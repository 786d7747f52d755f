"""The project that every server of the benchmark serves, as ``startproject`` would lay it out but for the admin.

What differs from run to run comes in by environment variables, which ``bench.servers`` sets.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

# As Django itself decides: psycopg 3 where it can be imported, psycopg2 elsewhere.
PSYCOPG3 = find_spec("psycopg") is not None
TORNADO = find_spec("tornado") is not None

# What tornjango's pools hold by default, given to every peer.
CONNECTIONS = int(os.environ.get("BENCH_CONNECTIONS", "10"))

SECRET_KEY = "bench: not a secret, nothing is signed with it outside this machine"
DEBUG = False
ALLOWED_HOSTS = ["127.0.0.1"]
ROOT_URLCONF = "bench.project.urls"
USE_TZ = True
TIME_ZONE = "UTC"
STATIC_URL = "static/"

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "bench.project",
]
REDIS = os.environ.get("BENCH_REDIS", "")
if TORNADO:
    INSTALLED_APPS.insert(0, "tornjango")
elif REDIS:
    INSTALLED_APPS += ["channels", "django_eventstream"]
    # redis-py would end a wait for news after some seconds, and Channels its WebSockets with it.
    CHANNEL_LAYERS = {
        "default": {
            "BACKEND": "channels_redis.core.RedisChannelLayer",
            "CONFIG": {"hosts": [{"address": REDIS, "socket_timeout": None}]},
        }
    }
    EVENTSTREAM_REDIS = {
        "host": "127.0.0.1",
        "port": int(REDIS.rpartition(":")[2]),
        "socket_timeout": None,
    }

MIDDLEWARE: list[str] = []
if os.environ.get("BENCH_MIDDLEWARE") == "default":
    MIDDLEWARE = [
        "django.middleware.security.SecurityMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.middleware.common.CommonMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
        "django.middleware.clickjacking.XFrameOptionsMiddleware",
    ]

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [Path(__file__).parent / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]

# Django's own pool, for the peers: tornjango has its own. Its worker threads, like a project's, keep their connections.
POOL = {"pool": {"min_size": CONNECTIONS, "max_size": CONNECTIONS}}
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": os.environ.get("BENCH_DB_NAME", "bench"),
        "USER": os.environ.get("BENCH_DB_USER", "postgres"),
        "HOST": os.environ.get("BENCH_DB_HOST", ""),
        "PORT": os.environ.get("BENCH_DB_PORT", ""),
        "OPTIONS": POOL if PSYCOPG3 and not TORNADO else {},
        "CONN_MAX_AGE": None if TORNADO else 0,  # Django's pool allows no other
    }
}

# The benchmark shows what a server said when an answer is wrong.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "ERROR"},
}

# The soak test runs several workers, and the channel, which one worker has for itself, is not for it.
SILENCED_SYSTEM_CHECKS = ["tornjango.E002"]
# Parked polls stay parked until the benchmark publishes, however many there are to connect first.
TORNJANGO = {
    "ENGINES": {"default": os.environ.get("BENCH_ENGINE", "momoko")},
    "POOL_SIZE": CONNECTIONS,
    "RESPONSE_TIMEOUT": 600,
    "COMET": {
        "POLL_TIMEOUT": 600,
        "BROKER": os.environ.get("BENCH_BROKER", "memory"),
        **({"REDIS": REDIS} if REDIS else {}),
    },
}
