"""The example's live pages in a real browser."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.browser import Page, needs_chromium
from tests.example import Example, manage

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


def test_page_that_has_lost_its_place_catches_up_and_keeps_what_was_being_written(
    example: Example, new_page: Callable[[], Page]
) -> None:
    page, entry = new_page(), example.entry()
    page.visit(example.url + entry)
    page.until("readers.innerText === '1 reading now'")
    page.run("id_text.value = 'What I was about to say'")
    # As after a backup was restored: the comment is there, and no message tells of it; the log is another one.
    example.rows(
        f"""insert into blog_comment (blog_id, name, text, created)
            select id, 'Eve', 'Hello', now() from blog_blog where slug = '{entry.split("/")[2]}';
            update tornjango_comet_head set epoch = decode(md5(random()::text), 'hex');
            update tornjango_comet_head set epoch = substring(epoch for 8); notify tornjango_comet"""
    )
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


def test_pages_tell_each_other_who_reads_and_who_is_typing(
    example: Example, new_reader: Callable[[], Page]
) -> None:
    first, second, entry = new_reader(), new_reader(), example.url + example.entry()
    first.visit(entry)
    first.until("readers.innerText === '1 reading now'")
    second.visit(entry)
    for page in (first, second):
        page.until("readers.innerText === '2 reading now'")
    second.run("id_text.dispatchEvent(new Event('input', {bubbles: true}))")
    first.until("readers.innerText === '2 reading now · someone is typing'")
    assert second.run("readers.innerText") == "2 reading now"
    second.visit("about:blank")
    first.until("readers.innerText.startsWith('1 reading now')")
    second.run("history.back()")
    for page in (first, second):
        page.until("readers.innerText.startsWith('2 reading now')")


def test_comments_are_counted_as_they_come(example: Example, new_page: Callable[[], Page]) -> None:
    page, entry, writer = new_page(), example.entry(), example.browser()
    page.visit(f"{example.url}/")
    before = int(page.run("written.innerText").replace(",", ""))
    writer.get(entry)
    writer.post(f"{entry}comment/", {"name": "Eve", "text": "Hello"})
    page.until(f"written.innerText.replace(',', '') === '{before + 1}'")


PAINT = """{
    const canvas = document.querySelector("canvas"), box = canvas.getBoundingClientRect()
    canvas.setPointerCapture = () => {}  // which wants a real pointer
    for (const [type, x] of [["pointerdown", 3.5], ["pointermove", 7.5], ["pointerup", 7.5]])
        canvas.dispatchEvent(new PointerEvent(type, {
            clientX: box.left + x * box.width / 40, clientY: box.top + 5.5 * box.height / 24,
        }))
}"""
GREEN_CELLS = """(() => {
    const context = document.querySelector("canvas").getContext("2d")
    const at = x => context.getImageData(x * 16 + 8, 5 * 16 + 8, 1, 1).data.slice(0, 3).join()
    return Array.from({length: 40}, (_, x) => x).filter(x => at(x) === "10,107,71").join()
})()"""


def test_what_one_paints_on_the_wall_all_see(
    example: Example, new_reader: Callable[[], Page]
) -> None:
    painter, other = new_reader(), new_reader()
    for page in (painter, other):
        page.visit(f"{example.url}/wall/")
    painter.run(PAINT)
    for page in (painter, other):
        page.until(f"{GREEN_CELLS} === '3,4,5,6,7'")
    other.visit(f"{example.url}/wall/")
    assert other.run(GREEN_CELLS) == "3,4,5,6,7"


def test_an_import_shows_how_far_it_is_wherever_it_runs(
    example: Example, new_reader: Callable[[], Page]
) -> None:
    page, staff = new_reader(), example.browser()
    staff.get("/login/")
    staff.post("/login/", {"username": "admin", "password": "admin"})
    for name, value in staff.cookies.items():
        page.call("Network.setCookie", name=name, value=value, url=example.url)
    page.visit(f"{example.url}/import/")
    feed = example.browser().get("/feed.json?entries=30").text
    page.run(
        "new MutationObserver(() => window.shown = [...(window.shown ?? []), document.getElementById('done').innerText])"
        ".observe(document.getElementById('done'), {childList: true})"
    )
    page.until("document.getElementById('own')")
    page.run(f"send_feed = {json.dumps(feed)}; void 0")
    page.run(
        """(() => { const files = new DataTransfer()
            files.items.add(new File([send_feed], "feed.json"))
            document.getElementById("feed").files = files.files
            document.querySelector("#import button").click() })()"""
    )
    page.until("document.getElementById('done').innerText === 'All 30 entries are there.'")
    assert page.run("shown").pop(0) == "10 of 30 entries"
    page.run("shown = []; void 0")
    manage("import_feed", "-", env=example.env, stdin=feed)
    page.until("shown.length === 3")


@pytest.mark.parametrize(
    "path", ["/", "/2009/", "/about/", "/wall/", "/search/?q=b&year=1", "/login/", "entry"]
)
def test_page_fits_a_phone(example: Example, new_page: Callable[[], Page], path: str) -> None:
    page = new_page()
    page.narrow(360)
    page.visit(example.url + (example.entry() if path == "entry" else path))
    assert page.run("document.documentElement.scrollWidth") == 360
