from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from types import NoneType
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
from asgiref.sync import sync_to_async
from django.contrib.staticfiles.handlers import StaticFilesHandler
from django.contrib.staticfiles.storage import staticfiles_storage
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.wsgi import WSGIHandler
from django.core.management import call_command
from django.test import override_settings
from django.urls import set_script_prefix

import tornjango
from tests.projects import Project
from tests.serving import Site, reached, serving, until
from tornjango.exceptions import ConfigurationError
from tornjango.files import Changed, Folder, Memory, Variant, content_type_of
from tornjango.staticfiles import StaticFiles, StaticHandler, StaticRoot
from tornjango.testing import RawClient

SCRIPT = "/static/tornjango/comet.js"


@asynccontextmanager
async def serving_static(**settings: Any) -> AsyncIterator[Site]:
    with override_settings(**{"ROOT_URLCONF": "tests.http_views", "TEMPLATES": [], **settings}):
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


@pytest.mark.gen_test
async def test_a_static_url_elsewhere_is_not_ours() -> None:
    async with serving_static(STATIC_URL="https://cdn.example/static/") as site:
        assert (await site.request(SCRIPT)).status == 404


def _as_runserver(path: str, method: str, headers: dict[str, str]) -> tuple[int, Any, bytes]:
    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    environ |= {"PATH_INFO": path, "REQUEST_METHOD": method, "wsgi.input": BytesIO()}
    environ |= {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in headers.items()}
    started: list[Any] = []
    response: Any = StaticFilesHandler(WSGIHandler())(
        environ, lambda status, headers: started.append((int(status.split()[0]), headers))
    )
    try:
        body = b"".join(response)
    finally:
        response.close()
    status, pairs = started[0]
    return status, {name.title(): value for name, value in pairs}, body


ASKED: list[tuple[str, dict[str, str]]] = [
    (SCRIPT, {}),
    (SCRIPT, {"If-Modified-Since": "Sun, 06 Nov 1994 08:49:37 GMT"}),
    (SCRIPT, {"If-Modified-Since": "Sun, 06 Nov 2094 08:49:37 GMT"}),
    (SCRIPT, {"If-Modified-Since": "yesterday"}),
    (SCRIPT, {"If-None-Match": "*", "Accept-Encoding": "gzip"}),
    ("/static/admin/css/base.css", {}),
    ("/static/admin/img/search.svg", {}),
    ("/static/admin/img/LICENSE", {}),
    ("/static/admin/img/", {}),
    ("/static/admin/img", {}),
    ("/static/admin//css/./base.css", {}),
    ("/static/none.css", {}),
    ("/static/", {}),
]


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
@pytest.mark.gen_test
async def test_the_answers_are_runservers(method: str) -> None:
    async with serving_static() as site, await site.connect() as client:
        for path, headers in ASKED:
            answer = await client.request(path, method=method, headers=headers.items())
            status, known, body = await sync_to_async(_as_runserver)(path, method, headers)
            assert answer.status == status, path
            assert answer.body == (b"" if method == "HEAD" else body)
            ours = {name: value for name, value in answer.headers if name not in ("Date", "Server")}
            # Parts of files are this server's.
            assert set(ours) - set(known) <= {"Content-Length", "Accept-Ranges"}, path
            assert {**ours, **known} == ours, path


@pytest.mark.gen_test
async def test_a_file_that_changes_is_seen_at_once(tmp_path: Path) -> None:
    async with serving_static(STATICFILES_DIRS=[tmp_path]) as site:
        for content in b"one", b"more", None, b"again":
            path = tmp_path / "own.css"
            path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
            answer = await site.request("/static/own.css")
            assert answer.status == (404 if content is None else 200)
            assert content is None or answer.body == content


def test_no_static_url_is_an_error_at_the_start() -> None:
    with override_settings(STATIC_URL=None), pytest.raises(ImproperlyConfigured):
        StaticFiles()


# In production


class Root:
    """A STATIC_ROOT, and a server of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, content: bytes = b"content") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def variants(self, name: str) -> None:
        self.write(name, b"a" * 1000)
        for ending, size in (".gz", 300), (".br", 200), (".zst", 250):
            self.write(name + ending, ending.encode() * (size // len(ending)))

    @asynccontextmanager
    async def serving(self, *, limit: int = 1024 * 1024, **settings: Any) -> AsyncIterator[Site]:
        options = {
            "ROOT_URLCONF": "tests.http_views",
            "STATIC_ROOT": self.folder,
            "TEMPLATES": [],
            "TORNJANGO": {"STATIC": True, "STATIC_CACHE": limit, **settings.pop("options", {})},
        }
        with override_settings(**{**options, **settings}):
            async with Site() as site:
                yield site


@pytest.fixture
def root(tmp_path: Path) -> Root:
    folder = tmp_path / "root"
    folder.mkdir()
    return Root(folder)


def memory(site: Site) -> Memory:
    static = site.application.static
    assert isinstance(static, StaticRoot)
    return static.memory


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were opened for their content."""
    names: list[str] = []
    opened = Variant.open

    def open(variant: Variant) -> Any:
        names.append(os.path.basename(variant.path))
        return opened(variant)

    monkeypatch.setattr(Variant, "open", open)
    return names


@pytest.mark.gen_test
async def test_a_file_of_the_root_goes_out_with_all_that_is_known_of_it(root: Root) -> None:
    path = root.write("css/site.css", b"body {}")
    os.utime(path, (784111777, 784111777))
    async with root.serving() as site:
        for _ in range(2):  # from the disk, and from memory
            answer = await site.request("/static/css/site.css")
            assert (answer.status, answer.body) == (200, b"body {}")
            headers = {name: value for name, value in answer.headers if name != "Date"}
            assert headers == {
                "Content-Type": "text/css; charset=utf-8",
                "Content-Length": "7",
                "Last-Modified": "Sun, 06 Nov 1994 08:49:37 GMT",
                "Etag": answer.header("ETag"),
                "Cache-Control": "max-age=60, public",
                "Access-Control-Allow-Origin": "*",
                "Accept-Ranges": "bytes",
                "Server": "tornjango",
            }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.js", "text/javascript; charset=utf-8"),
        ("a.woff2", "font/woff2"),
        ("a.js.map", "application/json"),
        ("a.tar.gz", "application/gzip"),
        ("a.svg", "image/svg+xml"),
        ("a.unheard-of", "application/octet-stream"),
        ("LICENSE", "application/octet-stream"),
    ],
)
def test_a_file_has_the_type_of_its_name(name: str, expected: str) -> None:
    assert content_type_of(name) == (expected, "")


def test_a_compressed_image_says_so() -> None:
    assert content_type_of("a.svgz") == ("image/svg+xml", "gzip")


@pytest.mark.gen_test
async def test_names_of_the_manifest_are_cached_for_ever(root: Root, tmp_path: Path) -> None:
    source = Root(tmp_path / "source")
    source.write("site.css", b"body { background: url(dot.png) }")
    source.write("dot.png")
    backend = "django.contrib.staticfiles.storage.ManifestStaticFilesStorage"
    storages = {"staticfiles": {"BACKEND": backend}}
    with override_settings(
        STORAGES=storages, STATICFILES_DIRS=[source.folder], STATIC_ROOT=root.folder
    ):
        call_command("collectstatic", verbosity=0, interactive=False, ignore_patterns=["admin"])
        name = staticfiles_storage.stored_name("site.css")
        assert name != "site.css"
        async with root.serving() as site:
            hashed = await site.request(f"/static/{name}")
            assert hashed.header("Cache-Control") == "max-age=31536000, public, immutable"
            plain = await site.request("/static/site.css")
            assert plain.header("Cache-Control") == "max-age=60, public"
            assert (await site.request("/static/staticfiles.json")).status == 200


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("main.3f2a9c1b.js", True),
        ("js/2.0f3a9c1b2d4e5f60.chunk.css", True),
        ("main.3f2a9c1b.js.map", True),
        ("report.20240131.pdf", False),
        ("lib.deadbeef.js", False),
        ("lib.3f2a9c1.js", False),
        ("3f2a9c1b.js", False),
        ("index-BvR4x8aQ.js", False),
        ("3f2a9c1b0f3a/site.js", False),
        ("jquery-3.7.1.min.js", False),
    ],
)
def test_hexadecimal_hashes_between_dots_are_known_without_a_manifest(
    root: Root, name: str, expected: bool
) -> None:
    root.write(name)
    (variant,) = Folder(str(root.folder)).files[name].variants
    assert (("Cache-Control", "max-age=31536000, public, immutable") in variant.headers) is expected


@pytest.mark.gen_test
async def test_a_manifest_that_cannot_be_read_is_an_error_at_the_start(root: Root) -> None:
    root.write("staticfiles.json", b"{")
    backend = "django.contrib.staticfiles.storage.StaticFilesStorage"
    with override_settings(STORAGES={"staticfiles": {"BACKEND": backend}}):
        async with root.serving():
            pass
    backend = "django.contrib.staticfiles.storage.ManifestStaticFilesStorage"
    with (
        override_settings(STATIC_ROOT=root.folder, STORAGES={"staticfiles": {"BACKEND": backend}}),
        pytest.raises((ConfigurationError, ValueError), match="manifest"),
    ):
        StaticRoot(1000)


LIKED: list[tuple[str | None, str | None]] = [
    (None, None),
    ("", None),
    ("gzip", "gzip"),
    ("x-gzip", "gzip"),
    ("GZIP", "gzip"),
    ("gzip, deflate, br, zstd", "br"),
    ("gzip, zstd", "zstd"),
    ("br;q=0.5, gzip;q=0.8", "gzip"),
    ("br;q=0, gzip", "gzip"),
    ("br ; q=0.9 , gzip ; q=0.8", "br"),
    ("br;q=0.9;x=y, gzip;q=0.8", "br"),
    ("gzip;q=0", None),
    ("gzip;q=0.5", "gzip"),
    ("identity, gzip;q=0.5", None),
    ("identity;q=0.5, gzip", "gzip"),
    ("*", None),
    ("*;q=0.5, identity;q=0.1", "br"),
    ("*, br;q=0, identity;q=0", "zstd"),
    ("*;q=0", None),
    ("identity;q=0", None),
    ("br;q=nonsense, gzip", "gzip"),
    ("br;q=2, gzip", "gzip"),
    ("deflate, compress", None),
    (",, gzip,", "gzip"),
    ("unheard-of;q=1, " * 20 + "gzip", "gzip"),
]


@pytest.mark.gen_test
async def test_the_variant_is_the_one_the_client_likes_best(root: Root) -> None:
    root.variants("a.js")
    sizes = {None: 1000, "gzip": 300, "br": 198, "zstd": 248}
    async with root.serving() as site, await site.connect() as client:
        for accept, expected in LIKED:
            headers = [] if accept is None else [("Accept-Encoding", accept)]
            answer = await client.request("/static/a.js", headers=headers)
            assert answer.status == 200
            assert answer.header("Content-Encoding") == expected, accept
            assert answer.header("Content-Type") == "text/javascript; charset=utf-8"
            assert answer.header("Vary") == "Accept-Encoding"
            assert len(answer.body) == sizes[expected]


@pytest.mark.gen_test
async def test_each_variant_has_an_etag_of_its_own(root: Root) -> None:
    root.variants("a.js")
    async with root.serving() as site:
        etags = set()
        for coding in ("identity", "gzip", "br", "zstd"):
            headers = [("Accept-Encoding", coding)]
            etag = str((await site.request("/static/a.js", headers=headers)).header("ETag"))
            etags.add(etag)
            headers.append(("If-None-Match", etag))
            again = await site.request("/static/a.js", headers=headers)
            assert again.status == 304
            assert again.header("Vary") == "Accept-Encoding"
            assert again.header("ETag") == etag
        assert len(etags) == 4


@pytest.mark.gen_test
async def test_a_variant_that_is_old_or_no_smaller_is_not_used(
    root: Root, caplog: pytest.LogCaptureFixture
) -> None:
    root.variants("a.js")
    os.utime(root.folder / "a.js.br", (1, 1))
    root.write("a.js.gz", b"a" * 1000)
    root.variants("a.3f2a9c1b.js")  # its content is told by its name
    os.utime(root.folder / "a.3f2a9c1b.js.br", (1, 1))
    async with root.serving() as site:
        headers = [("Accept-Encoding", "br, gzip")]
        answer = await site.request("/static/a.js", headers=headers)
        assert answer.header("Content-Encoding") is None
        answer = await site.request("/static/a.3f2a9c1b.js", headers=headers)
        assert answer.header("Content-Encoding") == "br"
    (record,) = [record for record in caplog.records if record.name == "tornjango.staticfiles"]
    assert record.getMessage().endswith(f"not used: {root.folder}/a.js.br")


ETAG, DATE = "its ETag", "its date"
EARLIER, LATER = "Sat, 05 Nov 1994 08:49:37 GMT", "Mon, 07 Nov 1994 08:49:37 GMT"


CONDITIONS: list[tuple[dict[str, str], int, bytes]] = [
    ({"If-None-Match": ETAG}, 304, b""),
    ({"If-None-Match": "W/" + ETAG}, 304, b""),
    ({"If-None-Match": '"other", ' + ETAG}, 304, b""),
    ({"If-None-Match": "*"}, 304, b""),
    ({"If-None-Match": '"other"'}, 200, b"0123456789"),
    ({"If-None-Match": '"other"', "If-Modified-Since": DATE}, 200, b"0123456789"),
    ({"If-Modified-Since": DATE}, 304, b""),
    ({"If-Modified-Since": LATER}, 304, b""),
    ({"If-Modified-Since": EARLIER}, 200, b"0123456789"),
    ({"If-Modified-Since": "yesterday"}, 200, b"0123456789"),
    ({"If-Match": ETAG}, 200, b"0123456789"),
    ({"If-Match": "*"}, 200, b"0123456789"),
    ({"If-Match": "W/" + ETAG}, 412, b""),
    ({"If-Match": '"other"'}, 412, b""),
    ({"If-Unmodified-Since": DATE}, 200, b"0123456789"),
    ({"If-Unmodified-Since": EARLIER}, 412, b""),
    ({"If-Unmodified-Since": "yesterday"}, 200, b"0123456789"),
    ({"If-Match": ETAG, "If-Unmodified-Since": EARLIER}, 200, b"0123456789"),
    ({"Range": "bytes=2-4"}, 206, b"234"),
    ({"Range": "bytes=7-"}, 206, b"789"),
    ({"Range": "bytes=-2"}, 206, b"89"),
    ({"Range": "bytes=0-99"}, 206, b"0123456789"),
    ({"Range": "bytes=10-"}, 416, b""),
    ({"Range": "bytes=4-2"}, 200, b"0123456789"),
    ({"Range": "bytes=0-1,4-5"}, 200, b"0123456789"),
    ({"Range": "lines=0-1"}, 200, b"0123456789"),
    ({"Range": "bytes=2-4", "If-Range": ETAG}, 206, b"234"),
    ({"Range": "bytes=2-4", "If-Range": DATE}, 206, b"234"),
    ({"Range": "bytes=2-4", "If-Range": '"other"'}, 200, b"0123456789"),
    ({"Range": "bytes=2-4", "If-None-Match": ETAG}, 304, b""),
]


@pytest.mark.parametrize("from_disk", [False, True])
@pytest.mark.gen_test
async def test_conditions_and_ranges(root: Root, from_disk: bool) -> None:
    path = root.write("digits.txt", b"0123456789")
    os.utime(path, (784111777, 784111777))
    async with root.serving(limit=1 if from_disk else 1000) as site, await site.connect() as client:
        whole = await client.request("/static/digits.txt")
        etag, date = str(whole.header("ETag")), str(whole.header("Last-Modified"))
        for asked, status, expected in CONDITIONS:
            headers = [
                (name, value.replace(ETAG, etag).replace(DATE, date))
                for name, value in asked.items()
            ]
            answer = await client.request("/static/digits.txt", headers=headers)
            assert (answer.status, answer.body) == (status, expected), asked
            assert answer.header("Content-Length") == (
                None if status == 304 else str(len(expected))
            )
            if status in (200, 206, 304):
                assert answer.header("ETag") == etag
            start = b"0123456789".index(expected)
            ranges = {206: f"bytes {start}-{start + len(expected) - 1}/10", 416: "bytes */10"}
            assert answer.header("Content-Range") == ranges.get(status), asked
            head = await client.request("/static/digits.txt", method="HEAD", headers=headers)
            # A range is a GET's (RFC 9110, 14.2).
            assert head.status == (200 if status in (206, 416) else status), asked
        assert (memory(site).size > 0) is not from_disk


@pytest.mark.gen_test
async def test_a_range_is_of_the_variant(root: Root) -> None:
    root.variants("a.js")
    async with root.serving() as site:
        headers = [("Accept-Encoding", "br"), ("Range", "bytes=1-3")]
        answer = await site.request("/static/a.js", headers=headers)
        assert (answer.status, answer.body) == (206, b"br.")
        assert answer.header("Content-Range") == "bytes 1-3/198"


@pytest.mark.gen_test
async def test_an_empty_file_is_served(root: Root) -> None:
    root.write("empty.css", b"")
    async with root.serving() as site:
        for _ in range(2):
            answer = await site.request("/static/empty.css")
            assert (answer.status, answer.body) == (200, b"")
        headers = [("Range", "bytes=0-")]
        assert (await site.request("/static/empty.css", headers=headers)).status == 416


@pytest.mark.gen_test
async def test_other_methods_are_405_and_their_bodies_go_by(root: Root) -> None:
    root.write("a.css")
    async with root.serving() as site, await site.connect() as client:
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
            answer = await client.request("/static/a.css", method=method, body=b"x" * 100_000)
            assert (answer.status, answer.header("Allow")) == (405, "GET, HEAD")
            assert answer.body == b""
        assert (await client.request("/static/a.css")).body == b"content"


@pytest.mark.gen_test
async def test_requests_follow_each_other_on_a_connection(root: Root) -> None:
    root.write("a.css", b"a" * 10)
    root.write("b.css", b"b" * 1_000_000)
    root.write("c.css", b"c" * 3_000_000)
    async with root.serving(limit=16_000_000) as site, await site.connect() as client:
        for _ in range(2):
            one = b"GET /static/%c.css HTTP/1.1\r\nHost: localhost\r\n\r\n"
            await client.send(b"".join(one % name for name in b"abcab"))
            for name in b"abcab":
                size = {"a": 10, "b": 1_000_000, "c": 3_000_000}[chr(name)]
                assert (await client.response()).body == bytes([name]) * size


@pytest.mark.gen_test
async def test_http_1_0_is_answered(root: Root) -> None:
    root.write("a.css")
    async with root.serving() as site:
        answer = await site.raw(b"GET /static/a.css HTTP/1.0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.endswith(b"\r\n\r\ncontent")


NOT_THERE = [
    "/static/none.js",
    "/static/",
    "/static",
    "/static/css",
    "/static/css/",
    "/static//css/a.css",
    "/static/css//a.css",
    "/static/./css/a.css",
    "/static/../root/css/a.css",
    "/static/%2e%2e/secret.txt",
    "/static/..%2fsecret.txt",
    "/static/css/..%2f..%2fsecret.txt",
    "/static/%2fetc/passwd",
    "/static/..%5csecret.txt",
    "/static/css/a.css/",
    "/static/css/a.css%00",
    "/static/.env",
    "/static/.git/config",
    "/static/css/.well-known/a",
    "/static/fifo",
    "/static/nowhere",
    "/static/" + "a" * 300,
    "/static/%ff",
]


@pytest.mark.gen_test
async def test_what_is_not_a_file_of_the_root_is_djangos_404(root: Root) -> None:
    root.write("css/a.css")
    root.write(".env")
    root.write(".git/config")
    root.write("css/.well-known/a")
    (root.folder.parent / "secret.txt").write_text("secret")
    os.mkfifo(root.folder / "fifo")
    (root.folder / "nowhere").symlink_to("none")
    async with root.serving(APPEND_SLASH=False) as site, await site.connect() as client:
        for path in NOT_THERE:
            answer = await client.request(path)
            assert answer.status == 404, path
            assert answer.header("X-Frame-Options") == "DENY"  # it went through the middleware
            assert b"secret" not in answer.body


@pytest.mark.gen_test
async def test_well_known_files_and_links_are_served(root: Root) -> None:
    root.write(".well-known/a.txt")
    (root.folder.parent / "elsewhere.css").write_text("elsewhere")
    (root.folder / "link.css").symlink_to("../elsewhere.css")
    (root.folder / "circle").symlink_to(".", target_is_directory=True)
    async with root.serving() as site:
        assert (await site.request("/static/.well-known/a.txt")).status == 200
        assert (await site.request("/static/link.css")).body == b"elsewhere"


@pytest.mark.gen_test
async def test_names_that_are_not_ascii_are_found(root: Root) -> None:
    root.write("größe und mehr.css")
    async with root.serving() as site:
        assert (await site.request("/static/gr%C3%B6%C3%9Fe%20und%20mehr.css")).status == 200


@pytest.mark.gen_test
async def test_files_in_memory_are_opened_once(root: Root, read: list[str]) -> None:
    root.write("a.css")
    async with root.serving() as site:
        clients = [await site.connect() for _ in range(50)]

        async def twenty(client: RawClient) -> None:
            for _ in range(20):
                assert (await client.request("/static/a.css")).body == b"content"

        await asyncio.gather(*map(twenty, clients))
        for client in clients:
            client.abort()
        assert read == ["a.css"]


@pytest.mark.gen_test
async def test_an_answer_from_memory_makes_no_task_and_no_django_request(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.write("a.css")
    async with root.serving() as site:
        await site.request("/static/a.css")
        monkeypatch.setattr(StaticHandler, "start", None)
        monkeypatch.setattr("tornjango.handlers.TornadoRequest", None)
        assert (await site.request("/static/a.css")).body == b"content"
        assert (await site.request("/static/a.css", method="HEAD")).status == 200


@pytest.mark.gen_test
async def test_memory_is_never_more_than_its_bound(root: Root, read: list[str]) -> None:
    names = [f"{number}.bin" for number in range(40)]
    for name in names:
        root.write(name, b"x" * 100)
    root.write("large.bin", b"x" * 126)
    async with root.serving(limit=1000) as site:
        for name in names:
            await site.request(f"/static/{name}")
            assert memory(site).size <= 1000
        assert memory(site).size == 1000
        read.clear()
        await site.request("/static/30.bin")  # the oldest that is left
        await site.request("/static/0.bin")  # in the place of the next
        await site.request("/static/30.bin")
        await site.request("/static/31.bin")
        assert read == ["0.bin", "31.bin"]
        for _ in range(2):
            await site.request("/static/large.bin")
        assert read[2:] == ["large.bin"] * 2
        assert memory(site).size == 1000


@pytest.mark.gen_test
async def test_what_is_being_read_counts(root: Root) -> None:
    for number in range(20):
        root.write(f"{number}.bin", b"x" * 100)
    folder, cache = Folder(str(root.folder)), Memory(1000)
    variants = [file.variants[0] for file in folder.files.values()]
    reading: list[asyncio.Future[bytes]] = []

    def start(read: Any) -> asyncio.Future[bytes]:
        reading.append(asyncio.get_running_loop().create_future())
        return reading[-1]

    assert [cache.read(variant, start) is None for variant in variants] == [False] * 10 + [
        True
    ] * 10
    assert cache.read(variants[0], start) is reading[0]
    assert cache.size == 1000
    reading[0].cancel()
    reading[1].set_exception(Changed("gone"))
    for future in reading[2:]:
        future.set_result(b"x" * 100)
    await asyncio.sleep(0)
    assert cache.size == 800
    assert cache.get(variants[0]) is None
    assert cache.get(variants[2]) == b"x" * 100


@pytest.mark.gen_test
async def test_a_client_that_leaves_while_a_file_is_read_takes_nothing_from_the_next(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.write("a.css")
    begun, go = threading.Event(), threading.Event()
    whole = Variant.read

    def slowly(variant: Variant) -> bytes:
        begun.set()
        assert go.wait(10)
        return whole(variant)

    monkeypatch.setattr(Variant, "read", slowly)
    async with root.serving() as site:
        async with await site.connect() as client:
            await client.send(b"GET /static/a.css HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await reached(begun)
        await until(lambda: not site.application.in_flight)
        waiting = asyncio.create_task(site.request("/static/a.css"))
        await until(lambda: site.application.in_flight)
        go.set()
        assert (await waiting).body == b"content"


@pytest.mark.parametrize("size", [1_000, 3_000_000])
@pytest.mark.gen_test
async def test_a_file_that_changed_or_came_since_the_start_is_served_as_it_is_now(
    root: Root, size: int
) -> None:
    root.write("a.css", b"old")
    root.write("gone.css")
    async with root.serving() as site:
        root.write("a.css", b"n" * size)
        root.write("new.css", b"new")
        (root.folder / "gone.css").unlink()
        answer = await site.request("/static/a.css")
        assert answer.body == b"n" * size
        assert (await site.request("/static/new.css", method="POST")).status == 404
        assert (await site.request("/static/new.css")).body == b"new"
        assert (await site.request("/static/new.css", method="POST")).status == 405
        gone = await site.request("/static/gone.css")
        assert (gone.status, gone.header("X-Frame-Options")) == (404, "DENY")


@pytest.mark.gen_test
async def test_a_file_that_shrinks_under_a_download_breaks_it_off(
    root: Root, error_log: list[logging.LogRecord]
) -> None:
    path = root.write("large.bin", b"x" * 30_000_000)
    async with root.serving() as site, await site.connect() as client:
        await client.send(b"GET /static/large.bin HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head = await client.head()
        assert head.header("Content-Length") == "30000000"
        os.truncate(path, 1000)
        assert len(await client.rest()) < 30_000_000
    assert "failed outside of Django" in error_log.pop().getMessage()


@pytest.mark.gen_test
async def test_a_large_file_waits_for_its_client_and_holds_nobody_up(root: Root) -> None:
    root.write("large.bin", b"x" * 30_000_000)
    root.write("a.css")
    async with root.serving() as site, await site.connect() as client:
        await client.send(b"GET /static/large.bin HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await client.head()
        assert (await site.request("/static/a.css")).body == b"content"
        (handler,) = site.application.in_flight
        assert handler._sending.sent < 30_000_000
        assert len(await client.reader.readexactly(30_000_000)) == 30_000_000
        assert memory(site).size == 7


@pytest.mark.parametrize("size", [200_000, 30_000_000])
@pytest.mark.gen_test
async def test_a_client_that_leaves_a_download_leaves_nothing_open(root: Root, size: int) -> None:
    path = root.write("large.bin", b"x" * size)
    async with root.serving() as site:
        async with await site.connect() as client:
            for _ in range(20):
                await client.send(b"GET /static/large.bin HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await client.head()
        # Between two of the pipelined requests none is in flight.
        await until(lambda: not site.application.in_flight and not _is_open(path))


def _is_open(path: Path) -> bool:
    folder = Path("/proc/self/fd")
    return any(os.path.realpath(fd) == str(path) for fd in folder.iterdir())


@pytest.mark.gen_test
async def test_a_view_below_the_static_url_is_still_reached(root: Root) -> None:
    root.write("a.css")
    async with root.serving(STATIC_URL="/status/") as site:
        assert (await site.request("/status/a.css")).body == b"content"
        assert (await site.request("/status/200/")).body == b"content"
        assert (await site.request("/status/200/")).header("X-Frame-Options") == "DENY"


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("/", "/a.css"),
        ("/deep/static/", "/deep/static/a.css"),
        ("https://cdn.example/assets/", "/assets/a.css"),
        ("//cdn.example/", "/a.css"),
    ],
)
@pytest.mark.gen_test
async def test_the_path_of_the_static_url_is_served(root: Root, url: str, path: str) -> None:
    root.write("a.css")
    async with root.serving(STATIC_URL=url, MEDIA_URL="/media/") as site:
        assert (await site.request(path)).body == b"content"
        assert (await site.request("/status/200/")).body == b"content"


@pytest.mark.parametrize("url", ["static/", "/app/static/"])
@pytest.mark.gen_test
async def test_a_script_name_stands_before_the_static_url_or_was_taken_away(
    root: Root, url: str
) -> None:
    root.write("a.css")
    set_script_prefix("/app/")  # as django.setup() does
    try:
        async with root.serving(STATIC_URL=url, FORCE_SCRIPT_NAME="/app") as site:
            assert (await site.request("/app/static/a.css")).body == b"content"
            assert (await site.request("/static/a.css")).body == b"content"
    finally:
        set_script_prefix("/")


@pytest.mark.gen_test
async def test_static_files_are_in_the_access_log(
    root: Root, caplog: pytest.LogCaptureFixture
) -> None:
    root.write("a.css")
    caplog.set_level(logging.INFO, "django.server")
    async with root.serving(options={"ACCESS_LOG": "runserver"}) as site:
        for _ in range(2):
            await site.request("/static/a.css")
        await site.request("/static/none.css")
    lines = [record.getMessage() for record in caplog.records if record.name == "django.server"]
    assert lines[:2] == ['"GET /static/a.css HTTP/1.1" 200 7'] * 2
    assert lines[2].startswith('"GET /static/none.css HTTP/1.1" 404 ')


@pytest.mark.gen_test
async def test_a_stopping_server_closes_behind_a_file(root: Root) -> None:
    root.write("a.css")
    async with root.serving() as site, await site.connect() as client:
        await client.request("/static/a.css")
        site.application.draining = True
        answer = await client.request("/static/a.css")
        assert (answer.body, answer.header("Connection")) == (b"content", "close")
        assert await client.rest() == b""


@pytest.mark.gen_test
async def test_a_download_is_waited_for_by_a_stopping_server(root: Root) -> None:
    root.write("large.bin", b"x" * 30_000_000)
    async with root.serving() as site, await site.connect() as client:
        await client.send(b"GET /static/large.bin HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await client.head()
        site.server.stop()
        assert len(await client.reader.readexactly(30_000_000)) == 30_000_000


@pytest.mark.parametrize("folder", [None, "", "none"])
def test_a_root_that_is_not_there_is_an_error_at_the_start(
    tmp_path: Path, folder: str | None
) -> None:
    place = tmp_path / folder if folder else folder
    with (
        override_settings(STATIC_ROOT=place),
        pytest.raises(ConfigurationError, match="STATIC_ROOT"),
    ):
        StaticRoot(1000)


@pytest.mark.gen_test
async def test_the_root_is_served_where_debug_is_off_and_it_is_asked_for(root: Root) -> None:
    root.write("a.css")
    async with root.serving(DEBUG=True) as site:
        assert site.application.static is None
    async with root.serving(options={"STATIC": False}) as site:
        assert site.application.static is None
    with override_settings(STATIC_ROOT=root.folder, TORNJANGO={"STATIC": True}):
        for found, kind in (True, StaticFiles), (False, NoneType), (None, StaticRoot):
            application = tornjango.Application(staticfiles=found)
            assert isinstance(application.static, kind)
            await application.close()


# Media, in development


@pytest.fixture
def media(tmp_path: Path) -> Root:
    media = Root(tmp_path / "media")
    media.write("pictures/a.txt", b"0123456789")
    return media


@asynccontextmanager
async def serving_media(media: Root, **settings: Any) -> AsyncIterator[Site]:
    known = {"DEBUG": True, "TEMPLATES": [], "MEDIA_ROOT": media.folder, "MEDIA_URL": "/media/"}
    async with serving(**{**known, **settings}) as site:
        yield site


@pytest.mark.gen_test
async def test_media_are_served_in_development(media: Root) -> None:
    async with serving_media(media) as site:
        answer = await site.request("/media/pictures/a.txt")
        assert (answer.status, answer.body) == (200, b"0123456789")
        assert answer.header("Content-Type") == "text/plain"
        headers = [("If-Modified-Since", str(answer.header("Last-Modified")))]
        assert (await site.request("/media/pictures/a.txt", headers=headers)).status == 304
        assert (await site.request("/media/none.txt")).status == 404
        assert (await site.request("/media/pictures/")).status == 404
        media.write("new.txt", b"new")
        assert (await site.request("/media/new.txt")).body == b"new"


@pytest.mark.gen_test
async def test_a_path_that_leads_out_of_media_is_refused(
    media: Root, error_log: list[logging.LogRecord]
) -> None:
    (media.folder.parent / "secret.txt").write_text("secret")
    async with serving_media(media) as site:
        answer = await site.request("/media/../secret.txt")
        assert answer.status in (400, 404)
        assert b"secret\n" not in answer.body
    error_log.clear()


@pytest.mark.gen_test
async def test_a_view_of_the_projects_goes_before_media(media: Root) -> None:
    async with serving_media(media, MEDIA_URL="/status/") as site:
        assert (await site.request("/status/200/")).body == b"content"
        assert (await site.request("/status/pictures/a.txt")).body == b"0123456789"


@pytest.mark.parametrize(
    "settings",
    [
        {"DEBUG": False},
        {"MEDIA_ROOT": ""},
        {"MEDIA_URL": ""},
        {"MEDIA_URL": "/"},
        {"MEDIA_URL": "https://cdn.example/media/"},
    ],
)
@pytest.mark.gen_test
async def test_media_are_not_served_otherwise(media: Root, settings: dict[str, Any]) -> None:
    async with serving_media(media, **settings) as site:
        assert (await site.request("/media/pictures/a.txt")).status == 404
        assert (await site.request("/pictures/a.txt")).status == 404


@pytest.mark.gen_test
async def test_media_and_files_of_apps_are_below_the_script_name(media: Root) -> None:
    script = {"FORCE_SCRIPT_NAME": "/app", "STATIC_URL": "/app/static/"}
    try:
        async with serving_media(media, MEDIA_URL="/app/media/", **script) as site:
            assert (await site.request("/app/media/pictures/a.txt")).body == b"0123456789"
        async with serving_static(**script) as site:
            assert (await site.request(f"/app{SCRIPT}")).status == 200
    finally:
        set_script_prefix("/")


@pytest.mark.gen_test
async def test_parts_of_files_are_sent_in_development_too(media: Root) -> None:
    headers = [("Range", "bytes=2-4")]
    async with serving_media(media) as site:
        answer = await site.request("/media/pictures/a.txt", headers=headers)
        assert (answer.status, answer.body) == (206, b"234")
        assert answer.header("Content-Range") == "bytes 2-4/10"
    async with serving_static() as site:
        whole = await site.request(SCRIPT)
        answer = await site.request(SCRIPT, headers=headers)
        assert (answer.status, answer.body) == (206, whole.body[2:5])


# Commands


@pytest.mark.slow
def test_serve_serves_the_static_root_where_it_is_told_to(tmp_path: Path) -> None:
    project = Project(tmp_path, debug=False)
    with (tmp_path / "settings.py").open("a") as settings:
        settings.write(f"STATIC_ROOT = {str(tmp_path / 'root')!r}\n")
    command = ("manage.py", "serve", "0", "--static")
    done = project.run(*command)
    assert done.returncode == 1
    assert "STATIC_ROOT cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
    assert project.run("manage.py", "collectstatic", "--noinput").returncode == 0
    with project.running(*command) as server:
        server.wait_until_it_serves()
        assert "class Comet" in server.get("/static/tornjango/comet.js")
    with project.running(*command, "--nostatic") as server:
        server.wait_until_it_serves()
        with pytest.raises(OSError, match="404") as refused:
            server.get("/static/tornjango/comet.js")
        refused.value.close()  # type: ignore[attr-defined]
