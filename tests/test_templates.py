from __future__ import annotations

import asyncio
import gettext
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jinja2
import jinja2.ext
import pytest
from django import forms
from django.core.exceptions import SynchronousOnlyOperation
from django.core.paginator import Paginator
from django.db import connection
from django.forms.renderers import get_default_renderer
from django.http import HttpRequest
from django.template import Engine, TemplateDoesNotExist, TemplateSyntaxError, engines
from django.template.autoreload import reset_loaders
from django.template.backends.base import BaseEngine
from django.template.loader import get_template
from django.template.loaders.filesystem import Loader as FilesystemLoader
from django.test import RequestFactory, override_settings
from django.urls import reverse
from django.utils import formats, translation
from django.utils.translation import trans_real

from tests.app.models import Author, Blog, Entry
from tests.example import Example
from tornjango.exceptions import TemplateQueryError
from tornjango.templates import TemplateProblem, querysets, registry, render

FILESYSTEM = "django.template.loaders.filesystem.Loader"
APP_DIRECTORIES = "django.template.loaders.app_directories.Loader"
LOCMEM = "django.template.loaders.locmem.Loader"
TEMPLATES_SETTING = "django.forms.renderers.TemplatesSetting"
DJANGO_RENDERER = "django.forms.renderers.DjangoTemplates"
CACHED = "django.template.loaders.cached.Loader"

Configure = Callable[..., None]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def django_backend(name: str = "django", **settings: Any) -> dict[str, Any]:
    backend = "django.template.backends.django.DjangoTemplates"
    return {"BACKEND": backend, "NAME": name, **settings}


def jinja_backend(*folders: Path, **options: Any) -> dict[str, Any]:
    backend = "django.template.backends.jinja2.Jinja2"
    return {"BACKEND": backend, "DIRS": list(folders), "OPTIONS": options}


@pytest.fixture
def configure() -> Iterator[Configure]:
    """Sets TEMPLATES (and more) until the test ends. The form renderer has no templates of its own, to be quick."""
    active: list[override_settings] = []

    def apply(*templates: dict[str, Any], **settings: Any) -> None:
        settings = {"FORM_RENDERER": TEMPLATES_SETTING, **settings}
        override = override_settings(TEMPLATES=list(templates), **settings)
        override.enable()
        active.append(override)

    yield apply
    while active:
        active.pop().disable()


@pytest.fixture
def folder(tmp_path: Path, configure: Configure) -> Path:
    """The only folder of the only backend."""
    configure(django_backend(DIRS=[tmp_path]))
    return tmp_path


def backend(name: str) -> Any:
    return engines[name]


def loaded(name: str) -> Any:
    return get_template(name)


class Opened:
    """Counts the files that this thread opens while it is entered; a hook stays for the life of the process."""

    def __init__(self) -> None:
        self.paths: list[Any] = []
        self.thread: int | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and threading.get_ident() == self.thread:
            self.paths.append(args[0])

    def __enter__(self) -> list[Any]:
        self.paths = []
        self.thread = threading.get_ident()
        return self.paths

    def __exit__(self, *exc: object) -> None:
        self.thread = None


opened = Opened()


def on_loop(function: Callable[[], Any]) -> Any:
    async def main() -> Any:
        return function()

    return asyncio.run(main())


def refused(*args: Any, **kwargs: Any) -> str:
    """The message of the TemplateQueryError that rendering on an event loop raises."""
    with pytest.raises(TemplateQueryError) as caught:
        on_loop(lambda: render(*args, **kwargs))
    return str(caught.value)


# Filling


def test_templates_render_from_memory_once_filled(folder: Path) -> None:
    write(
        folder,
        {
            "base.html": "<{% block a %}{% endblock %}>{% include part %}",
            "page.html": "{% extends 'base.html' %}{% block a %}{{ x }}{% include './part.html' %}{% endblock %}",
            "part.html": "part",
        },
    )
    assert registry.fill() == []
    for path in folder.iterdir():
        path.unlink()
    with opened as paths:
        assert render("page.html", {"x": 1, "part": "part.html"}) == "<1part>part"
    assert paths == []


def test_a_missing_template_is_missed_without_opening_a_file(folder: Path) -> None:
    write(folder, {"second.html": "second"})
    registry.fill()
    with opened as paths:
        assert render(["first.html", "second.html"], {}) == "second"
        with pytest.raises(TemplateDoesNotExist) as caught:
            get_template("first.html")
    assert paths == []
    ((origin, reason),) = caught.value.chain[0].tried
    assert (origin.name, reason) == (str(folder / "first.html"), "Source does not exist")
    assert origin.loader_name == FILESYSTEM


def test_before_fill_templates_load_as_ever(folder: Path) -> None:
    write(folder, {"page.html": "{{ x }}"})
    assert render("page.html", {"x": "<"}) == "&lt;"


def test_a_template_may_extend_one_of_its_own_name_further_down(
    tmp_path: Path, configure: Configure
) -> None:
    page = "{% extends 'page.html' %}{% block a %}[{{ block.super }}]{% endblock %}"
    write(tmp_path, {"one/page.html": page, "two/page.html": page})
    write(tmp_path, {"three/page.html": "{% block a %}base{% endblock %}"})
    dirs = [tmp_path / name for name in ("one", "two", "three")]
    configure(django_backend(DIRS=dirs))
    expected = render("page.html", {})
    assert registry.fill() == []
    with opened as paths:
        assert render("page.html", {}) == expected == "[[base]]"
    assert paths == []


def test_a_project_overrides_and_extends_the_admins_base_site(
    tmp_path: Path, configure: Configure
) -> None:
    override = "{% extends 'admin/base_site.html' %}{% block title %}ours{% endblock %}"
    write(tmp_path, {"admin/base_site.html": override})
    processor = "django.template.context_processors.request"
    configure(
        django_backend(DIRS=[tmp_path], APP_DIRS=True, OPTIONS={"context_processors": [processor]})
    )
    assert registry.fill() == []
    request = RequestFactory().get("/")
    reverse("admin:index")  # The server has loaded the URLconf by then.
    with opened as paths:
        page = render("admin/base_site.html", {"user": None}, request)
    assert paths == []
    assert "<title>ours</title>" in page
    assert "Django administration" in page


def test_a_template_that_extends_only_itself_tells_what_was_skipped(folder: Path) -> None:
    write(folder, {"page.html": "{% extends 'page.html' %}"})
    (problem,) = registry.fill()
    assert (problem.name, problem.line) == ("page.html", 1)
    assert "'page.html'" in problem.message
    with pytest.raises(TemplateDoesNotExist) as caught:
        render("page.html", {})
    ((origin, reason),) = caught.value.tried
    assert (origin.name, reason) == (str(folder / "page.html"), "Skipped to avoid recursion")


@pytest.mark.parametrize("debug", [False, True])
def test_a_syntax_error_is_reported_and_does_not_stop(
    tmp_path: Path, configure: Configure, debug: bool
) -> None:
    write(tmp_path, {"bad.html": "one\n{% if %}\n", "good.html": "good"})
    configure(django_backend(DIRS=[tmp_path], OPTIONS={"debug": debug}))
    (problem,) = registry.fill()
    assert (problem.name, problem.path, problem.line) == (
        "bad.html",
        str(tmp_path / "bad.html"),
        2,
    )
    assert str(problem).startswith(f"{tmp_path / 'bad.html'}:2: Unexpected end of expression")
    assert render("good.html", {}) == "good"
    with opened as paths, pytest.raises(TemplateSyntaxError) as caught:
        render("bad.html", {})
    assert paths == []
    assert hasattr(caught.value, "template_debug") is debug


def test_each_use_of_a_broken_template_raises_an_error_of_its_own(folder: Path) -> None:
    write(folder, {"bad.html": "{% nonsense %}"})
    registry.fill()
    errors = []
    for _ in range(2):
        with pytest.raises(TemplateSyntaxError) as caught:
            render("bad.html", {})
        errors.append(caught.value)
    assert errors[0] is not errors[1]


def test_literal_names_that_nobody_has_are_reported_with_their_line(folder: Path) -> None:
    write(folder, {"page.html": "\n{% if x %}{% include 'gone.html' %}{% endif %}"})
    (problem,) = registry.fill()
    assert (problem.name, problem.line) == ("page.html", 2)
    assert "'gone.html'" in problem.message


def test_a_tag_may_load_a_template_while_it_is_compiled(folder: Path, configure: Configure) -> None:
    write(folder, {"a.html": "{% paste 'z.html' %}", "z.html": "z"})
    options = {"builtins": ["tests.template_tags"]}
    configure(django_backend(DIRS=[folder], OPTIONS=options))
    assert registry.fill() == []
    write(folder, {"z.html": "new"})
    with opened as paths:
        assert render("a.html", {}) == "z"
    assert paths == []


def test_a_name_that_only_the_form_renderer_can_load_is_no_problem(configure: Configure) -> None:
    configure(django_backend(APP_DIRS=True), FORM_RENDERER=DJANGO_RENDERER)
    assert registry.fill() == []


def test_a_tag_that_fails_to_compile_is_reported(folder: Path, configure: Configure) -> None:
    write(folder, {"page.html": "{% explode %}"})
    options = {"builtins": ["tests.template_tags"]}
    configure(django_backend(DIRS=[folder], OPTIONS=options))
    (problem,) = registry.fill()
    assert problem.message == "ZeroDivisionError: division by zero"
    assert problem.line == 1


def test_text_in_another_encoding_is_reported_and_an_image_is_not(folder: Path) -> None:
    (folder / "latin.html").write_bytes("Grüße".encode("latin-1"))
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (problem,) = registry.fill()
    assert problem.name == "latin.html"
    assert problem.message.startswith("UnicodeDecodeError: ")
    with pytest.raises(UnicodeDecodeError):
        render("image.png", {})


def test_files_that_are_hardly_templates_are_read_when_first_asked_for(folder: Path) -> None:
    names = ["node_modules/a.html", ".git/b.html", "code.py"]
    write(folder, dict.fromkeys(names, "{{ x }}"))
    write(folder, {"huge.txt": "{{ x }}" + " " * 1024 * 1024})
    with opened as paths:
        assert registry.fill() == []
    assert not [path for path in paths if str(path).startswith(str(folder))]
    for name in [*names, "huge.txt"]:
        assert render(name, {"x": "found"}).strip() == "found"
    with opened as paths:
        render("code.py", {})
    assert paths == []


def test_folders_that_link_to_each_other_end(folder: Path) -> None:
    write(folder, {"a/page.html": "a", "b/page.html": "b"})
    (folder / "a" / "to-b").symlink_to(folder / "b")
    (folder / "b" / "to-a").symlink_to(folder / "a")
    (folder / "b" / "itself").symlink_to("itself")
    (folder / "c").symlink_to(folder / "a")
    assert registry.fill() == []
    assert [render(name, {}) for name in ("a/to-b/page.html", "c/page.html")] == ["b", "a"]


def test_what_is_no_file_is_left_alone(folder: Path) -> None:
    os.mkfifo(folder / "pipe.html")
    assert registry.fill() == []


def test_a_folder_that_is_not_there_has_no_templates(tmp_path: Path, configure: Configure) -> None:
    configure(django_backend(DIRS=[tmp_path / "gone"]))
    assert registry.fill() == []


@pytest.mark.parametrize(
    "name", ["a//page.html", "./a/page.html", "a/../a/page.html", "{}/a/page.html"]
)
def test_other_spellings_of_a_name_are_found_as_by_django(folder: Path, name: str) -> None:
    write(folder, {"a/page.html": "page"})
    name = name.format(folder)
    assert render(name, {}) == "page"
    registry.fill()
    with opened as paths:
        assert render(name, {}) == "page"
    assert paths == []


@pytest.mark.parametrize(
    "name", ["../secret.html", "a/../../secret.html", "/secret.html", "", "a\0b"]
)
def test_nothing_outside_the_folders_is_loaded(
    tmp_path: Path, configure: Configure, name: str
) -> None:
    write(tmp_path, {"secret.html": "secret", "in/page.html": "page"})
    configure(django_backend(DIRS=[tmp_path / "in"]))
    registry.fill()
    with pytest.raises(TemplateDoesNotExist):
        render(name, {})


def test_many_missing_names_do_not_pile_up(folder: Path) -> None:
    registry.fill()
    (loader,) = backend("django").engine.template_loaders
    for number in range(2000):
        with pytest.raises(TemplateDoesNotExist):
            get_template(f"{number}.html")
    assert loader.table.sources.cache_info().currsize <= 1024


# Engines, loaders, options


def test_each_backend_keeps_its_own_templates_and_options(
    tmp_path: Path, configure: Configure
) -> None:
    write(tmp_path, {"one/page.html": "1 {{ x }} {{ y }}", "two/page.html": "2 {{ x }} {{ y }}"})
    configure(
        django_backend("one", DIRS=[tmp_path / "one"]),
        django_backend(
            "two",
            DIRS=[tmp_path / "two"],
            OPTIONS={"autoescape": False, "string_if_invalid": "[%s]"},
        ),
    )
    assert registry.fill() == []
    assert render("page.html", {"x": "<"}) == "1 &lt; "
    assert render("page.html", {"x": "<"}, using="two") == "2 < [y]"


def test_libraries_and_builtins_of_an_engine_are_used(folder: Path, configure: Configure) -> None:
    write(folder, {"a.html": "{% load mine %}{% ask x %}"})
    options = {"libraries": {"mine": "tests.template_tags"}}
    configure(django_backend(DIRS=[folder], OPTIONS=options))
    assert registry.fill() == []
    assert render("a.html", {"x": 1}) == "1"


def test_locmem_and_the_file_system_are_searched_in_the_projects_order(
    folder: Path, configure: Configure
) -> None:
    write(folder, {"page.html": "file", "other.html": "file"})
    memory = (LOCMEM, {"page.html": "memory", "only.html": "{% extends 'page.html' %}"})
    for loaders, expected in (([memory, FILESYSTEM], "memory"), ([FILESYSTEM, memory], "file")):
        for nested in (loaders, [(CACHED, loaders)]):
            configure(django_backend(DIRS=[folder], OPTIONS={"loaders": nested}))
            assert registry.fill() == []
            with opened as paths:
                assert render("page.html", {}) == render("only.html", {}) == expected
                assert render("other.html", {}) == "file"
            assert paths == []


class ByTenant(FilesystemLoader):
    """Cannot be listed: what it has depends on the moment."""

    asked: list[str] = []

    def get_template_sources(self, template_name: str) -> Iterator[Any]:
        self.asked.append(template_name)
        return super().get_template_sources(f"tenant/{template_name}")


@pytest.mark.parametrize("cached", [0, 1, 2])
def test_a_loader_that_cannot_list_keeps_its_place_and_is_named(
    folder: Path, configure: Configure, cached: int, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder, {"page.html": "ours", "tenant/page.html": "theirs", "tenant/more.html": "more"})
    memory = (LOCMEM, {"page.html": "memory"})
    loaders: list[Any] = [memory, f"{__name__}.ByTenant", FILESYSTEM]
    nested = loaders
    for _ in range(cached):
        nested = [(CACHED, nested)]
    configure(django_backend(DIRS=[folder], OPTIONS={"loaders": nested}))
    with caplog.at_level(logging.WARNING, "tornjango.templates"):
        assert registry.fill() == []
    assert f"{__name__}.ByTenant cannot list its templates" in caplog.text
    ByTenant.asked.clear()
    assert [render("page.html", {}) for _ in range(2)] == ["memory", "memory"]
    assert ByTenant.asked == []
    assert [render("more.html", {}) for _ in range(2)] == ["more", "more"]
    assert len(ByTenant.asked) == (1 if cached else 2)


def test_a_file_that_vanishes_between_listing_and_reading_is_forgotten(
    folder: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = [("gone.html", str(folder / "gone.html"), 1)]
    monkeypatch.setattr("tornjango.templating.files.walk", lambda path: iter(gone))
    assert registry.fill() == []
    with pytest.raises(TemplateDoesNotExist):
        render("gone.html", {})
    loader = jinja2.DictLoader({})
    monkeypatch.setattr(loader, "list_templates", lambda: ["gone.html"])
    configure(jinja_backend(loader=loader))
    assert registry.fill() == []
    with pytest.raises(TemplateDoesNotExist):
        render("gone.html", {})


def test_the_projects_own_loaders_read_from_memory_too(folder: Path) -> None:
    write(folder, {"page.html": "page"})
    registry.fill()
    own = backend("django").engine.template_loaders[0].loaders[0]
    with opened as paths:
        assert own.get_template("page.html").source == "page"
        with pytest.raises(TemplateDoesNotExist):
            own.get_template("gone.html")
    assert paths == []


def test_origins_and_loaders_say_where_a_template_came_from(folder: Path) -> None:
    write(folder, {"page.html": "text"})
    registry.fill()
    template = loaded("page.html")
    assert template.origin.name == str(folder / "page.html")
    assert template.origin.template_name == "page.html"
    assert template.origin.loader_name == FILESYSTEM
    engine = backend("django").engine
    assert isinstance(engine.template_loaders[0].loaders[0], FilesystemLoader)
    assert list(engine.template_loaders[0].get_dirs()) == [folder]


def test_the_debug_page_of_an_error_reads_its_source_from_memory(
    tmp_path: Path, configure: Configure
) -> None:
    source = "one\n{% partialdef a %}{{ x.fail }}{% endpartialdef %}{% partial a %}\n"
    if not hasattr(__import__("django.template.base").template.base, "PartialTemplate"):
        source = "one\n{{ x.fail }}\n"  # Django 5.2 has no partials.
    write(tmp_path, {"page.html": source})
    configure(django_backend(DIRS=[tmp_path], OPTIONS={"debug": True}))
    assert registry.fill() == []

    class Failing:
        def fail(self) -> None:
            raise ValueError("now")

    with opened as paths, pytest.raises(ValueError, match="now") as caught:
        render("page.html", {"x": Failing()})
    assert paths == []
    info: dict[str, Any] = caught.value.template_debug  # type: ignore[attr-defined]
    assert (info["during"], info["line"]) == ("{{ x.fail }}", 2)


def test_filling_twice_keeps_what_did_not_change(folder: Path) -> None:
    write(folder, {"page.html": "text"})
    registry.fill()
    first = loaded("page.html").template
    registry.fill()
    assert loaded("page.html").template is first


def test_the_default_engine_is_filled_too(folder: Path) -> None:
    write(folder, {"page.html": "text"})
    registry.fill()
    (folder / "page.html").unlink()
    assert Engine.get_default().render_to_string("page.html") == "text"


# What else a first rendering would load


class NameForm(forms.Form):
    name = forms.ChoiceField(choices=[("a", "A")], help_text="help")
    when = forms.SplitDateTimeField(widget=forms.SplitDateTimeWidget)
    boxes = forms.MultipleChoiceField(
        choices=[("group", [("a", "A")])], widget=forms.CheckboxSelectMultiple
    )


@pytest.mark.parametrize("renderer", ["DjangoTemplates", "Jinja2"])
def test_forms_render_without_opening_a_file(renderer: str) -> None:
    with override_settings(FORM_RENDERER=f"django.forms.renderers.{renderer}"):
        cast(Any, get_default_renderer).cache_clear()
        assert registry.fill() == []
        with opened as paths:
            page = str(NameForm({"name": "b"}))
        assert paths == []
        assert 'type="checkbox"' in page
    cast(Any, get_default_renderer).cache_clear()


@pytest.mark.parametrize(
    ("language", "renderer", "debug"),
    [
        ("en-us", "django.forms.renderers.DjangoTemplates", "False"),
        ("de", "django.forms.renderers.TemplatesSetting", "False"),
        ("ja", "django.forms.renderers.DjangoTemplates", "True"),
    ],
)
def test_admin_renders_from_a_cold_start_without_opening_a_file(
    language: str, renderer: str, debug: str
) -> None:
    assert cold_render("admin", language, renderer, debug, env=dict(os.environ)) == "15 rendered\n"


def test_the_example_renders_from_a_cold_start_without_opening_a_file(example: Example) -> None:
    folder = Path(__file__).parent.parent / "example_project"
    env = {**example.env, "DJANGO_SETTINGS_MODULE": "config.settings"}
    env["PYTHONPATH"] = os.pathsep.join([str(folder.parent), str(folder)])
    paths = ["/2009/", "/", "/year/2009/", "/tag/sport/", "/search/?q=a", "/about/", "/login/"]
    paths += [example.entry(), "/admin/login/"]
    assert cold_render("pages", *paths, env=env) == f"{len(paths)} rendered\n"


def cold_render(*arguments: str, env: dict[str, str]) -> str:
    command = [sys.executable, "-m", "tests.cold_render", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def cold_translations() -> Iterator[None]:
    """As in a process that has rendered nothing, but for modules that are imported."""
    module: Any = trans_real
    catalogs, default = module._translations, module._default
    module._translations, module._default = {}, None
    gettext._translations.clear()  # type: ignore[attr-defined]
    formats.reset_format_cache()
    translation.deactivate()
    yield
    module._translations, module._default = catalogs, default
    formats.reset_format_cache()


@pytest.mark.parametrize("chosen", [None, [("de", "German"), ("xx", "None such")]])
def test_languages_of_the_projects_own_choice_are_loaded(
    folder: Path, configure: Configure, chosen: list[tuple[str, str]] | None
) -> None:
    write(folder, {"page.html": "{% load i18n %}{% translate 'Yes' %} {{ x|date }}"})
    settings = {} if chosen is None else {"LANGUAGES": chosen}
    configure(django_backend(DIRS=[folder]), **settings)
    with override_settings(LANGUAGE_CODE="fr"), cold_translations():
        assert registry.fill() == []
        with opened as paths:
            assert render("page.html", {"x": date(2009, 5, 1)}) == "Oui 1 mai 2009"
            assert paths == []
            with translation.override("de"):
                assert render("page.html", {"x": date(2009, 5, 1)}) == "Ja 1. Mai 2009"
        assert bool(paths) is (chosen is None)


def test_a_language_that_has_no_catalog_is_reported(folder: Path) -> None:
    with override_settings(LANGUAGE_CODE="xx"), cold_translations():
        (problem,) = registry.fill()
    assert str(problem).startswith("language 'xx': OSError: No translation files found")


def test_context_processors_that_cannot_be_imported_are_reported(configure: Configure) -> None:
    configure(django_backend(OPTIONS={"context_processors": ["nowhere.at_all"]}))
    (problem,) = registry.fill()
    assert str(problem).startswith("context_processors of 'django': ModuleNotFoundError")


def test_a_static_files_storage_that_fails_is_reported(folder: Path) -> None:
    manifest = "django.contrib.staticfiles.storage.ManifestStaticFilesStorage"
    storages = {"staticfiles": {"BACKEND": manifest}}
    write(folder, {"staticfiles.json": "{nonsense"})
    with override_settings(STORAGES=storages, STATIC_ROOT=folder):
        (problem,) = registry.fill()
    assert str(problem).startswith("the static files' storage: ValueError: Couldn't load manifest")


# Refreshing


def test_a_changed_template_is_seen_by_all_that_extend_or_include_it(folder: Path) -> None:
    write(
        folder,
        {
            "base.html": "old {% block a %}{% endblock %}",
            "part.html": "old",
            "page.html": "{% extends 'base.html' %}{% block a %}{% include 'part.html' %}{% endblock %}",
        },
    )
    registry.fill()
    assert render("page.html", {}) == "old old"
    write(folder, {"base.html": "new {% block a %}{% endblock %}", "part.html": "new"})
    assert render("page.html", {}) == "old old"
    assert registry.refresh(folder / "base.html") is True
    assert registry.refresh(str(folder / "part.html")) is True
    assert render("page.html", {}) == "new new"


def test_a_new_template_takes_precedence_and_gives_way_when_it_goes(
    tmp_path: Path, configure: Configure
) -> None:
    write(tmp_path, {"two/page.html": "two"})
    (tmp_path / "one").mkdir()
    configure(django_backend(DIRS=[tmp_path / "one", tmp_path / "two"]))
    registry.fill()
    write(tmp_path, {"one/page.html": "one"})
    assert registry.refresh(tmp_path / "one" / "page.html")
    assert render("page.html", {}) == "one"
    (tmp_path / "one" / "page.html").unlink()
    assert registry.refresh(tmp_path / "one" / "page.html")
    assert render("page.html", {}) == "two"
    (tmp_path / "two" / "page.html").unlink()
    assert registry.refresh(tmp_path / "two" / "page.html")
    with pytest.raises(TemplateDoesNotExist):
        render("page.html", {})


def test_a_missing_name_is_found_once_its_file_appears(folder: Path) -> None:
    registry.fill()
    with pytest.raises(TemplateDoesNotExist):
        render("page.html", {})
    write(folder, {"page.html": "new"})
    registry.refresh(folder / "page.html")
    assert render("page.html", {}) == "new"


def test_a_new_syntax_error_is_logged_once_and_raised_until_it_is_mended(
    folder: Path, error_log: list[logging.LogRecord]
) -> None:
    write(folder, {"page.html": "fine"})
    registry.fill()
    write(folder, {"page.html": "{% if %}"})
    assert registry.refresh(folder / "page.html") is True
    assert error_log.pop().getMessage().startswith(f"{folder / 'page.html'}:1: ")
    with pytest.raises(TemplateSyntaxError):
        render("page.html", {})
    registry.refresh(folder / "page.html")
    write(folder, {"page.html": "mended"})
    registry.refresh(folder / "page.html")
    assert render("page.html", {}) == "mended"


@pytest.mark.parametrize("name", ["../elsewhere.html", "code.py"])
def test_other_files_are_none_of_its_business(folder: Path, name: str) -> None:
    registry.fill()
    assert registry.refresh(folder / name) is False


def test_a_file_told_through_a_symbolic_link_is_ours(tmp_path: Path, configure: Configure) -> None:
    write(tmp_path, {"real/page.html": "old"})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    configure(django_backend(DIRS=[tmp_path / "link"]))
    registry.fill()
    write(tmp_path, {"real/page.html": "new"})
    assert registry.refresh(tmp_path / "real" / "page.html") is True
    assert render("page.html", {}) == "new"


def test_the_form_renderers_templates_are_refreshed_too(configure: Configure) -> None:
    configure(FORM_RENDERER=DJANGO_RENDERER)
    registry.fill()
    engine = cast(Any, get_default_renderer()).engine.engine
    (folder, *_) = engine.dirs
    assert registry.refresh(folder / "django" / "forms" / "div.html") is True


def test_djangos_own_autoreloader_makes_the_registry_read_again(folder: Path) -> None:
    write(folder, {"page.html": "old"})
    registry.fill()
    write(folder, {"page.html": "new"})
    reset_loaders()
    assert render("page.html", {}) == "new"


def test_a_rendering_sees_whole_templates_while_others_replace_them(folder: Path) -> None:
    page = "{% for x in '0123456789' %}VERSION{% endfor %}"
    write(folder, {"page.html": page.replace("VERSION", "0")})
    registry.fill()
    done = threading.Event()
    seen: set[str] = set()

    def read() -> None:
        while not done.is_set():
            seen.add(render("page.html", {}))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for version in range(1, 5):
        (folder / "new").write_text(page.replace("VERSION", str(version)))
        (folder / "new").replace(folder / "page.html")
        registry.refresh(folder / "page.html")
    done.set()
    for reader in readers:
        reader.join()
    assert seen <= {str(version) * 10 for version in range(5)}
    assert render("page.html", {}) == "4" * 10


# Jinja2


@pytest.fixture
def jinja(tmp_path: Path, configure: Configure) -> Path:
    configure(jinja_backend(tmp_path))
    return tmp_path


@pytest.mark.parametrize("debug", [False, True])
def test_jinja_templates_render_from_memory(
    tmp_path: Path, configure: Configure, debug: bool
) -> None:
    write(
        tmp_path,
        {
            "base.html": "<{% block a %}{% endblock %}>",
            "page.html": "{% extends 'base.html' %}{% import 'm.html' as m %}"
            "{% block a %}{{ m.f(x) }}{% include name %}{% endblock %}",
            "m.html": "{% macro f(x) %}{{ x }}{% endmacro %}",
            "sub/part.html": "part",
        },
    )
    configure(jinja_backend(tmp_path, cache_size=0), DEBUG=debug)
    assert registry.fill() == []
    for path in tmp_path.rglob("*.html"):
        path.unlink()
    with opened as paths:
        page = render(
            "page.html", {"x": "<", "name": "sub//./part.html"}, RequestFactory().get("/")
        )
        assert page == "<&lt;part>"
        with pytest.raises(TemplateDoesNotExist):
            render("gone.html", {})
    assert paths == []


def test_jinja_problems_are_reported_and_do_not_stop(jinja: Path) -> None:
    write(
        jinja,
        {
            "bad.html": "one\n{% if %}",
            "good.html": "good",
            "lost.html": "\n{% include 'gone.html' %}{% include 'gone.html' ignore missing %}",
            ".git/bad.html": "{% if %}",
        },
    )
    (jinja / "latin.html").write_bytes("Grüße".encode("latin-1"))
    (jinja / "image.png").write_bytes(b"\x89PNG\0\0")
    problems = {problem.name: problem for problem in registry.fill()}
    assert set(problems) == {"bad.html", "latin.html", "lost.html"}
    assert (problems["bad.html"].path, problems["bad.html"].line) == (str(jinja / "bad.html"), 2)
    assert problems["lost.html"].line == 2
    assert render("good.html", {}) == "good"
    with opened as paths, pytest.raises(TemplateSyntaxError):
        render("bad.html", {})
    assert paths == []
    with pytest.raises(UnicodeDecodeError):
        render("latin.html", {})
    with pytest.raises(TemplateSyntaxError):
        render(".git/bad.html", {})


class Failing(jinja2.ext.Extension):
    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        if "fail" in source:
            raise ValueError("not this one")
        return source


def test_a_jinja_extension_that_fails_is_reported(tmp_path: Path, configure: Configure) -> None:
    write(tmp_path, {"bad.html": "fail", "good.html": "good"})
    configure(jinja_backend(tmp_path, extensions=[Failing]))
    (problem,) = registry.fill()
    assert str(problem) == "bad.html: ValueError: not this one"
    assert render("good.html", {}) == "good"
    with pytest.raises(ValueError, match="not this one"):
        render("bad.html", {})


def test_the_folder_of_a_jinja_package_loader_is_refreshed(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"some_package/__init__.py": "", "some_package/pages/page.html": "old"})
    monkeypatch.syspath_prepend(tmp_path)
    configure(jinja_backend(loader=jinja2.PackageLoader("some_package", "pages")))
    assert registry.fill() == []
    page = tmp_path / "some_package" / "pages" / "page.html"
    page.write_text("new")
    assert render("page.html", {}) == "old"
    assert registry.refresh(page) is True
    assert render("page.html", {}) == "new"


def test_jinja_templates_are_refreshed(jinja: Path, error_log: list[logging.LogRecord]) -> None:
    write(jinja, {"base.html": "old", "page.html": "{% extends 'base.html' %}", "same.html": ""})
    registry.fill()
    same = loaded("same.html").template
    write(jinja, {"base.html": "new", "more.html": "more"})
    assert registry.refresh(jinja / "base.html") is True
    assert [render(name, {}) for name in ("page.html", "more.html")] == ["new", "more"]
    assert loaded("same.html").template is same
    write(jinja, {"base.html": "{% if %}"})
    registry.refresh(jinja / "base.html")
    assert "base.html:1: " in error_log.pop().getMessage()
    (jinja / "more.html").unlink()
    registry.refresh(jinja / "more.html")
    with pytest.raises(TemplateDoesNotExist):
        render("more.html", {})


def test_jinja_loaders_of_loaders_are_followed(tmp_path: Path, configure: Configure) -> None:
    write(tmp_path, {"one/page.html": "one", "two/page.html": "two"})
    loader = jinja2.ChoiceLoader(
        [
            jinja2.DictLoader({"memory.html": "memory"}),
            jinja2.FileSystemLoader(tmp_path / "one"),
            jinja2.PrefixLoader({"two": jinja2.FileSystemLoader(tmp_path / "two")}),
        ]
    )
    configure(jinja_backend(loader=loader))
    assert registry.fill() == []
    names = ("memory.html", "page.html", "two/page.html")
    with opened as paths:
        assert [render(name, {}) for name in names] == ["memory", "one", "two"]
    assert paths == []
    write(tmp_path, {"two/page.html": "new"})
    assert registry.refresh(tmp_path / "two" / "page.html") is True
    assert render("two/page.html", {}) == "new"


def test_a_jinja_loader_that_cannot_list_is_named_and_works(
    configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    configure(jinja_backend(loader=jinja2.FunctionLoader({"page.html": "page"}.get)))
    with caplog.at_level(logging.WARNING, "tornjango.templates"):
        assert registry.fill() == []
    assert "jinja2.loaders.FunctionLoader cannot list its templates" in caplog.text
    assert render("page.html", {}) == "page"


class Shouting(BaseEngine):
    """A backend of a kind that nobody knows."""

    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__({key: value for key, value in params.items() if key != "OPTIONS"})

    def get_template(self, template_name: str) -> Any:
        if template_name != "page.html":
            raise TemplateDoesNotExist(template_name, backend=self)
        return SimpleNamespace(render=lambda context, request: template_name.upper())


def test_a_backend_of_an_unknown_kind_is_named_and_works(
    folder: Path, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    configure(django_backend(DIRS=[folder]), {"BACKEND": f"{__name__}.Shouting"})
    with caplog.at_level(logging.WARNING, "tornjango.templates"):
        assert registry.fill() == []
    assert f"{__name__}.Shouting cannot list its templates" in caplog.text
    assert registry.refresh(folder / "page.html") is True
    assert render("page.html", {}) == "PAGE.HTML"


def test_a_jinja_environment_without_a_loader_is_left_alone(configure: Configure) -> None:
    configure(jinja_backend(loader=None))
    assert registry.fill() == []


def test_jinja_overlays_and_globals_work_as_before(jinja: Path) -> None:
    write(jinja, {"page.html": "{{ x }}{{ y }}"})
    registry.fill()
    environment = backend("jinja2").env
    overlay = environment.overlay(autoescape=False)
    with opened as paths:
        assert overlay.get_template("page.html").render(x="<") == "<"
        assert environment.get_template("page.html", globals={"y": "y"}).render(x="<") == "&lt;y"
    assert paths == []


# Rendering


def test_rendering_takes_what_render_to_string_takes(folder: Path) -> None:
    write(folder, {"page.html": "{{ x }}{{ request.path }}{% csrf_token %}"})
    processor = "django.template.context_processors.request"
    with override_settings(
        TEMPLATES=[django_backend(DIRS=[folder], OPTIONS={"context_processors": [processor]})]
    ):
        registry.fill()
        request = RequestFactory().get("/path/")
        request.META["CSRF_COOKIE"] = "a" * 32
        page = on_loop(lambda: render(["gone.html", "page.html"], {"x": "<"}, request))
        assert page.startswith("&lt;/path/<input")
        assert render("page.html") == ""
        with pytest.raises(TemplateDoesNotExist, match=r"gone\.html, lost\.html"):
            render(["gone.html", "lost.html"], {})


def test_rendering_does_not_change_the_context(jinja: Path) -> None:
    write(jinja, {"page.html": "{{ request.path }}"})
    registry.fill()
    context: dict[str, Any] = {}
    assert render("page.html", context, RequestFactory().get("/path/")) == "/path/"
    assert context == {}


@pytest.fixture
def entry(database: None) -> Entry:
    blog = Blog.objects.create(name="Blog")
    editor = Author.objects.create(name="Ed")
    pk = Entry.objects.create(blog=blog, editor=editor, title="Title").pk
    found: Entry = Entry.objects.get(pk=pk)
    return found


@pytest.mark.parametrize(
    ("source", "written", "line"),
    [
        ("\n{{ entry.editor.name }}", "entry.editor.name", 2),
        ("{{ entry.editor.name|upper }}", "entry.editor.name|upper", 1),
        ("{% if entry.editor.name == 'x' %}{% endif %}", "entry.editor.name", 1),
        ("{% if not entries.exists %}empty{% endif %}", "entries.exists", 1),
        ("{% if x and entries.exists or y %}some{% endif %}", "entries.exists", 1),
        ("{% if entries %}some{% endif %}", "{% if entries %}", 1),
        ("{{ entries.count }}", "entries.count", 1),
        ("{{ entries|length }}", "entries|length", 1),
        ("{{ x|add:entries.count }}", "x|add:entries.count", 1),
        ("{{ entries }}", "entries", 1),
        ("{% with n=entries.count %}{{ n }}{% endwith %}", "entries.count", 1),
        ("{% for e in entries %}{{ e }}{% endfor %}", "entries", 1),
        ("{% for e in entries.all %}\n{{ e }}{% endfor %}", "entries.all", 1),
        ("{% for a in '12' %}\n{{ entry.authors.count }}{% endfor %}", "entry.authors.count", 2),
        ("{% load mine %}{% ask entries.first %}", "entries.first", 1),
        ("{% load mine %}\n{% count_all model %}", "{% count_all model %}", 2),
        ("{% load mine %}{{ entries|careless }}", "entries|careless", 1),
        ("{% regroup entries by title as groups %}", "{% regroup entries by title as groups %}", 1),
        ("{% include entries.first.title %}", "entries.first.title", 1),
        ("{% firstof entries.first x %}", "entries.first", 1),
        ("{{ entries.first.title|default:'-' }}", "entries.first.title|default:'-'", 1),
    ],
)
def test_a_query_in_mid_rendering_is_an_error_that_names_the_variable(
    folder: Path, entry: Entry, source: str, written: str, line: int
) -> None:
    write(folder, {"blog/page.html": source, "Title": ""})
    options = {"libraries": {"mine": "tests.template_tags"}}
    context = {"entry": entry, "entries": Entry.objects.all(), "x": 1, "model": NotCalled}
    with override_settings(TEMPLATES=[django_backend(DIRS=[folder], OPTIONS=options)]):
        assert registry.fill() == []
        message = refused("blog/page.html", context)
        # Where no loop runs, it may query.
        assert isinstance(render("blog/page.html", context), str)
    start = f"{written} in template 'blog/page.html', line {line} would query the database"
    assert message.startswith(start)
    assert "select_related()" in message


class NotCalled:
    """A model as a tag's argument: a template would call the class."""

    do_not_call_in_templates = True
    objects = Entry.objects


def test_without_fill_the_error_is_the_same(folder: Path, entry: Entry) -> None:
    write(folder, {"page.html": "{{ entry.editor.name }}"})
    start = "entry.editor.name in template 'page.html', line 1 would query"
    assert refused("page.html", {"entry": entry}).startswith(start)


def test_the_error_tells_the_way_through_other_templates(folder: Path, entry: Entry) -> None:
    write(
        folder,
        {
            "base.html": "{% block a %}{% endblock %}",
            "page.html": "{% extends 'base.html' %}{% block a %}\n{% include 'part.html' with e=entry %}{% endblock %}",
            "part.html": "{{ e.editor }}",
        },
    )
    registry.fill()
    message = refused("page.html", {"entry": entry})
    assert message.startswith("e.editor in template 'part.html', line 1 would query")
    way = (
        "It is reached from {% include 'part.html' with e=entry %} in template 'page.html', line 2."
    )
    assert message.endswith(way)


def test_the_error_tells_the_field_of_a_form(
    tmp_path: Path, configure: Configure, entry: Entry
) -> None:
    class EntryForm(forms.Form):
        blog = forms.ModelChoiceField(Blog.objects.all())

    write(tmp_path, {"field.html": "\n{{ form.blog }}", "form.html": "\n\n{{ form }}"})
    configure(django_backend(DIRS=[tmp_path]), FORM_RENDERER=DJANGO_RENDERER)
    registry.fill()
    message = refused("field.html", {"form": EntryForm()})
    assert message.startswith("form.blog in template 'field.html', line 2 would query")
    message = refused("form.html", {"form": EntryForm()})
    assert "would query" in message
    assert message.endswith("It is reached from form in template 'form.html', line 3.")


def test_a_node_that_no_template_holds_is_told_as_well_as_can_be(
    folder: Path, database: None
) -> None:
    write(folder, {"page.html": "{% bare %}"})
    options = {"builtins": ["tests.template_tags"]}
    with override_settings(TEMPLATES=[django_backend(DIRS=[folder], OPTIONS=options)]):
        registry.fill()
        message = refused("page.html", {"entries": Entry.objects.all()})
    assert message.startswith("<Variable Node: entries> in template '<unknown source>' would query")
    assert message.endswith("It is reached from {% bare %} in template 'page.html', line 1.")


def test_a_jinja_template_without_a_name_is_told_as_well_as_can_be(
    jinja: Path, database: None
) -> None:
    write(jinja, {"page.html": "{{ inner() }}"})
    registry.fill()
    inner = backend("jinja2").env.from_string("{{ entries.count() }}")
    message = refused("page.html", {"inner": lambda: inner.render(entries=Entry.objects)})
    assert message.startswith("Something in template '<unknown source>', line 1 would query")
    assert message.endswith("It is reached from {{ inner() }} in template 'page.html', line 1.")


def test_a_context_processor_that_queries_is_named(folder: Path, database: None) -> None:
    write(folder, {"page.html": "{{ entries }}"})
    options = {"context_processors": [f"{__name__}.sidebar"]}
    with override_settings(TEMPLATES=[django_backend(DIRS=[folder], OPTIONS=options)]):
        registry.fill()
        message = refused("page.html", {}, RequestFactory().get("/"))
        assert message.startswith(f"{__name__}.sidebar, line ")
        assert render("page.html", {}, RequestFactory().get("/")) == "[]"


def sidebar(request: HttpRequest) -> dict[str, Any]:
    return {"entries": list(Entry.objects.all())}


def test_the_debug_page_shows_where_the_template_would_query(
    tmp_path: Path, configure: Configure, entry: Entry
) -> None:
    write(tmp_path, {"page.html": "one\n{{ entry.editor }}\nthree"})
    configure(django_backend(DIRS=[tmp_path], OPTIONS={"debug": True}))
    registry.fill()
    with pytest.raises(TemplateQueryError) as caught:
        on_loop(lambda: render("page.html", {"entry": entry}))
    info = caught.value.template_debug  # type: ignore[attr-defined]
    assert (info["during"], info["line"], info["name"]) == (
        "{{ entry.editor }}",
        2,
        str(tmp_path / "page.html"),
    )
    assert "would query the database" in info["message"]


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("\n{{ entry.editor.name }}", "{{ entry.editor.name }}"),
        ("\n{% for e in entries %}{% endfor %}", "{% for e in entries %} {% endfor %}"),
        (
            "\n{% if not entries.exists() %}empty{% endif %}",
            "{% if not entries.exists() %} {% endif %}",
        ),
    ],
)
def test_a_query_in_a_jinja_template_is_an_error_that_names_the_tag(
    jinja: Path, entry: Entry, source: str, written: str
) -> None:
    base = "{% block a %}{% endblock %}"
    page = "{% extends 'base.html' %}\n{% block a %}" + source + "{% endblock %}"
    write(jinja, {"base.html": base, "page.html": page})
    context = {"entry": entry, "entries": Entry.objects.all()}
    before = refused("page.html", context)
    registry.fill()
    message = refused("page.html", context)
    assert message == before
    assert written.split(" %}")[0] in message
    assert "in template 'page.html', line 3 would query" in message
    assert "reached from" not in message
    assert isinstance(render("page.html", context), str)


def test_what_else_must_not_run_on_a_loop_is_the_same_error(folder: Path) -> None:
    def refuses() -> None:
        raise SynchronousOnlyOperation("not here")

    write(folder, {"page.html": "{{ refuses }}"})
    registry.fill()
    assert refused("page.html", {"refuses": refuses}).startswith("refuses in template 'page.html'")


def test_connections_are_as_before_after_a_rendering(folder: Path, entry: Entry) -> None:
    write(folder, {"page.html": "{{ entry.editor }}"})
    registry.fill()
    before = dict(vars(connection))
    refused("page.html", {"entry": entry})
    assert dict(vars(connection)) == before
    assert render("page.html", {"entry": entry}) != ""


def test_other_exceptions_pass_unchanged(folder: Path) -> None:
    def fails() -> None:
        raise ValueError("mine")

    write(folder, {"page.html": "{{ fails }}"})
    registry.fill()
    with pytest.raises(ValueError, match="mine"):
        on_loop(lambda: render("page.html", {"fails": fails}))


def test_where_django_lets_queries_onto_the_loop_so_do_we(
    folder: Path, entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")
    write(folder, {"page.html": "{{ entry.editor.name }}"})
    registry.fill()
    assert on_loop(lambda: render("page.html", {"entry": entry})) == "Ed"


# Querysets of a context


def test_querysets_are_found_where_a_template_would_look(database: None) -> None:
    page = Paginator(Entry.objects.all(), 10).page(1)
    context = {
        "entries": Entry.objects.all(),
        "raw": Entry.objects.raw("select * from app_entry"),
        "boxes": [Blog.objects.all(), 1],
        "more": {"latest": Blog.objects.all(), 2: "x"},
        "page_obj": page,
        "manager": Entry.objects,
        "deep": [[Entry.objects.all()]],
    }
    names = ["entries", "raw", "boxes.0", "more.latest", "page_obj.object_list"]
    assert list(querysets(context)) == names
    assert querysets(context)["entries"] is context["entries"]


def test_a_queryset_that_stands_twice_is_given_once(database: None) -> None:
    entries = Entry.objects.all()
    assert list(querysets({"object_list": entries, "entry_list": entries})) == ["object_list"]


def test_a_queryset_that_was_evaluated_is_left_out(database: None) -> None:
    entries = Entry.objects.all()
    list(entries)
    assert querysets({"entries": entries}) == {}
    assert querysets(None) == {}


def test_a_problem_reads_as_file_line_and_message() -> None:
    assert str(TemplateProblem("a.html", "/t/a.html", 3, "Bad.")) == "/t/a.html:3: Bad."
    assert str(TemplateProblem("a.html", "/t/a.html", None, "Bad.")) == "/t/a.html: Bad."
