"""The command behind ``bin/bench``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench import (
    comet,
    compare,
    download,
    drill,
    environment,
    parked,
    profiling,
    queries,
    reload,
    routing,
    soak,
)
from bench.servers import BARE, PEERS, PSYCOPG, ROOT, BenchError, Environment, Peer, Place
from tests.postgres import Postgres, PostgresError

FULL = compare.Pace(rounds=3, seconds=3.0, warm_up=0.7, connections=20)
QUICK = compare.Pace(rounds=3, seconds=0.3, warm_up=0.2, connections=20, fresh=False)


def main() -> int:
    options = parser().parse_args(_with_default(sys.argv[1:]))
    # As Ctrl-C does: what was started is ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        options.run(options)
    except (BenchError, PostgresError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _with_default(arguments: list[str]) -> list[str]:
    named = {
        "compare",
        "queries",
        "comet",
        "parked",
        "download",
        "drill",
        "reload",
        "routing",
        "soak",
        "profile",
        "-h",
        "--help",
    }
    return arguments if arguments and arguments[0] in named else ["compare", *arguments]


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the figures as JSON")
    common.add_argument("--rows", type=count, default=25, help="rows of the 2009 view (25)")
    common.add_argument("--peers-python", help="with psycopg 3, uvicorn, gunicorn (made)")
    common.add_argument("--psycopg", help="folder with psycopg 3, for tornjango (made)")
    top = argparse.ArgumentParser(prog="bin/bench", description="Measure tornjango and its peers.")
    commands = top.add_subparsers()
    names = [peer.key for peer in PEERS]

    paced = argparse.ArgumentParser(add_help=False)
    paced.add_argument("--quick", action="store_true", help="about a minute, rougher figures")
    paced.add_argument("--rounds", type=count, help="of all in turn (3)")
    paced.add_argument("--seconds", type=duration, help="each measurement (3)")
    paced.add_argument(
        "--servers", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )

    command = commands.add_parser("compare", parents=[common, paced], help="all side by side")
    command.add_argument("--connections", type=count, default=20, help="kept open (20)")
    command.set_defaults(run=run_compare)

    command = commands.add_parser("queries", parents=[common, paced], help="without HTTP")
    command.set_defaults(run=run_queries)

    command = commands.add_parser("parked", parents=[common], help="long-polls that wait")
    command.add_argument(
        "--servers",
        nargs="+",
        choices=(names := [peer.key for peer in parked.PEERS]),
        metavar="NAME",
        default=names,
        help=", ".join(names),
    )
    command.add_argument("polls", type=count, nargs="?", default=5000, help="how many (5000)")
    command.set_defaults(run=run_parked)

    command = commands.add_parser("comet", parents=[common], help="readers, and what reaches them")
    command.add_argument("--quick", action="store_true", help="about a minute, rougher figures")
    command.add_argument(
        "parts",
        nargs="*",
        type=part,
        metavar="PART",
        help=f"{', '.join(comet.PARTS)} (all)",
    )
    command.set_defaults(run=run_comet)

    command = commands.add_parser("download", parents=[common, paced], help="a large file")
    command.add_argument("--clients", type=count, default=4, help="at once (4)")
    command.add_argument("--megabytes", type=count, default=100, help="size of the file (100)")
    command.set_defaults(run=run_download)

    command = commands.add_parser("soak", parents=[common], help="reloads, kills and disconnects")
    command.add_argument("--minutes", type=float, default=10.0, help="how long (10)")
    command.set_defaults(run=run_soak)

    command = commands.add_parser("drill", help="COMET's readers, and all that may happen to them")
    command.add_argument("--json", action="store_true", help="print the figures as JSON")
    command.add_argument("minutes", type=float, nargs="?", default=5.0, help="each broker (5)")
    command.add_argument("--readers", type=count, default=2000, help="over three transports (2000)")
    command.add_argument("--rate", type=count, default=50, help="events a second (50)")
    command.add_argument(
        "--brokers", nargs="+", choices=drill.BROKERS, default=drill.BROKERS, metavar="NAME"
    )
    command.set_defaults(run=run_drill)

    command = commands.add_parser("routing", help="a path's view among many URL patterns")
    command.add_argument("--json", action="store_true", help="print the figures as JSON")
    command.add_argument("patterns", type=count, nargs="?", default=10_000, help="(10,000)")
    command.set_defaults(run=run_routing)

    command = commands.add_parser("reload", help="serving changed code, beside open streams")
    command.add_argument("--json", action="store_true", help="print the figures as JSON")
    command.add_argument(
        "streams", type=count, nargs="?", default=reload.STREAM_COUNT, help="(1000)"
    )
    command.add_argument("--rounds", type=count, default=reload.ROUNDS, help="of both in turn (5)")
    command.set_defaults(run=run_reload)

    command = commands.add_parser("profile", parents=[common], help="where a view's time goes")
    command.add_argument("view", choices=sorted(compare.VIEWS))
    command.add_argument("--middleware", choices=sorted(compare.MIDDLEWARE))
    command.add_argument("--seconds", type=duration, default=10.0, help="of sampling (10)")
    command.set_defaults(run=run_profile)
    return top


def count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number


def part(text: str) -> str:
    if text not in comet.PARTS:
        raise argparse.ArgumentTypeError(f"it must be one of {', '.join(comet.PARTS)}")
    return text


def duration(text: str) -> float:
    if not 0 < (number := float(text)) <= 600:
        raise argparse.ArgumentTypeError("it must be more than 0 s and at most 600")
    return number


def pace(options: argparse.Namespace) -> compare.Pace:
    usual = QUICK if options.quick else FULL
    return dataclasses.replace(
        usual,
        rounds=options.rounds or usual.rounds,
        seconds=options.seconds or usual.seconds,
        connections=getattr(options, "connections", usual.connections),
    )


def chosen(options: argparse.Namespace) -> list[Peer]:
    return [peer for peer in PEERS if peer.key in options.servers]


def run_compare(options: argparse.Namespace) -> None:
    with place(options) as (where, versions):
        answers = fill(where, options.rows)
        samples, counts = compare.compare(where, answers, pace(options), chosen(options))
    figures = {
        "versions": versions,
        "rows": options.rows,
        "figures": compare.as_json(samples),
        "queries": queries.as_json(counts),
    }
    texts = [versions, queries.report(counts) if counts else "", compare.report(samples)]
    show(options, figures, "\n\n".join(filter(None, texts)))


def run_queries(options: argparse.Namespace) -> None:
    with place(options) as (where, versions):
        fill(where, options.rows)
        counts = queries.run(where, queries.environments(chosen(options)), pace(options))
    show(
        options,
        {"versions": versions, "queries": queries.as_json(counts)},
        f"{versions}\n\n{queries.report(counts)}",
    )


def run_parked(options: argparse.Namespace) -> None:
    raise_file_limit(options.polls + 200)
    with place(options) as (where, versions):
        fill(where, options.rows)
        peers = [peer for peer in parked.PEERS if peer.key in options.servers]
        outcomes = [parked.run_or_fail(peer, where, options.polls) for peer in peers]
    failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
    results = [outcome for outcome in outcomes if not isinstance(outcome, str)]
    figures = [dataclasses.asdict(result) for result in results]
    show(
        options,
        {"versions": versions, "parked": figures, "failures": failures},
        f"{versions}\n\n{parked.report(results, failures)}",
    )


def run_comet(options: argparse.Namespace) -> None:
    pace = comet.QUICK if options.quick else comet.FULL
    raise_file_limit(pace.polls + 200)
    with place(options) as (where, versions):
        fill(where, options.rows)
        results = comet.run(where, options.parts or list(comet.PARTS), pace)
    show(
        options,
        {"versions": versions, **dataclasses.asdict(results)},
        f"{versions}\n\n{comet.report(results)}",
    )


def run_download(options: argparse.Namespace) -> None:
    with place(options) as (where, versions), download.file(options.megabytes) as path:
        fill(where, options.rows)
        where.env["BENCH_FILE"] = str(path)
        peers = [peer for peer in chosen(options) if peer not in (BARE, PSYCOPG)]
        results = [download.run(peer, where, path, options.clients) for peer in peers]
    figures = [dataclasses.asdict(result) for result in results]
    show(
        options,
        {"versions": versions, "download": figures},
        f"{versions}\n\n{download.report(results)}",
    )


def run_soak(options: argparse.Namespace) -> None:
    with place(options) as (where, versions), download.file(10) as path:
        answers = fill(where, options.rows)
        where.env["BENCH_FILE"] = str(path)
        views = compare.CELLS["default"]
        exchanges = [
            (f"/tornjango/{target}", cookie, body)
            for view in (*views, "2009", "twenty")
            for target, cookie, body in answers[view]
        ]
        result = soak.run(where, exchanges, options.minutes)
    show(
        options,
        {"versions": versions, "soak": dataclasses.asdict(result)},
        f"{versions}\n\n{soak.report(result)}",
    )
    if result.failures:
        raise BenchError(f"{len(result.failures)} requests failed")


def run_drill(options: argparse.Namespace) -> None:
    raise_file_limit(options.readers + 200)
    results = [
        drill.run(broker, options.minutes * 60, options.readers, options.rate)
        for broker in options.brokers
    ]
    figures: dict[str, object] = {"drill": [drill.as_json(result) for result in results]}
    show(options, figures, drill.report(results))
    if failures := sum(len(result.failures) for result in results):
        raise BenchError(f"{failures} readers' slices were not what was published")


def run_routing(options: argparse.Namespace) -> None:
    results = routing.run((10, options.patterns))
    figures: dict[str, object] = {"routing": [dataclasses.asdict(result) for result in results]}
    show(options, figures, routing.report(results))


def run_reload(options: argparse.Namespace) -> None:
    raise_file_limit(options.streams + 200)
    results = reload.run(options.streams, options.rounds)
    figures: dict[str, object] = {"reload": [dataclasses.asdict(result) for result in results]}
    show(options, figures, reload.report(results))


def run_profile(options: argparse.Namespace) -> None:
    with place(options) as (where, versions):
        answers = fill(where, options.rows)[options.view]
        middleware = options.middleware or compare.least_middleware(options.view)
        profile = profiling.run(where, answers, middleware=middleware, seconds=options.seconds)
    text = profiling.report(profile, compare.VIEWS[options.view])
    show(
        options,
        {"versions": versions, "profile": dataclasses.asdict(profile)},
        f"{versions}\n\n{text}",
    )


def show(options: argparse.Namespace, figures: dict[str, object], text: str) -> None:
    print(json.dumps(figures, indent=2) if options.json else text)


@contextlib.contextmanager
def place(options: argparse.Namespace) -> Iterator[tuple[Place, str]]:
    """A new PostgreSQL beside the client on all cores but the first, which is the servers' alone."""
    first, *others = cores()
    peers = options.peers_python or environment.peers_python()
    psycopg = options.psycopg or environment.psycopg_folder()
    os.sched_setaffinity(0, others)
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        Postgres(_open_to_all(folder), tcp=False) as postgres,
    ):
        # Every server of a run, with each middleware, keeps its pool.
        postgres.psql("alter system set max_connections = 400")
        postgres.restart()
        postgres.create_database("bench")
        env = {
            "BENCH_DB_HOST": str(postgres.socket),
            "BENCH_DB_PORT": str(postgres.port),
            "BENCH_DB_USER": postgres.user,
            "DJANGO_SETTINGS_MODULE": "bench.project.settings",
        }
        where = Place(sys.executable, peers, psycopg, env, first)
        yield where, versions(where, len(others) + 1)


def _open_to_all(folder: str) -> Path:
    # PostgreSQL will not run as root, and must then find its data as somebody else.
    Path(folder).chmod(0o755)
    return Path(folder, "data")


def cores() -> list[int]:
    """Raises BenchError where processes cannot be kept apart."""
    if not hasattr(os, "sched_getaffinity"):
        raise BenchError("It needs Linux, to give the server a core of its own.")
    found = sorted(os.sched_getaffinity(0))
    if len(found) < 2:
        raise BenchError("It needs two cores: one for the server, one for the client.")
    return found


def raise_file_limit(files: int) -> None:
    """For this process and those it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY in (soft, hard) or soft >= files:
        files = soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, max(files, hard)))
    except (ValueError, OSError) as error:
        raise BenchError(
            f"{files} open files are needed, the limit (ulimit -Hn) is {hard}: {error}"
        ) from None


def fill(where: Place, rows: int) -> compare.Answers:
    """Loads the data, and says what every view must answer."""
    if rows > 500:
        raise BenchError(f"--rows takes 1 to 500, not {rows}.")
    answers: compare.Answers = json.loads(
        _output(where, "peers", "-m", "bench.project.fill", str(rows))
    )
    if (found := answers["2009"][0][-1].count("<time")) != rows:
        raise BenchError(f"The 2009 view has {found} rows, not {rows}.")
    return answers


def versions(where: Place, count: int) -> str:
    listing = "import importlib.metadata as m, sys; print(*(f'{p} {m.version(p)}' for p in sys.argv[1:]), sep=', ')"
    ours = ["django", "tornado", "momoko", "psycopg2-binary"]
    theirs = ["django", "uvicorn", "uvloop", "granian", "daphne", "gunicorn", "psycopg"]
    theirs += ["channels", "channels_redis", "django-eventstream"]
    return "\n".join(
        [
            f"{datetime.date.today()}, Python {platform.python_version()}, {count} cores, "
            "one process and one core for the server",
            f"tornjango: {_output(where, 'momoko', '-c', listing, *ours)}; "
            f"or {_output(where, 'psycopg', '-c', listing, 'psycopg')}",
            f"peers:     {_output(where, 'peers', '-c', listing, *theirs)}",
        ]
    )


def _output(where: Place, environment: Environment, *arguments: str) -> str:
    command = [where.python(environment), *arguments]
    done = subprocess.run(
        command, env=where.environ(environment), cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise BenchError(f"{command[0]} failed:\n{done.stderr[-3000:]}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
