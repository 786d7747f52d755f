from __future__ import annotations

import json
import textwrap
from html import unescape
from itertools import pairwise
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

from tests.example import ROOT, Answer, Browser, Example, manage

FIRST_TITLES = [
    "A comet, and what came of it",
    "Looking for a day without a map in Riga",
    "My brother and the harbour café",
]
TITLE = r'<h2><a href="/entry/([^/]+)/">'


def write_comment(browser: Browser, entry: str, text: str = "Hello", **headers: str) -> Answer:
    return browser.post(f"{entry}comment/", {"name": "Eve", "text": text}, **headers)


def cursor_of(page: Answer) -> str:
    return str(followed(page)["cursor"])


def followed(page: Answer) -> dict[str, Any]:
    """What {% comet %} has put into the page."""
    found: dict[str, Any] = json.loads(page.find(r"<script data-comet [^>]*>([^<]*)"))
    return found


def poll(browser: Browser, page: Answer, cursor: str | None = None) -> Answer:
    """One long-poll, as the page's script asks it."""
    return browser.read(browser.open("GET", poll_path(page, cursor or cursor_of(page))))


def poll_path(page: Answer, cursor: str) -> str:
    channel = followed(page)["channels"][0]
    return f"/comet/poll/?channel={channel}&cursor={cursor}"


def test_the_view_of_2009_is_there_to_the_letter() -> None:
    view = """
        def my_async_view(request, response):
            query = Blog.objects.filter(pubdate__year=2009).exclude(tag__slug='sport')
            def done(rows):
                response.render('blog.html', {'rows': rows})
            db.execute_async(query, done)
    """
    source = (ROOT / "example_project" / "blog" / "views.py").read_text()
    assert textwrap.dedent(view) in source


def test_the_view_of_2009_shows_that_year_without_the_sport(example: Example) -> None:
    page = example.browser().get("/2009/")
    wanted = example.rows(
        """select slug from blog_blog where pubdate >= '2009-01-01 00:00Z' and pubdate < '2010-01-01 00:00Z'
        and id not in (select blog_id from blog_tag_blogs where tag_id = (select id from blog_tag where slug = 'sport'))
        order by pubdate desc"""
    )
    assert page.find_all(r'href="/entry/([^/]+)/"') == wanted
    assert 100 < len(wanted) < 200


def test_list_by_year_has_pages_newest_first(example: Example) -> None:
    browser = example.browser()
    first, second = browser.get("/year/2009/"), browser.get("/year/2009/?page=2")
    dates = [
        date for page in (first, second) for date in page.find_all(r'<time datetime="(2009[^"]+)"')
    ]
    assert len(dates) == 40
    assert all(newer > older for newer, older in pairwise(dates))
    assert "Page 1 of 10" in first.text
    assert 'href="?page=3"' in second.text


def test_list_by_tag_shows_the_entries_of_that_tag(example: Example) -> None:
    page = example.browser().get("/tag/sport/")
    entries = page.text.split("<article")[1:]
    assert len(entries) == 20
    assert all('href="/tag/sport/"' in entry for entry in entries)


def test_author_of_the_list_is_the_author_of_its_entries(example: Example) -> None:
    entries = example.browser().get("/author/ada-lindqvist/").text.split("<article")[1:]
    assert len(entries) == 20
    assert all('href="/author/ada-lindqvist/"' in entry for entry in entries)


@pytest.mark.parametrize("path", ["/year/0999/", "/tag/none/", "/author/none/", "/entry/none/"])
def test_what_is_not_there_is_404(example: Example, path: str) -> None:
    assert example.browser().get(path).status == 404


@pytest.mark.parametrize("page", ["0", "-1", "999999", "x", "%00"])
def test_page_that_is_not_there_shows_the_nearest(example: Example, page: str) -> None:
    answer = example.browser().get(f"/?page={page}")
    assert answer.status == 200
    assert answer.find_all(TITLE)


def test_search_finds_words_in_titles_and_bodies(example: Example) -> None:
    found = example.browser().get("/search/?q=%22stranger+explained%22&year=2009").find_all(TITLE)
    wanted = example.rows(
        """select slug from blog_blog where extract(year from pubdate at time zone 'UTC') = 2009
        and title || summary || body ilike '%stranger explained%' order by pubdate desc"""
    )
    assert found == wanted[:20]
    assert found


@pytest.mark.parametrize(
    "query", ["q=b", "q=", "q=bread&year=1", "q=bread&year=x", "q=a%00b", f"q={'a' * 101}"]
)
def test_search_says_what_is_wrong(example: Example, query: str) -> None:
    page = example.browser().get(f"/search/?{query}")
    assert page.status == 200
    assert "errorlist" in page.text


@pytest.mark.parametrize(
    "query", ["%22", "-", "%27%27", "((", "%26%7C%21", "or+or", "%3Cb%3E%22%27"]
)
def test_search_takes_whatever_is_typed(example: Example, query: str) -> None:
    assert example.browser().get(f"/search/?q=a+{query}").status == 200


def test_comment_reaches_a_reader_who_waits(example: Example) -> None:
    reader, writer, entry = example.browser(), example.browser(), example.entry()
    page = reader.get(entry)
    waiting = reader.open("GET", poll_path(page, cursor_of(page)))
    writer.get(entry)
    posted = write_comment(writer, entry, 'I say <b>"no"</b> & mean it.')
    [message] = reader.read(waiting).json()["messages"]
    assert posted.status == 302
    assert posted.headers["Location"] == f"{entry}#comment-{message['data']['id']}"
    assert "I say &lt;b&gt;&quot;no&quot;&lt;/b&gt; &amp; mean it." in message["data"]["html"]
    assert message["data"]["html"].strip() in reader.get(entry).text


def test_comment_between_the_page_and_its_first_poll_is_not_lost(example: Example) -> None:
    reader, writer, entry = example.browser(), example.browser(), example.entry()
    page = reader.get(entry)
    writer.get(entry)
    write_comment(writer, entry, "The first")
    first = poll(reader, page).json()
    write_comment(writer, entry, "The second")
    second = poll(reader, page, first["cursor"]).json()
    for answer, text in [(first, "The first"), (second, "The second")]:
        [message] = answer["messages"]
        assert text in message["data"]["html"]


def test_comment_that_is_not_valid_comes_back_with_the_reasons(example: Example) -> None:
    browser, entry = example.browser(), example.entry()
    browser.get(entry)
    page = write_comment(browser, entry, "x" * 2001)
    assert page.status == 422
    assert "has at most 2000 characters" in unescape(page.text)
    assert "x" * 2001 in page.text
    form = write_comment(browser, entry, "", **{"X-Requested-With": "fetch"})
    assert form.status == 422
    assert form.text.startswith("<form")
    assert "This field is required." in form.text
    assert '<li id="comment-' not in browser.get(entry).text


def test_comment_from_the_script_is_answered_with_an_empty_form(example: Example) -> None:
    browser, entry = example.browser(), example.entry()
    browser.get(entry)
    form = write_comment(browser, entry, "From the script", **{"X-Requested-With": "fetch"})
    assert form.status == 200
    assert form.text.startswith("<form")
    assert 'value="Eve"' in form.text
    assert "From the script" not in form.text
    assert "From the script" in browser.get(entry).text


def test_comment_without_the_page_s_token_is_refused(example: Example) -> None:
    browser, entry = example.browser(), example.entry()
    assert write_comment(browser, entry).status == 403
    browser.get(entry)
    assert browser.get(f"{entry}comment/").status == 405
    assert browser.post("/entry/none/comment/", {}).status == 404


def test_reader_counts_for_as_long_as_the_page_polls(example: Example) -> None:
    reader, other, entry = example.browser(), example.browser(), example.entry()
    page = reader.get(entry)
    channel = followed(page)["channels"][0]
    start = other.get(f"/comet/poll/?channel={channel}@presence").json()["cursor"]

    def told(cursor: str) -> Any:
        answer = other.get(f"/comet/poll/?channel={channel}@presence&cursor={cursor}").json()
        return [message["data"]["count"] for message in answer["messages"]], answer["cursor"]

    open_page = reader.open("GET", poll_path(page, cursor_of(page)) + "&client=somebody")
    # Who asks follows the companion, and not the channel, and does not count.
    counts, cursor = told(start)
    assert counts == [1]
    open_page.close()
    counts, _ = told(cursor)
    assert counts == [0]


def test_nobody_follows_an_entry_that_is_not_there(example: Example) -> None:
    assert example.browser().get("/comet/poll/?channel=entry:999999").status == 403


def test_what_is_no_feed_is_refused(example: Example) -> None:
    browser = example.browser()
    assert browser.get("/import/").headers["Location"].startswith("/login/")
    browser.get("/login/")
    browser.post("/login/", {"username": "admin", "password": "admin"})
    browser.get("/import/")
    answer = browser.post("/import/", {"feed": "x"})
    assert (answer.status, answer.json()["error"]) == (
        422,
        "This is no JSON feed: it has no items.",
    )


@pytest.mark.parametrize("cell", ["x", "[1, 2]", "[40, 0, 1]", "[-1, 0, 1]", "[0, 0, true]"])
def test_what_is_no_cell_is_not_painted(example: Example, cell: str) -> None:
    with connect(f"{example.url.replace('http', 'ws')}/wall/brush/") as socket:
        socket.send(cell)
        with pytest.raises(ConnectionClosedError, match="1008"):
            socket.recv(timeout=20)


def test_user_is_shown_by_every_kind_of_view(example: Example) -> None:
    browser = example.browser()
    browser.get("/login/")
    login = browser.post("/login/", {"username": "admin", "password": "admin"})
    assert login.status == 302
    for path in ("/", "/2009/", "/about/", "/search/", example.entry()):
        assert "Logged in as admin" in browser.get(path).text, path
    assert "Site administration" in browser.get("/admin/").text
    assert 'value="admin"' in browser.get(example.entry()).text
    browser.post("/logout/", {})
    assert "Logged in" not in browser.get("/2009/").text


def test_feed_is_the_latest_entries(example: Example) -> None:
    answer = example.browser().get("/feed.json")
    latest = example.rows("select title from blog_blog order by pubdate desc limit 20")
    assert answer.headers["Content-Type"] == "application/feed+json"
    assert [item["title"] for item in answer.json()["items"]] == latest


def test_anywhere_leads_to_an_entry(example: Example) -> None:
    browser = example.browser()
    assert browser.get(browser.get("/anywhere/").headers["Location"]).status == 200


def test_sample_is_loaded_once_and_the_same_everywhere(example: Example) -> None:
    assert "none were added" in manage("load_sample", env=example.env)
    assert example.rows("select title from blog_blog order by pubdate limit 3") == FIRST_TITLES
    counts = "select count(*) > 2900, (select count(*) > 6000 from blog_comment) from blog_blog"
    assert example.rows(counts) == ["t|t"]


def test_migrations_are_complete(example: Example) -> None:
    assert "No changes" in manage("makemigrations", "--check", "--dry-run", env=example.env)


def test_user_with_a_known_password_is_for_debug_only(example: Example) -> None:
    example.rows("update auth_user set username = 'aside' where username = 'admin'")
    try:
        manage("load_sample", env=example.env | {"DEBUG": "0"})
        assert example.rows("select username from auth_user") == ["aside"]
    finally:
        example.rows("update auth_user set username = 'admin' where username = 'aside'")


def test_without_debug_a_wrong_address_has_a_page_of_the_blog(example: Example) -> None:
    visit = """
from django.test import Client
answer = Client(headers={"host": "localhost"}).get("/nowhere/")
print(answer.status_code, answer.content.decode())
"""
    shown = manage("shell", "-v0", "-c", visit, env=example.env | {"DEBUG": "0"})
    assert shown.startswith("404 <!doctype html>")
    assert "There is nothing here" in shown
