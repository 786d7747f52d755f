from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace

import pytest

from bench import comet, download, reload, routing
from bench.__main__ import FULL, QUICK, fill
from bench.comet_clients import Fleet as Members
from bench.comet_clients import Heard, unframe
from bench.comet_clients import Plan as Rooms
from bench.compare import CELLS, VIEWS, Pace, compare, report, views_of
from bench.figures import Sample, Summary, cost_cell, rate_cell, shares, summarize, table
from bench.load import Outcome, Plan, load
from bench.pollers import Fleet, Polls
from bench.profiling import analyse, layer_of
from bench.project.fill import BLOGS, PKS, year_and_sport
from bench.queries import Counts, environments
from bench.queries import figures as query_figures
from bench.queries import report as query_report
from bench.servers import (
    BARE,
    DAPHNE,
    GRANIAN,
    GUNICORN,
    PEERS,
    PSYCOPG,
    TORNJANGO,
    UVICORN,
    BenchError,
    Environment,
    Place,
)
from bench.ways import TASKS, Count, Way, count
from bench.wire import Answer, WireError, parse, request_bytes
from tests.postgres import Postgres

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"


def sample(requests: int = 100, seconds: float = 1.0, cpu: float = 1.0) -> Sample:
    return Sample(requests=requests, seconds=seconds, cpu=cpu, p50=1.0, p99=2.0)


def summary(cpu: float) -> Summary:
    return summarize([sample(cpu=cpu)])


@pytest.mark.parametrize("whole", [PLAIN, CHUNKED])
def test_answer_is_read_once_its_last_byte_is_there(whole: bytes) -> None:
    assert [parse(whole[:end]) for end in range(len(whole))] == [None] * len(whole)
    assert parse(whole + b"HTTP") == Answer(200, b"hello", len(whole), True)


def test_answer_that_ends_the_connection_says_so() -> None:
    answer = parse(PLAIN.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert answer is not None
    assert not answer.keep_alive


@pytest.mark.parametrize("bad", [b"HTTP/1.1 200 OK\r\n\r\n", PLAIN.replace(b"200", b"no")])
def test_bytes_that_are_no_answer_are_refused(bad: bytes) -> None:
    with pytest.raises(WireError):
        parse(bad)


def test_figures_are_medians_of_the_rounds() -> None:
    found = summarize([sample(cpu=0.9), sample(cpu=0.3), sample(cpu=0.6, seconds=2.0)])
    assert found.cpu_us == pytest.approx(6000)
    assert found.spread == pytest.approx(3)
    assert found.per_second == pytest.approx(100)
    assert found.busy == pytest.approx(0.3)
    assert (found.requests, found.rounds) == (300, 3)


@pytest.mark.parametrize("samples", [[], [sample(), sample(requests=0)]])
def test_no_figure_is_made_of_no_requests(samples: list[Sample]) -> None:
    with pytest.raises(ValueError, match="no requests"):
        summarize(samples)


def test_cells_compare_with_the_reference() -> None:
    assert cost_cell(summary(0.5), summary(1.0)) == "5,000 x0.50"
    assert cost_cell(summary(0.5), None) == "5,000"
    assert cost_cell(None, summary(1.0)) == "-"
    assert rate_cell(summary(1.0), summary(1.0)) == "100 x1.00"


def test_server_that_was_not_the_limit_is_marked() -> None:
    assert rate_cell(summary(0.5), None) == "100*"


def test_table_is_aligned() -> None:
    assert table(["", "a"], [["x", "10"], ["long", "9"]]) == "       a\nx     10\nlong   9"


def test_every_peer_is_measured_in_every_cell_it_can_serve() -> None:
    assert [views_of(peer, name) for peer in (TORNJANGO, PSYCOPG) for name in CELLS] == [
        ("json", "row", "fetch", "prepared", "twenty", "2009"),
        ("json", "row", "orm", "green", "page"),
    ] * 2
    for peer in (UVICORN, GRANIAN, DAPHNE, GUNICORN):
        assert views_of(peer, "none") == ("json", "row", "twenty", "2009")
        assert views_of(peer, "default") == ("json", "row", "orm", "page")
    assert [views_of(BARE, name) for name in CELLS] == [("json",), ()]
    assert set(VIEWS) == {view for views in CELLS.values() for view in views}


def test_tornjangos_own_ways_to_a_row_stand_beside_the_peers_one() -> None:
    samples = {(UVICORN.name, ("row", "none")): [sample(cpu=1.0)]}
    samples |= {(TORNJANGO.name, ("fetch", "none")): [sample(cpu=0.25)]}
    costs = report(samples).partition("Requests a second")[0]
    lines = {line.split("  ")[0]: line for line in costs.splitlines()}
    assert "2,500 x0.25" in lines["one row -> JSON, db.fetch, no middleware"]
    assert "10,000 x1.00" in lines["one row -> JSON, db.fetch, no middleware"]
    assert lines["one row -> JSON, aget, no middleware"].split()[-3:] == ["-", "10,000", "x1.00"]


def test_report_leaves_out_servers_that_were_not_asked_for() -> None:
    text = report(
        {
            (peer.name, (view, name)): [sample()]
            for peer in (UVICORN, GUNICORN)
            for name in CELLS
            for view in views_of(peer, name)
        }
    )
    header = text.splitlines()[1]
    assert [peer.name in header for peer in PEERS] == [
        peer in (UVICORN, GUNICORN) for peer in PEERS
    ]
    assert "1,600 requests measured, 0 errors" in text


def test_profile_gives_helpers_time_to_their_caller() -> None:
    template = ("/lib/site-packages/django/template/base.py", "render")
    assert layer_of(
        [("/lib/json.py", "dumps"), ("/x/django/utils/html.py", "escape"), template]
    ) == ("Django: rendering the template")
    assert layer_of([("/lib/json.py", "dumps")]) == "elsewhere"


def test_profile_shares_out_the_time_of_a_request() -> None:
    stacks = [([("/x/tornado/web.py", "f")], 3), ([("/x/momoko/pool.py", "g")], 1)]
    profile = analyse(stacks, "view", 200.0)
    assert [(share, us) for _, share, us in profile.layers] == [(0.75, 150.0), (0.25, 50.0)]
    assert shares({"a": 1}, 10.0) == [("a", 1.0, 10.0)]


@pytest.mark.parametrize("rows", [1, 25, 500])
def test_the_2009_view_has_the_rows_asked_for(rows: int) -> None:
    blogs = [year_and_sport(number, rows) for number in range(BLOGS)]
    assert blogs.count((2009, False)) == rows
    assert blogs.count((2009, True)) == rows


@contextlib.asynccontextmanager
async def serving(answer: Callable[[bytes, asyncio.StreamWriter], None]) -> AsyncIterator[int]:
    """The port of a server that hands each request to ``answer``; all its connections are closed at the exit."""
    connections: list[asyncio.Task[None]] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            while not writer.is_closing() and (request := await reader.read(1000)):
                answer(request, writer)

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.ensure_future(talk(reader, writer)))

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.gather(*connections)


def run_load(answer: bytes, *, most: int = 10) -> Outcome:
    """Against a server that gives every request the same bytes."""

    def reply(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        if b"close" in answer:
            writer.close()

    async def main() -> Outcome | WireError:
        async with serving(reply) as port:
            try:
                plan = Plan(port, [("/", "", "hello")], connections=2, seconds=30, most=most)
                return await load(plan)
            except WireError as error:
                return error

    outcome = asyncio.run(main())
    if isinstance(outcome, WireError):
        raise outcome
    return outcome


@pytest.mark.parametrize("answer", [PLAIN, CHUNKED])
def test_load_counts_the_right_answers(answer: bytes) -> None:
    outcome = run_load(answer)
    assert (outcome.requests, outcome.reconnects) == (10, 0)


def test_load_connects_again_when_the_server_closes() -> None:
    answer = PLAIN.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    outcome = run_load(answer)
    assert outcome.requests == 10
    assert outcome.reconnects >= 8


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (PLAIN.replace(b"200 OK", b"500 Oh"), "GET /: status 500"),
        (PLAIN.replace(b"hello", b"holla"), "GET /: a wrong body: b'holla', not b'hello'"),
        (b"SSH-2.0\r\n\r\n", "GET /: not the status line"),
    ],
)
def test_load_ends_at_the_first_wrong_answer(answer: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        run_load(answer)


def parked_polls(messages: list[str]) -> str:
    """Two polls parked and then answered by a server that publishes ``messages``; the cursor they go on from."""
    body = json.dumps({"messages": messages, "cursor": "2"}).encode()
    waiting: list[asyncio.StreamWriter] = []
    all_wait = asyncio.Event()

    def reply(request: bytes, writer: asyncio.StreamWriter) -> None:
        waiting.append(writer)
        if len(waiting) == 2:
            all_wait.set()
        if b"/publish" in request:
            for each in waiting:
                each.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    async def main() -> str | WireError:
        async with serving(reply) as port:
            fleet = Fleet(Polls(port, 2, "1", "/poll?cursor=", "/publish"))
            await fleet.park()
            await all_wait.wait()
            try:
                await fleet.publish()
                return fleet.cursor
            except WireError as error:
                return error
            finally:
                await fleet.hang_up()

    cursor = asyncio.run(main())
    if isinstance(cursor, WireError):
        raise cursor
    return cursor


def test_pollers_wait_for_every_answer_and_go_on_from_its_cursor() -> None:
    assert parked_polls(["something happened"]) == "2"


def test_pollers_refuse_an_answer_without_the_message() -> None:
    with pytest.raises(WireError, match="not the one message"):
        parked_polls([])


DOWNLOAD = PLAIN.replace(b"hello", b"hello" * 10**5).replace(b": 5", b": %d" % (5 * 10**5))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (DOWNLOAD, None),
        (DOWNLOAD[:-1] + b"x", "what arrived is not the file"),
        (DOWNLOAD[:-1], "what arrived is not the file"),
        (DOWNLOAD.replace(b"200 OK", b"500 Oh"), "not a download"),
    ],
)
def test_download_is_compared_with_the_file(answer: bytes, error: str | None) -> None:
    def reply(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    async def main() -> BaseException | None:
        wanted = hashlib.sha256(b"hello" * 10**5).digest()
        async with serving(reply) as port:
            done = asyncio.to_thread(download.load, port, "/", wanted)
            return (await asyncio.gather(done, return_exceptions=True))[0]

    found = asyncio.run(main())
    assert (str(found) if found else "None").find(error or "None") >= 0
    assert found is None or isinstance(found, BenchError)


def test_request_has_a_host() -> None:
    assert request_bytes("/a/").startswith(b"GET /a/ HTTP/1.1\r\nHost: 127.0.0.1\r\n")


def test_request_has_its_cookie_if_any() -> None:
    assert request_bytes("/", cookie="a=1").endswith(b"\r\nCookie: a=1\r\n\r\n")
    assert b"Cookie" not in request_bytes("/")


def calls(environment: Environment, way: str, queries: int, cpu: float) -> Counts:
    return {(environment, way): [Count(way, queries, calls=1000, cpu=cpu, seconds=2.0)] * 3}


def test_a_request_without_a_query_is_taken_off_those_of_django() -> None:
    counts = calls("peers", "empty", 0, 1.0)
    counts |= calls("peers", "one", 1, 2.0)
    counts |= calls("peers", "twenty", 20, 11.0)
    counts |= calls("momoko", "aget", 1, 0.5)
    found = query_figures(counts)
    assert {key[1]: round(figure.cpu_us) for key, figure in found.items()} == {
        "one": 1000,
        "twenty": 500,
        "aget": 500,
    }
    assert found["peers", "twenty"].per_second == pytest.approx(10_000)


def test_queries_are_compared_with_the_one_that_a_request_makes() -> None:
    counts = calls("peers", "empty", 0, 0.0) | calls("peers", "one", 1, 1.0)
    text = query_report(counts | calls("psycopg", "prepared", 1, 0.1))
    assert "psycopg 3, prepared" in text
    assert "100  x0.10" in text
    assert "are taken off" in text
    assert "taken off" not in query_report(calls("momoko", "aget", 1, 1.0))


def test_servers_that_are_not_asked_for_make_no_queries() -> None:
    assert environments(PEERS) == ["momoko", "psycopg", "peers"]
    assert environments([GUNICORN, BARE]) == []


def test_calls_of_a_way_are_counted() -> None:
    async def call(pk: int) -> SimpleNamespace:
        await asyncio.sleep(0)
        asked.append(pk)
        return SimpleNamespace(pk=pk)

    asked: list[int] = []
    found = asyncio.run(count(Way("a", 1, call), 0.02))
    assert found.calls == len(asked) >= TASKS
    assert set(asked) <= set(PKS)
    assert found.seconds >= 0.02


def test_a_wrong_row_ends_the_count() -> None:
    async def call(pk: int) -> SimpleNamespace:
        return SimpleNamespace(pk=pk + 1)

    with pytest.raises(ValueError, match="row 2, not 1"):
        asyncio.run(count(Way("a", 1, call), 5))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the benchmark needs Linux")
def test_tornjango_answers_every_view_and_query_as_django_does(postgres: Postgres) -> None:
    """Its own environment stands in for the peers', which the tests have not."""
    postgres.create_database("bench")
    env = {"DJANGO_SETTINGS_MODULE": "bench.project.settings", "BENCH_DB_USER": postgres.user}
    env |= {"BENCH_DB_HOST": str(postgres.socket), "BENCH_DB_PORT": str(postgres.port)}
    core = min(os.sched_getaffinity(0))
    place = Place(sys.executable, sys.executable, psycopg="", env=env, core=core)
    pace = Pace(rounds=1, seconds=0.1, warm_up=0.0, connections=2)
    samples, counts = compare(place, fill(place, 25), pace, [TORNJANGO])
    views = {(view, name) for name in CELLS for view in views_of(TORNJANGO, name)}
    assert {cell for _, cell in samples} == views
    assert {way for _, way in counts} == {"aget", "fetch", "prepared"}


def test_full_run_has_the_rounds_a_median_needs() -> None:
    assert all(isinstance(pace, Pace) and pace.rounds >= 3 for pace in (FULL, QUICK))


def test_routing_is_measured_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "SECONDS", 0.01)
    found = routing.measure(20)
    times = [*vars(found.django).values(), *vars(found.tornjango).values()]
    assert len(times) == 8
    assert min(times) > 0
    text = routing.report([found])
    assert "tornjango, 20" in text
    assert "20 patterns: made in" in text


@pytest.mark.slow
def test_routing_is_measured_in_processes_of_their_own() -> None:
    (found,) = routing.run([2])
    assert found.patterns == 2


@pytest.mark.slow
def test_reloads_are_measured_with_and_without_streams() -> None:
    found = reload.run(streams=2, rounds=1)
    assert [result.streams for result in found] == [0, 2]
    assert min(result.seconds for result in found) > 0
    assert "2 streams" in reload.report(found)


def test_every_room_has_as_many_members() -> None:
    plan = Rooms(0, "poll", "", "", clients=200, rooms=100, follows=10, rate=1, seconds=1)
    members = [room for client in range(200) for room in plan.rooms_of(client)]
    assert {members.count(room) for room in set(members)} == {20}
    assert len(set(members)) == 100


def frame(payload: bytes) -> bytes:
    size = len(payload)
    length = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big")
    return b"\x81" + length + payload


@pytest.mark.parametrize("payload", [b"{}", b"x" * 300])
def test_frame_is_read_once_its_last_byte_is_there(payload: bytes) -> None:
    whole = frame(payload)
    assert [unframe(whole[:end]) for end in range(len(whole))] == [None] * len(whole)
    assert unframe(whole + b"\x81") == (1, payload, len(whole))


ANSWER = '{"messages":[{"data":{"at":%s}},{"data":{"at":%s}}],"cursor":"c","gaps":[],"more":false}'


async def follow_rooms(transport: str, begin: bytes, wrap: Callable[[bytes], bytes]) -> Heard:
    """Two clients of a server that answers them at once, and then tells each of two messages, with one answer."""
    loop = asyncio.get_running_loop()
    left: list[asyncio.Future[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left.append(gone := loop.create_future())
        await reader.readuntil(b"\r\n\r\n")
        empty = '{"messages":[],"cursor":"c","gaps":[],"more":false,"grant":"g"}'
        writer.write(begin + wrap(empty.encode()))
        writer.write(wrap((ANSWER % (loop.time() - 0.25, loop.time())).encode()))
        await reader.read()
        writer.close()
        await writer.wait_closed()
        gone.set_result(None)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        members = Members(Rooms(port, transport, "/?", "", 2, 2, 1, 0, 0))
        await members.connect()
        outcome = await members.finish(4)
        members.hang_up()
        await asyncio.gather(*left)
    return outcome


def http(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def event(body: bytes) -> bytes:
    chunk = b"id: c\ndata: %s\n\n" % body
    return b"%x\r\n%s\r\n" % (len(chunk), chunk)


@pytest.mark.parametrize(
    ("transport", "begin", "wrap"),
    [
        ("poll", b"", http),
        ("sse", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", event),
        ("socket", b"HTTP/1.1 101 Switching Protocols\r\n\r\n", frame),
    ],
)
def test_members_of_rooms_count_messages_over_every_transport(
    transport: str, begin: bytes, wrap: Callable[[bytes], bytes]
) -> None:
    outcome = asyncio.run(follow_rooms(transport, begin, wrap))
    assert (outcome.published, outcome.delivered, outcome.lost, outcome.answers) == (4, 4, 0, 2)
    assert sum(count for tenths, count in outcome.latencies.items() if tenths >= 2500) >= 2


def test_latencies_are_drawn_in_buckets_that_grow() -> None:
    outcome = Heard(10, 10, 0, 5, 0.0, {5: 6, 15: 2, 900: 1, 45_000: 1})
    result = comet.told("tornjango", outcome, cpu=0.001, seconds=2)
    assert (result.p50_ms, result.p99_ms, result.max_ms) == (0.5, 4500, 4500)
    assert (result.cpu_us, result.per_second) == (100, 5)
    assert result.buckets[0] == (1, 6)
    assert result.buckets[-1] == (5000, 1)
    assert sum(count for _, count in result.buckets) == 10
    lines = comet.histogram(result).splitlines()
    assert "#" * comet.BAR in lines[1]
    assert lines[1].endswith("60.0%")


def test_a_server_that_tells_nothing_is_told() -> None:
    with pytest.raises(BenchError, match="nothing of 10 messages"):
        comet.told("peer", Heard(10, 0, 10, 0, 0.0, {}), cpu=1, seconds=1)
