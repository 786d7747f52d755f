"""A process of its own that fills the registry, renders pages of the admin, and prints each file opened meanwhile.

    python -m tests.cold_render LANGUAGE_CODE FORM_RENDERER DEBUG

Last it prints how many pages it rendered. Its own process, because the first page to be rendered is the one that counts.
"""

from __future__ import annotations

import sys
from typing import Any

rendering = False
pages = 0


def hook(event: str, args: tuple[Any, ...]) -> None:
    if rendering and event in ("open", "os.scandir", "os.listdir"):
        print(event, args[0])


def watch() -> None:
    from django.template.response import SimpleTemplateResponse

    content = SimpleTemplateResponse.rendered_content.fget  # type: ignore[attr-defined]

    def rendered_content(self: SimpleTemplateResponse) -> str:
        global rendering, pages
        rendering, pages = True, pages + 1
        try:
            return str(content(self))
        finally:
            rendering = False

    SimpleTemplateResponse.rendered_content = property(rendered_content)  # type: ignore[assignment,method-assign]


def visit(user: Any) -> None:
    from django.test import Client

    client = Client()
    assert client.get("/admin/login/").status_code == 200
    assert client.post("/admin/login/", {"username": "x", "password": "y"}).status_code == 200
    client.force_login(user)
    for path in ADMIN_PAGES:
        assert client.get(path.format(user.pk)).status_code == 200, path
    wrong = client.post("/admin/auth/user/add/", {"username": "", "password1": "a"})
    assert wrong.status_code == 200


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


def main(language: str, renderer: str, debug: str) -> None:
    from django.conf import settings

    settings.LANGUAGE_CODE = language
    settings.FORM_RENDERER = renderer
    settings.DEBUG = debug == "True"
    if renderer.endswith("TemplatesSetting"):
        settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, "django.forms"]
    import django

    django.setup()
    from django.contrib.auth.models import User

    from tornjango import templates

    problems = templates.registry.fill()
    assert not problems, problems
    user = User.objects.create_superuser(f"cold {language} {renderer} {debug}", "", "secret")
    watch()
    sys.addaudithook(hook)
    try:
        visit(user)
    finally:
        user.delete()
    print(pages, "pages")


if __name__ == "__main__":
    main(*sys.argv[1:])
