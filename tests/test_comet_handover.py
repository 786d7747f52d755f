"""What a process has in memory, and the one that takes its place goes on with."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests import comet_channels  # noqa: F401 (declares the channels)
from tests.projects import Process, Project
from tornjango.comet import channels
from tornjango.comet.brokers.base import Draft
from tornjango.comet.hub import REVOKED, Hub
from tornjango.comet.log import Audience, Channel, Position, Reading
from tornjango.conf import get_config
from tornjango.exceptions import BrokerUnavailable

ROOM = channels.resolve("open:room").channel
SHORT = channels.resolve("short:room").channel


def hub() -> Hub:
    return Hub(get_config().COMET, None)


def draft(channel: Channel, value: object, audience: Audience | None = None) -> Draft:
    return Draft(
        channel,
        json.dumps({"channel": channel.name, "event": None, "data": value}).encode(),
        audience,
    )


def publish(hub: Hub, *drafts: Draft) -> Position:
    return hub.send(drafts, 5).result(5)


async def read(hub: Hub, channel: Channel, since: Position) -> Reading:
    return await hub.read({channel: since})


def data(reading: Reading) -> list[Any]:
    return [message.data for message in reading.messages]


async def handed_over(old: Hub, new: Hub) -> None:
    ours, theirs = socket.socketpair()
    new.expect(theirs)
    old.hand_over(ours)
    await new.ready()


@pytest.mark.gen_test
async def test_readers_go_on_where_they_stood() -> None:
    old, new = hub(), hub()
    start = old.present()
    only_ann = Audience(frozenset({"ann"}), frozenset({"staff"}))
    seen = publish(old, draft(ROOM, "ä"), draft(ROOM, 2, only_ann))
    publish(old, draft(ROOM, 3))
    await handed_over(old, new)
    publish(new, draft(ROOM, 4))
    everything = await read(new, ROOM, start)
    assert (data(everything), everything.gaps) == (["ä", 2, 3, 4], [])
    assert [message.audience for message in everything.messages] == [None, only_ann, None, None]
    assert data(await read(new, ROOM, seen)) == [3, 4]
    old.close(5)


@pytest.mark.gen_test
async def test_what_is_still_published_in_the_old_one_arrives_in_the_new_one() -> None:
    old, new = hub(), hub()
    start = publish(old, draft(ROOM, 1))
    await handed_over(old, new)
    sent: Sequence[Position] = [publish(old, draft(ROOM, value)) for value in (2, 3)]
    assert sent[1] == new.present()
    assert data(await read(new, ROOM, start)) == [2, 3]
    old.close(5)


@pytest.mark.gen_test
async def test_what_was_forgotten_stays_a_gap() -> None:
    old, new = hub(), hub()
    start = old.present()
    publish(old, *(draft(SHORT, value) for value in range(5)))
    await handed_over(old, new)
    assert (await read(new, SHORT, start)).gaps == [SHORT.name]
    assert data(await read(new, SHORT, Position(start.epoch, 2))) == [2, 3, 4]
    old.close(5)


@pytest.mark.gen_test
async def test_a_grant_that_was_revoked_stays_so() -> None:
    old, new = hub(), hub()
    granted = old.present()
    publish(old, draft(REVOKED, ROOM.name))
    await handed_over(old, new)
    assert new.revoked([(ROOM.name, granted)])
    assert not new.revoked([(SHORT.name, granted)])
    assert not new.revoked([(ROOM.name, new.present())])
    old.close(5)


@pytest.mark.gen_test
async def test_what_the_new_one_publishes_meanwhile_comes_after() -> None:
    old, new = hub(), hub()
    start = publish(old, draft(ROOM, 1))
    ours, theirs = socket.socketpair()
    new.expect(theirs)
    publish(new, draft(ROOM, "early"))
    reading = asyncio.ensure_future(read(new, ROOM, start))
    old.hand_over(ours)
    assert data(await reading) == ["early"]
    old.close(5)


@pytest.mark.gen_test
async def test_a_process_that_dies_before_it_handed_over_leaves_a_gap(
    error_log: list[Any],
) -> None:
    old, new = hub(), hub()
    start = publish(old, draft(ROOM, 1))
    ours, theirs = socket.socketpair()
    new.expect(theirs)
    ours.sendall(b'["00",')
    ours.close()
    await new.ready()
    assert (await read(new, ROOM, start)).gaps == [ROOM.name]
    assert "did not come over" in error_log.pop().getMessage()


@pytest.mark.gen_test
async def test_a_successor_that_dies_makes_publishing_fail(error_log: list[Any]) -> None:
    old = hub()
    ours, theirs = socket.socketpair()
    old.hand_over(ours)
    theirs.close()
    with pytest.raises(BrokerUnavailable, match="does not take its messages"):
        old.send([draft(ROOM, 1)], 0).result(5)
    old.close(5)
    error_log.clear()  # whoever noticed it first has said so, or raised


@pytest.mark.gen_test
async def test_a_file_is_taken_once(tmp_path: Path) -> None:
    old, new, later = hub(), hub(), hub()
    start = publish(old, draft(ROOM, 1))
    publish(old, draft(ROOM, 2))
    path = str(tmp_path / "comet")
    old.save(path)
    new.load(path)
    later.load(path)
    assert data(await read(new, ROOM, start)) == [2]
    assert (await read(later, ROOM, start)).gaps == [ROOM.name]


CHANNELS = """
from tornjango import comet

@comet.channel("room:<int:pk>")
async def everyone(request, pk):
    return True
"""
URLS = """
import os
from django.http import HttpResponse
from django.urls import include, path
from tornjango import comet

async def publish(request):
    comet.publish("room:7", request.GET["value"])
    return HttpResponse(str(os.getpid()))

urlpatterns = [path("", publish), path("comet/", include("tornjango.comet.urls"))]
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path, debug=True, apps=("tornjango", "app"))
    (tmp_path / "app").mkdir()
    project.write("app/__init__.py", "")
    project.write("app/channels.py", CHANNELS)
    project.write("urls.py", URLS)
    return project


def poll(server: Process, cursor: str = "") -> tuple[list[Any], list[str], str]:
    answer = json.loads(server.get(f"/comet/poll/?channel=room:7&cursor={quote(cursor)}"))
    return [it["data"] for it in answer["messages"]], answer["gaps"], answer["cursor"]


@pytest.mark.slow
def test_a_worker_that_is_replaced_hands_over(project: Project) -> None:
    serve = ("-m", "tornjango", "serve", "127.0.0.1:0", "--workers", "1")
    with project.running(*serve) as server:
        server.wait_until_it_serves()
        server.wait_for(" serves")
        _, _, cursor = poll(server)
        before = server.get("/?value=1")
        server.signal(signal.SIGHUP)
        server.wait_for("ended with exit code 0")
        assert server.get("/?value=2") != before
        values, gaps, cursor = poll(server, cursor)
        assert (values, gaps) == (["1", "2"], [])


@pytest.mark.slow
def test_a_reload_in_development_hands_over(project: Project, tmp_path: Path) -> None:
    with project.running("manage.py", "runserver", "127.0.0.1:0") as server:
        server.wait_until_it_serves()
        _, _, cursor = poll(server)
        server.get("/?value=1")
        server.change(tmp_path / "urls.py", URLS + "# changed\n")
        server.wait_until_it_serves()
        server.get("/?value=2")
        values, gaps, _ = poll(server, cursor)
        assert (values, gaps) == (["1", "2"], [])
