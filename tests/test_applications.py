"""Real applications under Django's usual servers and under tornjango: no difference but Date and Server."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.applications.servers import (
    ADMIN,
    GUNICORN,
    OUR_RUNSERVER,
    RUNSERVER,
    SERVE,
    Applications,
)
from tests.applications.walk import Side, Walk
from tests.postgres import Postgres

pytestmark = pytest.mark.slow

JSON = "application/json"
HTML = "text/html"


def _png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 300, 200, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + bytes([y % 256, 90, 200]) * 300 for y in range(200)))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.fixture(scope="module")
def applications(postgres_folder: tuple[Postgres, Path]) -> Applications:
    postgres, folder = postgres_folder
    return Applications(postgres, folder / "applications")


@pytest.fixture(scope="module")
def ports(applications: Applications) -> Iterator[tuple[int, int]]:
    """gunicorn's and ours, DEBUG off."""
    with (
        applications.served("gunicorn", GUNICORN, debug=False) as reference,
        applications.served("serve", SERVE, debug=False) as ours,
    ):
        yield reference, ours


@pytest.fixture(scope="module")
def debug_ports(applications: Applications) -> Iterator[tuple[int, int]]:
    """runserver's and ours, DEBUG on."""
    with (
        applications.served("runserver", RUNSERVER, debug=True) as reference,
        applications.served("ours", OUR_RUNSERVER, debug=True) as ours,
    ):
        yield reference, ours


@pytest.fixture
def walk(ports: tuple[int, int]) -> Iterator[Walk]:
    yield from _walking(Walk(Side(ports[0]), Side(ports[1])))


@pytest.fixture
def debug_walk(debug_ports: tuple[int, int]) -> Iterator[Walk]:
    yield from _walking(Walk(Side(debug_ports[0]), Side(debug_ports[1]), debug=True))


def _walking(walk: Walk) -> Iterator[Walk]:
    yield walk
    different = [visit for visit in walk.visits if visit.differences]
    lines = "\n".join(f"{v.line}: {'; '.join(v.differences)}" for v in different)
    print(f"{len(walk.visits)} requests compared, {len(different)} differ")
    assert not different, lines
    assert walk.visits


def log_in(walk: Walk, login: str = "/django-admin/login/") -> None:
    walk.get(login)
    answer = walk.post(login, {"username": ADMIN[0], "password": ADMIN[1], "next": "/"})
    assert answer.status == 302


def test_the_admin(walk: Walk) -> None:
    admin = "/django-admin/"
    walk.get(admin)
    walk.get(f"{admin}login/?next={admin}")
    wrong = walk.post(f"{admin}login/", {"username": ADMIN[0], "password": "wrong"})
    assert "errornote" in wrong.text
    log_in(walk)
    walk.get(admin)
    walk.get(admin[:-1])
    walk.get(f"{admin}jsi18n/")
    items = f"{admin}extra/item/"
    for query in (
        "",
        "?q=item+3",
        "?o=-2",
        "?since__year=2009&since__month=2",
        "?p=100",
        "?nonsense=1",
    ):
        walk.get(items + query)
    walk.get(f"{items}add/")
    invalid = walk.post(f"{items}add/", {"name": "", "price": "x"})
    assert "Please correct" in invalid.text
    sheet = ("list.txt", b"one\ntwo\n", "text/plain")
    new = {"name": "new", "price": "3.50", "since": "2009-05-05", "_continue": "1"}
    added = walk.post(f"{items}add/", new, {"sheet": sheet})
    assert added.status == 302
    change = dict(added.headers)["Location"]
    walk.get(change)
    walk.post(change, {"name": "newer", "price": "4", "_save": "1"}, {})
    walk.get(items)
    walk.get(change.replace("change", "history"))
    walk.get("/extra/sheet/8/")
    action = {"action": "make_free", "_selected_action": ["1", "2"]}
    walk.post(items, {**action, "form-TOTAL_FORMS": "0", "form-INITIAL_FORMS": "0"})
    walk.get(items)
    walk.post(items, {"action": "delete_selected", "_selected_action": ["3", "4"]})
    walk.post(items, {"action": "delete_selected", "_selected_action": ["3"], "post": "yes"})
    walk.post(change.replace("change", "delete"), {})
    assert walk.post(change.replace("change", "delete"), {"post": "yes"}).status == 302
    walk.get(change)
    walk.get(f"{admin}extra/item/not-a-number/change/")
    walk.get(f"{admin}auth/user/1/change/")
    walk.get(f"{admin}password_change/")
    walk.post(f"{admin}password_change/", {"old_password": "wrong"})
    walk.get(f"{admin}no-such-app/")
    walk.get(f"{admin}logout/")
    assert walk.post(f"{admin}logout/", {}).status == 200
    walk.get(items)


def test_the_browsable_api(walk: Walk) -> None:
    browser = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
    for target in ("/api/", "/api/items/", "/api/items/?page=2", "/api/items/?page=99", "/api/items/1/",
                   "/api/items/99/", "/api/users/", "/api/items.json", "/api/items/?format=api"):  # fmt: skip
        for accept in (browser, JSON, "application/xml"):
            walk.get(target, Accept=accept)
    walk.send("OPTIONS", "/api/items/", Accept=JSON)
    walk.send("HEAD", "/api/items/", Accept=JSON)
    walk.send("POST", "/api/items/", b'{"name": "x"}', Content_Type=JSON)
    log_in(walk, "/api/auth/login/")
    token = {"X_CSRFToken": "the side's own", "Accept": JSON}
    walk.send("POST", "/api/items/", b'{"name": "no token"}', Content_Type=JSON)
    created = walk.send(
        "POST", "/api/items/", b'{"name": "api", "price": "1.10"}', Content_Type=JSON, **token
    )
    assert created.status == 201
    where = created.find(r'"url":"http://shop.example([^"]+)"')
    walk.get(where, Accept=browser)
    walk.send("PUT", where, b'{"name": "api 2", "price": "2"}', Content_Type=JSON, **token)
    walk.send("PATCH", where, b'{"price": "-x"}', Content_Type=JSON, **token)
    walk.send("PATCH", where, b"{broken", Content_Type=JSON, **token)
    walk.send("PATCH", where, b"<a/>", Content_Type="application/xml", **token)
    walk.post("/api/items/", {"name": "by form", "price": "2"}, Accept=browser)
    walk.post("/api/items/", {"name": ""}, Accept=browser)
    sheet = ("sheet.bin", bytes(range(256)) * 2000, "application/octet-stream")
    uploaded = walk.post("/api/items/", {"name": "file"}, {"sheet": sheet}, **token)
    assert uploaded.status == 201
    walk.send("POST", f"{where}free/", b"", **token)
    walk.send(
        "PUT",
        "/api/upload/a.txt",
        b"content of a file" * 100_000,
        Content_Type="text/plain",
        **token,
    )
    walk.send("PUT", "/api/upload/a.txt", b"", Content_Type="text/plain", **token)
    walk.send("DELETE", where, **token)
    walk.send("DELETE", where, **token)
    walk.send("DELETE", "/api/items/", **token)
    walk.get("/api/users/", Accept=browser)
    walk.post("/api/auth/logout/", {})
    for _ in range(2):
        walk.get("/api/throttled/", Accept=JSON)


def test_allauth(walk: Walk) -> None:
    walk.get("/accounts/login/")
    walk.get("/accounts/signup/")
    person = {"username": "bob", "email": "bob@shop.example"}
    walk.post("/accounts/signup/", {**person, "password1": "short", "password2": "other"})
    passwords = {"password1": "a password of Bob's", "password2": "a password of Bob's"}
    assert walk.post("/accounts/signup/", {**person, **passwords}).status == 302
    walk.get("/accounts/email/")
    walk.post("/accounts/email/", {"action_add": "", "email": "second@shop.example"})
    walk.get("/accounts/password/change/")
    walk.post("/accounts/password/change/", {"oldpassword": "wrong", **passwords})
    walk.get("/accounts/logout/")
    assert walk.post("/accounts/logout/", {}).status == 302
    walk.post("/accounts/login/", {"login": "bob", "password": "wrong"})
    assert (
        walk.post("/accounts/login/", {"login": "bob", "password": "a password of Bob's"}).status
        == 302
    )
    walk.get("/accounts/login/")
    walk.post("/accounts/logout/", {})
    walk.get("/accounts/password/reset/")
    assert walk.post("/accounts/password/reset/", {"email": "bob@shop.example"}).status == 302
    walk.get("/accounts/password/reset/done/")
    walk.get("/accounts/password/reset/key/1-nonsense/")
    walk.get("/accounts/confirm-email/nonsense/")


def test_a_new_wagtail_site(walk: Walk) -> None:
    walk.get("/")
    walk.get("/no-such-page/")
    walk.get("/search/?query=welcome")
    walk.get("/admin/")
    log_in(walk, "/admin/login/")
    walk.get("/admin/")
    for target in ("pages/3/", "pages/3/edit/", "pages/3/history/", "pages/3/add_subpage/", "images/", "documents/",
                   "users/", "settings/", "reports/site-history/", "sites/", "account/", "styleguide/"):  # fmt: skip
        walk.get(f"/admin/{target}")
    new = {"title": "A second page", "slug": "second", "action-publish": "1", "comments-TOTAL_FORMS": "0",
           "comments-INITIAL_FORMS": "0", "comments-MIN_NUM_FORMS": "0", "comments-MAX_NUM_FORMS": ""}  # fmt: skip
    assert walk.post("/admin/pages/add/home/homepage/3/", new).status == 302
    assert walk.get("/second/").status == 200
    walk.get("/second")
    walk.post("/admin/pages/add/home/homepage/3/", {**new, "slug": ""})
    walk.post("/admin/pages/add/home/homepage/3/", new)
    picture = ("picture.png", _png(), "image/png")
    walk.get("/admin/images/add/")
    added = walk.post("/admin/images/multiple/add/", {"title": "A picture", "collection": "1"}, {"files[]": picture},
                      X_Requested_With="XMLHttpRequest", Accept=JSON)  # fmt: skip
    assert '"success": true' in added.text
    walk.get("/admin/images/")
    walk.get("/admin/images/1/")
    walk.get("/admin/images/1/preview/1/width-60/")
    document = ("notes.txt", b"notes\n" * 100_000, "text/plain")
    walk.post("/admin/documents/multiple/add/", {"title": "Notes", "collection": "1"}, {"files[]": document},
              X_Requested_With="XMLHttpRequest", Accept=JSON)  # fmt: skip
    served = walk.get("/documents/1/notes.txt")
    assert served.body == document[1]
    walk.send("HEAD", "/documents/1/notes.txt")
    walk.get("/documents/99/notes.txt")
    walk.post("/admin/pages/4/delete/", {})
    walk.get("/second/")
    walk.post("/admin/logout/", {})
    walk.get("/admin/pages/3/")


def test_requests_of_all_kinds(walk: Walk) -> None:
    form = "application/x-www-form-urlencoded"
    for target in (
        "?a=1&a=2&b=%E4&c=%C3%A4&d",
        "?",
        "?=&&x=%",
        "caf%C3%A9/%FF%2F/x",
        "a%2Fb",
        "//double//",
        "a;b=c",
        "%00",
    ):
        walk.get(f"/extra/echo/{target}")
    walk.get(
        "/extra/echo/",
        Accept_Language="de",
        X_Odd="1, 2",
        X_Forwarded_For="6.6.6.6",
        X_Forwarded_Proto="https",
    )
    walk.get("/extra/echo-async/?x=1")
    walk.send("POST", "/extra/echo/", b"a=1&a=2&b=%C3%A4", Content_Type=form)
    walk.send("POST", "/extra/echo/", b"b=%E4", Content_Type=f"{form}; charset=iso-8859-1")
    walk.send("POST", "/extra/echo/", b"\xff\xfe", Content_Type="text/plain")
    walk.send("POST", "/extra/echo/", b"", Content_Type=form)
    walk.send(
        "POST", "/extra/echo/", b"x" * 1000, Content_Type="multipart/form-data; boundary=nothing"
    )
    walk.send("POST", "/extra/echo/", b"x" * 1000, Content_Type="multipart/form-data")
    walk.send("POST", "/extra/echo/", b"&".join(b"x=1" for _ in range(11_000)), Content_Type=form)
    for size in (0, 1, 70_000, 300_000, 3_000_000):
        file = ("käse.bin", b"x" * size, "application/octet-stream")
        walk.post("/extra/echo/", {"name": ["a", "b"]}, {"file": file})
        walk.send(
            "PUT",
            "/extra/raw/",
            b"y" * min(size, 2_000_000),
            Content_Type="application/octet-stream",
        )
    walk.send("POST", "/extra/raw/", b"y" * 3_000_000, Content_Type="application/octet-stream")
    for method in ("HEAD", "OPTIONS", "DELETE", "PATCH", "TRACE", "PROPFIND"):
        walk.send(method, "/extra/echo/")
    walk.get("/extra/echo/", Host="elsewhere.example")
    walk.get("/extra/echo/", Host="shop.example:8080")


def test_answers_of_all_kinds(walk: Walk) -> None:
    for target in ("stream/", "stream/?rows=0", "stream/?rows=20000", "stream-async/", "download/", "cookies/", "template/",
                   "items/", "items/?page=2", "items/?page=last", "items/?page=99", "long/", "big/", "not-modified/",
                   "echo/?short=1", "post-only/", "contact"):  # fmt: skip
        for method in ("GET", "HEAD"):
            walk.send(method, f"/extra/{target}")
            walk.send(method, f"/extra/{target}", Accept_Encoding="gzip")
    for code in (200, 201, 204, 205, 206, 300, 400, 404, 418, 500, 503, 599):
        walk.get(f"/extra/status/{code}/")
        walk.get(f"/extra/status/{code}/?reason=As+it+is")
    walk.get("/extra/conditional/")
    walk.get("/extra/conditional/", If_None_Match='"v1"')
    walk.get(
        "/extra/conditional/",
        If_None_Match='"v0"',
        If_Modified_Since="Thu, 01 Jan 2009 00:00:00 GMT",
    )
    walk.get("/extra/conditional/", If_Modified_Since="Thu, 01 Jan 2009 00:00:00 GMT")
    walk.get("/extra/conditional/", If_Match='"v0"')
    walk.send("HEAD", "/extra/conditional/", If_None_Match="*")
    etag = dict(walk.get("/extra/long/").headers)["ETag"]
    assert walk.get("/extra/long/", If_None_Match=etag).status == 304
    for _ in range(2):
        walk.get("/extra/session/")
    walk.get("/extra/session/?flush=1")
    walk.get("/extra/contact/")
    walk.post("/extra/contact/", {"name": "too long a name"})
    walk.post("/extra/contact/", {"name": "Bob"}, {"sheet": ("a.txt", b"a", "text/plain")})
    walk.get("/extra/contact/")
    walk.post("/extra/contact/", {"name": "Bob", "csrfmiddlewaretoken": "forged"})
    for target in ("/hello/", "/de/hello/", "/fr/hello/", "/hello"):
        walk.get(target)
        walk.get(target, Accept_Language="de")
    walk.post("/i18n/setlang/", {"language": "de", "next": "/extra/items/"})
    walk.get("/extra/items/")


ERRORS = ("value", "missing", "denied", "suspicious", "caught", "unknown")


def _fail(walk: Walk) -> None:
    for kind in ERRORS:
        walk.get(f"/extra/error/{kind}/")
        walk.get(f"/extra/error-async/{kind}/")
        walk.send("HEAD", f"/extra/error/{kind}/")
    walk.get("/extra/broken-template/")
    walk.get("/extra/sheet/99/")
    walk.send(
        "POST", "/extra/error/value/", b"a=1", Content_Type="application/x-www-form-urlencoded"
    )


def test_errors(walk: Walk) -> None:
    _fail(walk)


def test_errors_in_development(debug_walk: Walk) -> None:
    walk = debug_walk
    _fail(walk)
    walk.get("/nowhere/at/all/")
    walk.get("/extra/echo")
    walk.send("POST", "/extra/echo", b"x")
    walk.get("/static/nothing.css")
    walk.get("/extra/echo/", Host="elsewhere.example")


def test_static_files_and_media_in_development(debug_walk: Walk) -> None:
    walk = debug_walk
    css = walk.get("/static/admin/css/base.css")
    assert css.status == 200
    modified = dict(css.headers)["Last-Modified"]
    walk.get("/static/admin/css/base.css", If_Modified_Since=modified)
    walk.send("HEAD", "/static/admin/css/base.css")
    for target in (
        "wagtailadmin/js/wagtailadmin.js",
        "rest_framework/css/default.css",
        "",
        "admin",
        "admin/",
    ):
        walk.get(f"/static/{target}")
    log_in(walk)
    sheet = ("list.csv", b"one,two\n" * 50_000, "text/csv")
    walk.post("/django-admin/extra/item/add/", {"name": "media", "price": "1"}, {"sheet": sheet})
    walk.get("/media/sheets/list.csv")
    walk.get("/media/sheets/nothing.csv")
    walk.get("/media/")
