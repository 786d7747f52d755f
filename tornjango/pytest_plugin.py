"""For pytest: ``pytest_plugins = ["tornjango.pytest_plugin"]`` in the ``conftest.py`` of a project."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.test import modify_settings

from tornjango.testing import LiveServer


@pytest.fixture
def tornjango_server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """The project, served at ``tornjango_server.url`` by a thread, with pools on the test database.

    It sees what was committed: with pytest-django, ``transactional_db`` comes along with it.
    """
    if request.config.pluginmanager.hasplugin("django"):  # pytest-django
        request.getfixturevalue("transactional_db")
    with modify_settings(ALLOWED_HOSTS={"append": "127.0.0.1"}), LiveServer() as server:
        yield server
