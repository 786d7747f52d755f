from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django import forms
from django.contrib.auth.models import User
from django.core.files.storage import FileSystemStorage
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import transaction
from django.forms import inlineformset_factory, modelformset_factory

from tests.app.models import Author, Blog, Entry, Everything, Tag
from tests.database import opened
from tests.test_asyncdjango import warm_up
from tests.threads import started_threads, worker_calls
from tornjango import db
from tornjango import forms as async_forms


class EntryForm(forms.ModelForm):
    class Meta:
        model = Entry
        fields = ["blog", "authors", "tag", "title"]


class TagForm(forms.ModelForm):
    class Meta:
        model = Tag
        fields = ["slug"]


class Choice(forms.Form):
    blog = forms.ModelChoiceField(Blog.objects.all())


class FileForm(forms.ModelForm):
    class Meta:
        model = Everything
        fields = ["file"]


async def _fill() -> dict[str, Any]:
    blog = await Blog.objects.acreate(name="a")
    author = await Author.objects.acreate(name="Ann")
    tag = await Tag.objects.acreate(slug="x")
    return {"blog": blog.pk, "authors": [author.pk], "tag": [tag.pk], "title": "one"}


@pytest.mark.gen_test
async def test_a_model_form_is_validated_and_saved_without_a_thread(database: None) -> None:
    async with opened():
        await warm_up()
        data = await _fill()
        with started_threads() as names, worker_calls() as calls:
            form = EntryForm(data)
            assert await async_forms.is_valid(form)
            entry = await async_forms.save(form)
        assert (names, calls) == ([], [])
        assert [author.name async for author in entry.authors.all()] == ["Ann"]


@pytest.mark.gen_test
async def test_its_errors_are_djangos(database: None) -> None:
    async with opened():
        data = {**await _fill(), "blog": 99, "authors": [99], "title": ""}
        form, same = EntryForm(data), TagForm({"slug": "x"})
        assert not await async_forms.is_valid(form)
        assert set(form.errors) == {"blog", "authors", "title"}
        assert not await async_forms.is_valid(same)
        assert same.errors == {"slug": ["Tag with this Slug already exists."]}
        choice = Choice({"blog": data["blog"]})
        assert not await async_forms.is_valid(choice)
        with pytest.raises(ValueError, match="didn't validate"):
            await async_forms.save(same)


@pytest.mark.gen_test
async def test_what_a_view_adds_is_saved_with_it(database: None) -> None:
    async with opened():
        data = await _fill()
        form = EntryForm(data)
        assert await async_forms.is_valid(form)
        unsaved = await async_forms.save(form, commit=False)
        assert unsaved.pk is None
        form.instance.body = "more"
        entry = await async_forms.save(form)
        found = await Entry.objects.aget(body="more")
        assert found == entry
        assert await found.authors.acount() == 1


@pytest.mark.gen_test
async def test_formsets(database: None) -> None:
    async with opened():
        blog = await Blog.objects.acreate(name="a")
        Blogs = modelformset_factory(Blog, fields=["name"], extra=1)
        management = {"form-TOTAL_FORMS": 2, "form-INITIAL_FORMS": 1}
        data = {**management, "form-0-id": blog.pk, "form-0-name": "b", "form-1-name": "c"}
        blogs = Blogs(data)
        assert await async_forms.is_valid(blogs)
        assert len(await async_forms.save(blogs)) == 2
        assert [it.name async for it in Blog.objects.order_by("pk")] == ["b", "c"]
        Entries = inlineformset_factory(Blog, Entry, fields=["title", "authors", "tag"], extra=1)
        prefix = "entries"
        data = {f"{prefix}-TOTAL_FORMS": 1, f"{prefix}-INITIAL_FORMS": 0, f"{prefix}-0-title": "t"}
        entries = Entries(data, instance=blog)
        assert not await async_forms.is_valid(entries)
        assert set(entries.errors[0]) == {"authors", "tag"}


@pytest.mark.gen_test
async def test_an_uploaded_file_is_stored_in_a_thread(
    database: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = FileSystemStorage(tmp_path)
    monkeypatch.setattr(Everything._meta.get_field("file"), "storage", storage)
    upload = SimpleUploadedFile("a.txt", b"content" * 10_000)
    async with opened():
        await warm_up()
        form = FileForm({}, {"file": upload})
        assert await async_forms.is_valid(form)
        with started_threads() as names:
            thing = await async_forms.save(form)
        assert len(names) == 1
        assert (tmp_path / thing.file.name).read_bytes() == b"content" * 10_000


@pytest.mark.gen_test
async def test_what_a_form_saves_is_in_the_transaction_around_it(database: None) -> None:
    async with opened():
        async with db.atomic():
            form = TagForm({"slug": "y"})
            assert await async_forms.is_valid(form)
            await async_forms.save(form)
            transaction.set_rollback(True)
        assert not await Tag.objects.aexists()


@pytest.mark.gen_test
async def test_a_form_of_djangos_hashes_passwords_in_a_thread(database: None) -> None:
    from django.contrib.auth.forms import UserCreationForm

    password = "a long enough one, 2009"
    async with opened():
        await warm_up()
        form = UserCreationForm({"username": "ann", "password1": password, "password2": password})
        assert await async_forms.is_valid(form), form.errors
        with started_threads() as names:
            user = await async_forms.save(form)
        assert len(names) == 1
        assert await User.objects.aget() == user


def test_without_tornjangos_server_the_callers_transaction_is_seen(database: None) -> None:
    async def ask() -> tuple[bool, Any]:
        form = TagForm({"slug": "x"})
        return await async_forms.is_valid(form), form.errors.get("slug")

    with transaction.atomic():
        Tag.objects.create(slug="x")
        assert async_to_sync(ask)() == (False, ["Tag with this Slug already exists."])
        transaction.set_rollback(True)
