"""What `wagtail start` leaves to do: its settings import this where it is."""

import os
from pathlib import Path

from mysite.settings.base import *  # noqa: F403
from mysite.settings.base import INSTALLED_APPS, MIDDLEWARE, TEMPLATES

FOLDER = Path(os.environ["APPLICATION_FOLDER"])

DEBUG = os.environ["APPLICATION_DEBUG"] == "1"
SECRET_KEY = "for tests only, and for nothing else than tests"
ALLOWED_HOSTS = ["shop.example"]
ROOT_URLCONF = "tests.applications.urls"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": os.environ["APPLICATION_DATABASE"],
    }
}
INSTALLED_APPS = [
    *INSTALLED_APPS,
    "django.contrib.postgres",
    "rest_framework",
    "allauth",
    "allauth.account",
    "tests.applications.extra",
]
MIDDLEWARE = [
    "django.middleware.gzip.GZipMiddleware",
    *MIDDLEWARE[:2],
    "django.middleware.locale.LocaleMiddleware",
    *MIDDLEWARE[2:],
    "django.middleware.http.ConditionalGetMiddleware",
    "allauth.account.middleware.AccountMiddleware",
    "tests.applications.extra.middleware.visits",
    "tests.applications.extra.middleware.Timing",
]
AUTHENTICATION_BACKENDS = [
    "django.contrib.auth.backends.ModelBackend",
    "allauth.account.auth_backends.AuthenticationBackend",
]
LANGUAGES = [("en", "English"), ("de", "Deutsch")]
MEDIA_ROOT = FOLDER / "media"
EMAIL_BACKEND = "django.core.mail.backends.filebased.EmailBackend"
EMAIL_FILE_PATH = FOLDER / "mail"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
FILE_UPLOAD_MAX_MEMORY_SIZE = 256 * 1024
REST_FRAMEWORK = {
    "DEFAULT_PAGINATION_CLASS": "rest_framework.pagination.PageNumberPagination",
    "PAGE_SIZE": 3,
}
ACCOUNT_EMAIL_VERIFICATION = "optional"
ACCOUNT_RATE_LIMITS = False
TEMPLATES[0]["OPTIONS"]["string_if_invalid"] = ""
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "loggers": {"django": {"handlers": ["console"], "level": "WARNING", "propagate": False}},
}
