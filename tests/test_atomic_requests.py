from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from django.db import connections

from tests import atomic_views
from tests.app.models import Blog, Entry
from tests.database import Watcher, until
from tests.postgres import Postgres
from tests.serving import Site, serving

BY_CALLBACKS, BY_AWAITING = {"raw", "callback"}, {"async", "nested", "one", "two", "raw"}


@pytest.fixture(autouse=True)
def _atomic(database: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", True)
    atomic_views.seen.clear()


@pytest.fixture
def watcher(postgres: Postgres) -> Iterator[Watcher]:
    watcher = Watcher(postgres.dsn("tornjango"))
    yield watcher
    watcher.close()


@asynccontextmanager
async def site(**settings: Any) -> AsyncIterator[Site]:
    atomic_views.gates.update(parked=asyncio.Event())
    async with serving(ROOT_URLCONF="tests.atomic_views", **settings) as site:
        yield site


async def names() -> set[str]:
    return {blog.name async for blog in Blog.objects.all()}


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("path", "created"),
    [
        ("/sync/", {"sync"}),
        ("/green/", {"green"}),
        ("/async/", BY_AWAITING),
        ("/callbacks/", BY_CALLBACKS),
        ("/many/", {"kept"}),
        ("/early/", {"slow"}),
    ],
)
async def test_it_is_committed_when_the_answer_comes(path: str, created: set[str]) -> None:
    async with site() as server:
        answer = await server.request(path)
        assert (answer.status, await names()) == (200, created)


@pytest.mark.gen_test
@pytest.mark.parametrize("path", ["/sync/", "/green/", "/async/", "/callbacks/", "/many/"])
@pytest.mark.parametrize(("end", "status"), [("error", 500), ("404", 404), ("overloaded", 503)])
async def test_it_is_rolled_back_when_the_view_raises(
    path: str, end: str, status: int, error_log: list[Any]
) -> None:
    async with site() as server:
        answer = await server.request(f"{path}?end={end}")
        assert (answer.status, await names()) == (status, set())
    error_log.clear()


@pytest.mark.gen_test
async def test_all_that_a_view_does_is_in_it() -> None:
    async with site() as server:
        await server.request("/async/")
        await server.request("/green/?end=404")
        await server.request("/callbacks/")
    assert atomic_views.seen == [5, True, 7]


@pytest.mark.gen_test
@pytest.mark.parametrize("path", ["/sync/", "/async/", "/callbacks/"])
async def test_it_is_rolled_back_though_middleware_mends_the_error(
    path: str, error_log: list[Any]
) -> None:
    async with site(MIDDLEWARE=["tests.atomic_views.Mends"]) as server:
        answer = await server.request(f"{path}?end=error")
        assert (answer.body, await names()) == (b"mended", set())
    error_log.clear()


@pytest.mark.gen_test
async def test_what_the_commit_refuses_is_an_error_of_the_view(error_log: list[Any]) -> None:
    async with site() as server:
        assert (await server.request("/orphan/")).status == 500
        assert not await Entry.objects.aexists()
    assert "violates foreign key constraint" in str(error_log.pop().exc_info[1])


@pytest.mark.gen_test
async def test_it_is_rolled_back_when_a_response_times_out(
    watcher: Watcher, error_log: list[Any]
) -> None:
    async with site() as server:
        assert (await server.request("/late/")).status == 504
        assert await names() == set()
        await until(lambda: not watcher.running("too late"))
    error_log.clear()


@pytest.mark.gen_test
@pytest.mark.parametrize("path", ["/parks/", "/parks-async/"])
async def test_it_is_rolled_back_when_the_client_leaves(path: str, watcher: Watcher) -> None:
    async with site() as server:
        client = await server.connect()
        await client.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await atomic_views.gates["parked"].wait()
        await until(lambda: watcher.running("parked"))
        client.abort()
        await until(lambda: not server.application.in_flight)
        await until(lambda: not watcher.running("parked"))
        assert await names() == set()
        assert not watcher.rows("select 1 from pg_stat_activity where state ~ 'in transaction'")


@pytest.mark.gen_test
@pytest.mark.parametrize("path", ["/parks/", "/parks-async/"])
async def test_it_is_rolled_back_when_the_server_stops(
    path: str, watcher: Watcher, error_log: list[Any]
) -> None:
    async with site() as server, await server.connect() as client:
        await client.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await until(lambda: watcher.running("parked"))
        server.server.stop(grace=0)
        assert (await client.response()).status == 503
    await until(lambda: not watcher.running("parked"))
    assert not watcher.rows("select 1 from app_blog")


@pytest.mark.gen_test
async def test_a_view_may_stay_out_of_it(error_log: list[Any]) -> None:
    async with site() as server:
        assert (await server.request("/apart/?end=error")).status == 500
        assert await names() == {"apart"}
    error_log.clear()


@pytest.mark.gen_test
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_methods_of_both_kinds_are_in_it(method: str, error_log: list[Any]) -> None:
    async with site() as server:
        assert (await server.request("/mixed/", method=method)).status == 500
        assert await names() == set()
    error_log.clear()


@pytest.mark.gen_test
async def test_requests_at_once_have_transactions_of_their_own() -> None:
    async with site() as server:
        ends = [f"/callbacks/{end}" for end in ("", "?end=404") * 5]
        answers = await asyncio.gather(*map(server.request, ends))
        assert [answer.status for answer in answers] == [200, 404] * 5
        assert await Blog.objects.acount() == 10
