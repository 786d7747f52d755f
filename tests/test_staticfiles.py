from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

import tornjango
from tests.serving import Site
from tornjango.staticfiles import StaticFiles

SCRIPT = "/static/tornjango/comet.js"


@asynccontextmanager
async def serving_static(**settings: Any) -> AsyncIterator[Site]:
    with override_settings(**{"ROOT_URLCONF": "tests.http_views", **settings}):
        async with Site(lambda: tornjango.Application(staticfiles=True)) as site:
            yield site


@pytest.mark.gen_test
async def test_an_apps_file_is_served_with_its_type_and_time() -> None:
    async with serving_static() as site, await site.connect() as client:
        answer = await client.request(SCRIPT)
        assert answer.status == 200
        assert answer.header("Content-Type") == "text/javascript"
        assert answer.header("Content-Length") == str(len(answer.body))
        modified = answer.header("Last-Modified")
        again = await client.request(SCRIPT, headers=[("If-Modified-Since", str(modified))])
        assert again.status == 304


@pytest.mark.parametrize("path", ["/static/none.js", "/static/", "/static/%00", "/static/%FF"])
@pytest.mark.gen_test
async def test_what_is_not_an_apps_file_is_404(path: str) -> None:
    async with serving_static() as site:
        assert (await site.request(path)).status == 404


@pytest.mark.parametrize("path", ["/static/../manage.py", "/static/%2e%2e/manage.py"])
@pytest.mark.gen_test
async def test_a_path_that_leads_out_is_refused(
    path: str, error_log: list[logging.LogRecord]
) -> None:
    async with serving_static() as site:
        assert (await site.request(path)).status == 400
    assert error_log.pop().name == "django.security.SuspiciousFileOperation"


@pytest.mark.gen_test
async def test_an_encoded_path_finds_the_same_file() -> None:
    async with serving_static() as site:
        assert (await site.request(SCRIPT.replace("comet", "%63omet"))).status == 200
        assert (await site.request(SCRIPT.replace("/static", "/%73tatic"))).status == 200


@pytest.mark.gen_test
async def test_other_paths_are_the_projects() -> None:
    async with serving_static() as site:
        assert (await site.request("/status/200/")).body == b"content"


def test_a_static_url_elsewhere_is_not_ours() -> None:
    with override_settings(STATIC_URL="https://cdn.example/static/"):
        assert not StaticFiles().should_handle("/static/a.js")


def test_no_static_url_is_an_error_at_the_start() -> None:
    with override_settings(STATIC_URL=None), pytest.raises(ImproperlyConfigured):
        StaticFiles()
