"""A process of its own that fills the registry, renders pages, and prints each file that was opened meanwhile.

    python -m tests.cold_render admin LANGUAGE_CODE FORM_RENDERER DEBUG
    python -m tests.cold_render pages PATH...

Last it prints how many templates were rendered by name. A process of its own, because the first page is the one that
counts.
"""

from __future__ import annotations

import sys
import threading
from typing import Any
from urllib.request import urlopen

ADMIN_PAGES = (
    "/admin/",
    "/admin/auth/",
    "/admin/auth/user/",
    "/admin/auth/user/?q=nobody&is_staff__exact=1",
    "/admin/auth/user/add/",
    "/admin/auth/user/{}/change/",
    "/admin/auth/user/{}/history/",
    "/admin/auth/user/{}/delete/",
    "/admin/auth/user/{}/password/",
    "/admin/auth/group/",
    "/admin/auth/group/add/",
    "/admin/password_change/",
)

# The thread that renders.
rendering: int | None = None
rendered = 0


def hook(event: str, args: tuple[Any, ...]) -> None:
    if rendering == threading.get_ident() and event in ("open", "os.scandir", "os.listdir"):
        print(event, args[0])


def watch() -> None:
    """Has the hook listen while a template is rendered, all that it extends, includes and calls with it."""
    from django.template.backends.django import Template

    render = Template.render

    def watched(self: Template, *args: Any, **kwargs: Any) -> Any:
        global rendering, rendered
        if rendering:
            return render(self, *args, **kwargs)
        rendering, rendered = threading.get_ident(), rendered + 1
        try:
            return render(self, *args, **kwargs)
        finally:
            rendering = None

    Template.render = watched  # type: ignore[method-assign]
    sys.addaudithook(hook)


def render_admin(language: str, renderer: str, debug: str) -> None:
    import django
    from django.conf import settings

    settings.LANGUAGE_CODE = language
    settings.FORM_RENDERER = renderer
    settings.DEBUG = debug == "True"
    if renderer.endswith("TemplatesSetting"):
        settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, "django.forms"]
    django.setup()
    from django.contrib.auth.models import User

    from tornjango import templates

    user = User.objects.create_superuser(f"cold {language} {renderer} {debug}", "", "secret")
    problems = templates.registry.fill()
    assert not problems, problems
    watch()
    try:
        visit_admin(user)
    finally:
        user.delete()


def visit_admin(user: Any) -> None:
    from django.test import Client

    client = Client()
    assert client.get("/admin/login/").status_code == 200
    assert client.post("/admin/login/", {"username": "x", "password": "y"}).status_code == 200
    client.force_login(user)
    for path in ADMIN_PAGES:
        assert client.get(path.format(user.pk)).status_code == 200, path
    wrong = client.post("/admin/auth/user/add/", {"username": "", "password1": "a"})
    assert wrong.status_code == 200


def render_pages(*paths: str) -> None:
    from tornjango.testing import LiveServer

    with LiveServer() as server:
        assert not server.application.problems
        watch()
        for path in paths:
            with urlopen(server.url + path) as response:
                assert response.status == 200, path


if __name__ == "__main__":
    {"admin": render_admin, "pages": render_pages}[sys.argv[1]](*sys.argv[2:])
    print(rendered, "rendered")
