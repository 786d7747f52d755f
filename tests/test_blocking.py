from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from django.core import mail
from django.core.cache import caches
from django.core.cache.backends.base import BaseCache
from django.core.files.base import ContentFile
from django.core.files.storage import FileSystemStorage, InMemoryStorage, Storage
from django.core.mail.backends.base import BaseEmailBackend
from django.test import override_settings

from tests.app.models import Everything
from tests.database import opened
from tests.threads import started_threads, thread_name
from tornjango import green
from tornjango.blocking import KINDS, is_quick

LOOP = threading.main_thread().name
HERE = __name__

calls: list[tuple[str, str]] = []


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


def note(what: str) -> None:
    calls.append((what, thread_name()))


def noted() -> list[str]:
    """What was called, all of it in other threads."""
    assert all(thread != LOOP for _, thread in calls)
    return [what for what, _ in calls]


class Bucket(Storage):
    """As those that keep files with somebody else."""

    def _save(self, name: str, content: Any) -> str:
        note("save")
        return name

    def _open(self, name: str, mode: str = "rb") -> Any:
        note("open")
        return ContentFile(b"content", name)

    def exists(self, name: str) -> bool:
        note("exists")
        return False

    def delete(self, name: str) -> None:
        note("delete")

    def url(self, name: str) -> str:
        return f"https://bucket.example/{name}"


class Remote(BaseCache):
    def __init__(self, location: str, params: dict[str, Any]) -> None:
        super().__init__(params)

    def get(self, key: Any, default: Any = None, version: Any = None) -> Any:
        note("get")
        return default

    def set(self, key: Any, value: Any, timeout: Any = None, version: Any = None) -> None:
        note("set")


class Post(BaseEmailBackend):
    def send_messages(self, messages: Any) -> int:
        note("send")
        return len(messages)


@pytest.mark.gen_test
async def test_any_storage_works_aside_for_green_code() -> None:
    def code() -> None:
        storage = Bucket()
        name = storage.save("a.txt", ContentFile(b"a"))
        storage.open(name).close()
        storage.exists(name)
        storage.delete(name)
        assert storage.url(name) == "https://bucket.example/a.txt"

    async with opened():
        await green.run(code)
    assert noted() == ["exists", "save", "open", "exists", "delete"]


@pytest.mark.gen_test
async def test_a_file_is_saved_aside_with_its_object(
    database: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = FileSystemStorage(tmp_path)
    monkeypatch.setattr(Everything._meta.get_field("file"), "storage", storage)
    write = FileSystemStorage._save

    def noting(self: Any, name: str, content: Any) -> str:
        note("save")
        return str(write(self, name, content))

    monkeypatch.setattr(FileSystemStorage, "_save", noting)
    async with opened():
        thing = Everything(file=ContentFile(b"content", "a.txt"))
        await thing.asave()
        found = await Everything.objects.aget(pk=thing.pk)
        assert found.file.name == "a.txt"
    assert noted() == ["save"]
    assert (tmp_path / "a.txt").read_bytes() == b"content"


@pytest.mark.gen_test
@override_settings(CACHES={"default": {"BACKEND": f"{HERE}.Remote"}})
async def test_a_cache_elsewhere_is_asked_aside() -> None:
    def code() -> None:
        cache = caches["default"]
        cache.set("a", 1)
        cache.get("a")
        assert "a" not in cache

    async with opened():
        await green.run(code)
        assert await caches["default"].aget("a") is None
    assert noted() == ["set", "get", "get", "get"]


LOCMEM = {"BACKEND": "django.core.cache.backends.locmem.LocMemCache", "LOCATION": "blocking"}
DUMMY = {"BACKEND": "django.core.cache.backends.dummy.DummyCache"}


@pytest.mark.gen_test
@pytest.mark.parametrize("settings", [LOCMEM, DUMMY], ids=["locmem", "dummy"])
async def test_a_cache_in_memory_needs_no_thread(settings: dict[str, str]) -> None:
    def code() -> None:
        cache = caches["default"]
        cache.set_many({"a": 1, "b": 2})
        cache.get_many(["a", "b"])
        cache.get_or_set("c", 3)
        cache.delete("a")

    with override_settings(CACHES={"default": settings}):
        async with opened():
            with started_threads() as names:
                await green.run(code)
                await caches["default"].aset("a", 1)
                await caches["default"].aget("a")
            assert names == []


@pytest.mark.gen_test
async def test_mail_is_sent_aside() -> None:
    def code() -> None:
        message = mail.EmailMessage("subject", "body", "a@example.com", ["b@example.com"])
        assert Post().send_messages([message]) == 1

    async with opened():
        await green.run(code)
    assert noted() == ["send"]


@pytest.mark.gen_test
async def test_outside_of_green_code_nothing_goes_aside() -> None:
    async with opened():
        Bucket().delete("a")
    Bucket().delete("a")
    assert calls == [("delete", LOOP)] * 2


@pytest.mark.gen_test
async def test_what_it_raises_is_raised_where_it_is_called() -> None:
    def code() -> None:
        with pytest.raises(NotImplementedError):
            Bucket().listdir("x")
        with pytest.raises(FileNotFoundError):
            FileSystemStorage("/nowhere").open("a.txt")

    async with opened():
        await green.run(code)


@pytest.mark.gen_test
@override_settings(CACHES={"default": {"BACKEND": "not.installed.Cache"}})
async def test_a_class_that_cannot_be_imported_is_left_to_who_uses_it() -> None:
    async with opened():
        assert await green.run(lambda: 1) == 1


def test_every_class_that_is_told_apart_is_there() -> None:
    """A typing error in a name would send what is quick to threads."""
    from django.utils.module_loading import import_string

    for kind in KINDS:
        assert all(is_quick(kind, import_string(name)) for name in kind.quick)
    assert not any(is_quick(kind, InMemoryStorage) for kind in KINDS)
