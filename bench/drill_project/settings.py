"""The project of ``bin/bench drill``: rooms that anyone may follow, and a view that publishes to them."""

from __future__ import annotations

import os

SECRET_KEY = "bench: not a secret, nothing is signed with it outside this machine"
ALLOWED_HOSTS = ["127.0.0.1"]
ROOT_URLCONF = "bench.drill_project.urls"
INSTALLED_APPS = ["tornjango", "bench.drill_project"]
USE_TZ = True

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": "drill",
        "HOST": os.environ["DRILL_DB_HOST"],
        "PORT": os.environ["DRILL_DB_PORT"],
        "USER": os.environ["DRILL_DB_USER"],
    }
}

TORNJANGO = {
    "COMET": {
        "BROKER": os.environ["DRILL_BROKER"],
        "REDIS": os.environ.get("DRILL_REDIS", ""),
        # Long enough for the worst pause between two polls, with one event a second in each room at most.
        "HISTORY": 500,
    },
}
