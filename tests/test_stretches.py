from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from django.test import override_settings
from django.utils.functional import SimpleLazyObject

from tests import views
from tests.serving import Site, serving, until
from tests.stretch_views import Parked, local
from tests.threads import worker_calls
from tornjango import Application, stretches
from tornjango.exceptions import ConfigurationError
from tornjango.stretches import Stretch
from tornjango.testing import RawClient

HERE = "tests.stretch_views"
LOOP = threading.main_thread().name
THREADS = 4


@asynccontextmanager
async def behind(*middleware: str, **options: Any) -> AsyncIterator[Site]:
    Parked.now = Parked.most = 0
    names = [name if "." in name else f"{HERE}.{name}" for name in middleware]
    settings = {"THREADS": THREADS, **options}
    async with serving(ROOT_URLCONF=HERE, MIDDLEWARE=names, TORNJANGO=settings) as site:
        yield site


@asynccontextmanager
async def asking(site: Site, count: int, path: str) -> AsyncIterator[list[RawClient]]:
    """Clients with a request each, of a user each."""
    clients = [await site.connect() for _ in range(count)]
    for number, client in enumerate(clients):
        target = path.format(user=f"user{number}")
        await client.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    yield clients
    for client in clients:
        client.abort()


async def answers(clients: list[RawClient]) -> list[Any]:
    return [await client.response() for client in clients]


def threads_of(site: Site) -> int:
    return len(site.application.workers.pool._threads)


async def released(site: Site) -> None:
    """Returns when all requests have given their threads back."""
    await until(lambda: site.application.workers.pool._unfinished == 0)


@pytest.mark.parametrize("path", ["/park/", "/deferred-park/"])
@pytest.mark.gen_test
async def test_a_parked_view_holds_no_thread_of_the_middleware_around_it(path: str) -> None:
    async with behind("plain") as site, asking(site, 200, path + "?user={user}") as clients:
        await until(lambda: Parked.now == 200)
        assert threads_of(site) == THREADS
        views.gates["go"].set()
        found = await answers(clients)
        bodies = [answer.body.decode() for answer in found]
        assert bodies == [f"user{number} en-us" for number in range(200)]
        assert {answer.header("X-Same-Thread") for answer in found} == {"True"}
        await released(site)


@pytest.mark.parametrize("middleware", ["keeping", "leaving", "stacking", "Hooks"])
@pytest.mark.gen_test
async def test_a_thread_is_held_where_something_is_kept_in_it(middleware: str) -> None:
    async with behind(middleware) as site, asking(site, 20, "/park/?user={user}") as clients:
        await until(lambda: Parked.now == THREADS)
        views.gates["go"].set()
        found = await answers(clients)
        assert Parked.most <= THREADS
        for number, answer in enumerate(found):
            assert answer.header("X-User") == f"user{number}"
            assert answer.body.startswith(f"user{number}".encode())


@pytest.mark.gen_test
async def test_what_another_request_leaves_in_a_thread_is_not_seen_by_one_that_is_parked() -> None:
    async with behind("leaving", THREADS=1) as site, asking(site, 3, "/park/?user=nobody") as first:
        await until(lambda: Parked.now == 3)
        async with asking(site, 1, "/sync/?user={user}") as second:
            (answer,) = await answers(second)
            assert answer.header("X-User") == "user0"  # and it is still in the thread
        views.gates["go"].set()
        assert {answer.header("X-User") for answer in await answers(first)} == {"nobody"}


@pytest.mark.gen_test
async def test_a_thread_is_held_in_a_transaction() -> None:
    async with behind("in_transaction") as site, asking(site, 9, "/park/?user={user}") as clients:
        await until(lambda: Parked.now == THREADS)
        views.gates["go"].set()
        assert {answer.status for answer in await answers(clients)} == {200}
        assert Parked.most <= THREADS


@pytest.mark.parametrize(
    "middleware", [["plain"], ["plain", "keeping"], ["plain", "AsyncOnly", "keeping"]]
)
@pytest.mark.gen_test
async def test_a_sync_view_runs_in_the_thread_of_the_middleware_around_it(
    middleware: list[str],
) -> None:
    async with behind(*middleware) as site, asking(site, 30, "/sync/?user={user}") as clients:
        for number, answer in enumerate(await answers(clients)):
            user = f"user{number} " if "keeping" in middleware else ""
            assert answer.body.decode() == f"{user}True"
            assert answer.header("X-Same-Thread") == "True"


@pytest.mark.gen_test
async def test_middleware_that_can_be_sync_shares_the_stretch_of_that_which_must() -> None:
    names = ("plain", "django.middleware.common.CommonMiddleware", "keeping")
    async with behind(*names) as site:
        with worker_calls() as calls:
            views.gates["go"].set()
            answer = await site.request("/park/?user=ann")
        assert (answer.header("X-User"), len(calls)) == ("ann", 1)


@pytest.mark.gen_test
async def test_djangos_own_middleware_outside_of_it_stays_on_the_loop() -> None:
    names = ("django.middleware.common.CommonMiddleware", "AsyncOnly", "plain")
    async with behind(*names) as site:
        views.gates["go"].set()
        answer = await site.request("/park/?user=ann")
        assert answer.header("X-Async-Only") == LOOP
        assert answer.header("Content-Length")


@pytest.mark.gen_test
async def test_hooks_of_one_middleware_share_a_thread_with_each_other_and_a_sync_view() -> None:
    async with behind("Hooks") as site:
        for user in ("ann", "bob"):
            answer = await site.request(f"/sync/?user={user}")
            assert (answer.body, answer.header("X-User")) == (f"{user} False".encode(), user)
            assert (await site.request(f"/sync-fails/?user={user}")).body == (
                f"mended for {user}: {user}".encode()
            )
            for path in ("template", "async-template"):
                answer = await site.request(f"/{path}/?user={user}")
                assert answer.body == f"user: {user} in False\n".encode()


@pytest.mark.gen_test
async def test_context_is_carried_both_ways() -> None:
    languages = ["de", "fr", "en"]
    async with behind("carrying") as site:
        clients = [await site.connect() for _ in range(30)]
        for number, client in enumerate(clients):
            target = f"/park/?user=user{number}&language={languages[number % 3]}"
            await client.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await until(lambda: Parked.now == 30)
        views.gates["go"].set()
        for number, answer in enumerate(await answers(clients)):
            language = languages[number % 3]
            assert answer.body.decode() == f"user{number} {language}"
            assert answer.header("X-Variable") == f"user{number} in the view"
            assert answer.header("X-Language") == language
            clients[number].abort()


@pytest.mark.gen_test
async def test_a_client_that_leaves_has_the_parked_view_cancelled_and_the_middleware_ended() -> (
    None
):
    async with behind("plain", "failing") as site:
        async with asking(site, 10, "/park/?user={user}"):
            await until(lambda: Parked.now == 10)
        await until(lambda: not site.application.in_flight)
        await until(lambda: views.seen.count("finally") == 10)
        assert views.seen.count("cancelled") == 10
        await released(site)
        views.gates["go"].set()
        assert (await site.request("/park/?user=ann")).status == 200


@pytest.mark.gen_test
async def test_what_a_view_raises_comes_through(error_log: list[Any]) -> None:
    async with behind("plain", "failing") as site:
        views.gates["go"].set()
        assert (await site.request("/park/?user=ann&fail=1")).status == 500
        assert error_log.pop().getMessage() == "Internal Server Error: /park/"
        assert views.seen == ["finally"]


@pytest.mark.gen_test
async def test_a_stream_outlives_the_stretch() -> None:
    async with behind("plain") as site, asking(site, 20, "/stream/?user={user}") as clients:
        for client in clients:
            await client.head()
            assert await client.chunk() == b"one "
        await released(site)
        views.gates["go"].set()
        for client in clients:
            assert await client.chunk() == b"two"


@pytest.mark.gen_test
async def test_a_full_queue_is_answered_503_also_inside_of_async_middleware(
    error_log: list[Any],
) -> None:
    names = ("AsyncOnly", "keeping")
    async with (
        behind(*names, THREADS=1, THREADS_QUEUE=1) as site,
        asking(site, 2, "/park/?user={user}") as clients,
    ):
        await until(lambda: site.application.workers.pool._unfinished == 2)
        answer = await site.request("/park/?user=ann")
        assert (answer.status, answer.header("Retry-After")) == (503, "1")
        assert "/park/ is answered 503" in error_log.pop().getMessage()
        views.gates["go"].set()
        assert [answer.status for answer in await answers(clients)] == [200, 200]


@pytest.mark.gen_test
async def test_requests_that_are_parked_are_not_in_the_queue() -> None:
    async with (
        behind("plain", THREADS=1, THREADS_QUEUE=5) as site,
        await site.connect() as client,
    ):
        parked = []
        for number in range(20):
            parked.append(await site.connect())
            head = f"GET /park/?user=user{number} HTTP/1.1\r\nHost: localhost\r\n\r\n"
            await parked[-1].send(head.encode())
            await until(lambda number=number: Parked.now == number + 1)  # type: ignore[misc]
        assert (await client.request("/sync/?user=ann")).body == b"True"
        views.gates["go"].set()
        for one in parked:
            assert (await one.response()).status == 200
            one.abort()


# On the loop


@pytest.mark.gen_test
async def test_middleware_that_the_project_names_runs_on_the_loop() -> None:
    async with (
        behind("green", LOOP_MIDDLEWARE=[f"{HERE}.green"]) as site,
        asking(site, 20, "/park/?user={user}") as clients,
    ):
        with worker_calls() as calls:
            await until(lambda: Parked.now == 20)
            views.gates["go"].set()
            for answer in await answers(clients):
                assert (answer.header("X-Thread"), answer.header("X-Row")) == (LOOP, "2")
        assert calls == []


@pytest.mark.gen_test
async def test_hooks_of_middleware_on_the_loop_run_there() -> None:
    async with behind("Hooks", LOOP_MIDDLEWARE=[f"{HERE}.Hooks"]) as site:
        views.gates["go"].set()
        answer = await site.request("/park/?user=ann&fail=1")
        assert (answer.body, answer.header("X-User")) == (b"mended for ann: in the view", "ann")
        answer = await site.request("/async-template/?user=ann")
        assert answer.body == b"user: ann in True\n"


def test_a_name_that_is_not_middleware_is_an_error() -> None:
    options = {"LOOP_MIDDLEWARE": ["no.such"]}
    with (
        override_settings(TORNJANGO=options),
        pytest.raises(ConfigurationError, match=r"not in MIDDLEWARE: no\.such"),
    ):
        Application()


# What is compared


class Thing:
    attribute: Any = None


@pytest.mark.parametrize(
    ("value", "change"),
    [
        ([], lambda it: it.append(1)),
        ({}, lambda it: it.update(a=1)),
        ({"a": 1}, lambda it: it.update(a=2)),
        (set(), lambda it: it.add(1)),
        (deque(), lambda it: it.append(1)),
        (Thing(), lambda it: setattr(it, "attribute", 1)),
        (list(range(1000)), lambda it: it.append(1)),
    ],
)
def test_a_change_inside_of_what_is_kept_is_seen(value: Any, change: Any) -> None:
    stretches.find_locals()
    local.value = value
    try:
        stretch = Stretch()
        assert stretch.can_pause()
        change(value)
        assert not stretch.can_pause()
    finally:
        del local.value


def test_a_local_that_is_made_later_is_found_with_the_next_import() -> None:
    stretches.find_locals()
    stretch = Stretch()
    late = threading.local()
    late.user = "ann"
    stretches._modules -= 1
    assert not stretch.can_pause()
    del late
    gc.collect()
    assert stretch.can_pause()


def test_a_lazy_object_is_not_evaluated() -> None:
    def evaluate() -> None:
        raise AssertionError

    stretches.find_locals()
    local.lazy = SimpleLazyObject(evaluate)
    try:
        assert Stretch().can_pause()
    finally:
        del local.lazy


def test_what_is_frozen_is_found_and_stays_frozen() -> None:
    gc.freeze()
    try:
        stretches.find_locals()
        assert gc.get_freeze_count()
        assert any(it is local for it in stretches._locals())
    finally:
        gc.unfreeze()
