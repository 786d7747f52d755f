"""The example's live pages in a real browser."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.browser import Page, needs_chromium
from tests.example import Example

pytestmark = needs_chromium


def write_comment(page: Page, name: str, text: str) -> None:
    page.run(
        f"""id_name.value = {json.dumps(name)}
        id_text.value = {json.dumps(text)}
        write.querySelector("form").noValidate = true
        write.querySelector("button").click()"""
    )


def test_comment_appears_in_every_open_page_without_reload(
    example: Example, new_page: Callable[[], Page]
) -> None:
    writer, reader, entry = new_page(), new_page(), example.url + example.entry()
    for page in (writer, reader):
        page.visit(entry)
        page.run("window.neverReloaded = true")
    write_comment(writer, "Eve", "Hello <b>there</b>")
    for page in (reader, writer):
        page.until("comments.children.length === 1")
        assert page.run("comments.innerText").endswith("Hello <b>there</b>")
        assert page.run("comments.firstElementChild.classList.contains('new')")
    writer.until("write.querySelector('[role=status]')")
    assert writer.run("document.activeElement.innerText").startswith("Thank you")
    assert writer.run("[id_name.value, id_text.value]") == ["Eve", ""]
    write_comment(reader, "Adam", "Hello yourself")
    for page in (reader, writer):
        page.until("comments.children.length === 2")
        assert page.run("neverReloaded")


def test_comments_come_in_order_and_once(example: Example, new_page: Callable[[], Page]) -> None:
    reader, entry = new_page(), example.entry()
    reader.visit(example.url + entry)
    writer = example.browser()
    writer.get(entry)
    texts = [f"Number {number}" for number in range(10)]
    for text in texts:
        assert writer.post(f"{entry}comment/", {"name": "Eve", "text": text}).status == 302
    reader.until(f"comments.children.length >= {len(texts)}")
    shown = "[...comments.querySelectorAll('li > p:last-child')].map(p => p.innerText)"
    assert reader.run(shown) == texts
    reader.visit("about:blank")
    reader.visit(example.url + entry)
    assert reader.run(shown) == texts


# The next poll waits to be let go, and then has a cursor that the server does not know.
SPOIL_THE_NEXT_POLL = """
    const real = fetch
    window.fetch = async (url, options) => {
        window.fetch = real
        await new Promise(resolve => window.letGo = resolve)
        return real(`${url}`.replace(/cursor=..../, "cursor=none"), options)
    }
    dispatchEvent(new Event("online"))
"""


def test_page_that_has_lost_its_place_catches_up_and_keeps_what_was_being_written(
    example: Example, new_page: Callable[[], Page]
) -> None:
    page, entry, writer = new_page(), example.entry(), example.browser()
    page.visit(example.url + entry)
    page.until("readers.innerText === '1 reading now'")
    page.run("id_text.value = 'What I was about to say'")
    page.run(SPOIL_THE_NEXT_POLL)
    page.until("window.letGo")
    writer.get(entry)
    writer.post(f"{entry}comment/", {"name": "Eve", "text": "Hello"})
    page.run("letGo()")
    page.until("comments.children.length === 1")
    # Not announced as new: it came with the others, from the page itself.
    assert not page.run("comments.firstElementChild.classList.contains('new')")
    assert page.run("id_text.value") == "What I was about to say"


def test_comment_that_is_not_valid_is_kept_beside_what_is_wrong(
    example: Example, new_page: Callable[[], Page]
) -> None:
    page = new_page()
    page.visit(example.url + example.entry())
    write_comment(page, "", "What I had to say")
    page.until("write.querySelector('.errorlist')")
    assert page.run("id_text.value") == "What I had to say"
    assert page.run("document.activeElement.id") == "id_name"
    assert page.run("comments.children.length") == 0


def test_pages_tell_each_other_who_reads(example: Example, new_page: Callable[[], Page]) -> None:
    first, second, entry = new_page(), new_page(), example.url + example.entry()
    first.visit(entry)
    first.until("readers.innerText === '1 reading now'")
    second.visit(entry)
    for page in (first, second):
        page.until("readers.innerText === '2 reading now'")
    second.visit("about:blank")
    first.until("readers.innerText === '1 reading now'")
    second.run("history.back()")
    for page in (first, second):
        page.until("readers.innerText === '2 reading now'")


@pytest.mark.parametrize(
    "path", ["/", "/2009/", "/about/", "/search/?q=b&year=1", "/login/", "entry"]
)
def test_page_fits_a_phone(example: Example, new_page: Callable[[], Page], path: str) -> None:
    page = new_page()
    page.narrow(360)
    page.visit(example.url + (example.entry() if path == "entry" else path))
    assert page.run("document.documentElement.scrollWidth") == 360
