"""The command behind ``bin/django-tests``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import django

from bench.environment import psycopg_folder
from bench.servers import BenchError
from tests.postgres import Postgres, PostgresError
from tests.referee import outcomes, server, source
from tests.referee.outcomes import Expected, Run, Verdict

ROOT = Path(__file__).absolute().parent.parent.parent
DATA = ROOT / ".data" / "django-tests"
FOLDER = Path(__file__).parent

#: "django" is Django alone, for comparison; "-sqlite" is the same engine over SQLite.
ENGINES = ("momoko", "psycopg", "threads", "threads-sqlite", "django", "django-sqlite")

MODULES = """
    aggregation aggregation_regress annotations async auth_tests basic bulk_create constraints custom_lookups
    datetimes db_functions defer defer_regress delete delete_regress distinct_on_fields expressions
    expressions_case expressions_window from_db_value generic_relations generic_relations_regress get_or_create
    known_related_objects lookup m2m_regress m2m_through m2m_through_regress many_to_many many_to_one
    model_fields model_forms model_inheritance model_inheritance_regress one_to_one ordering postgres_tests
    prefetch_related queries raw_query select_for_update select_related select_related_regress sessions_tests
    timezones transaction_hooks transactions update
""".split()  # noqa: SIM905 - easier to read, and to add to

#: For continuous integration: under a minute, and something of everything.
QUICK = """
    async basic get_or_create many_to_many prefetch_related raw_query select_for_update sessions_tests
    transaction_hooks transactions
""".split()  # noqa: SIM905 - easier to read, and to add to

#: All that is about requests and responses, for the bridge.
REQUESTS = """
    admin_scripts.tests.ManageRunserver admin_scripts.tests.ManageRunserverEmptyAllowedHosts
    admin_scripts.tests.ManageRunserverHelpOutput admin_scripts.tests.ManageRunserverMigrationWarning
    admin_scripts.tests.ManageTestserver admin_views asgi async auth_tests conditional_processing csrf_tests file_uploads generic_views
    handlers httpwrappers i18n logging_tests messages_tests middleware middleware_exceptions requests_tests
    resolve_url responses servers sessions_tests signals sitemaps_tests staticfiles_tests syndication_tests
    template_backends template_tests test_client test_client_regress urlpatterns urlpatterns_reverse view_tests
""".split()  # noqa: SIM905 - easier to read, and to add to

QUICK_REQUESTS = """
    conditional_processing csrf_tests file_uploads handlers messages_tests middleware middleware_exceptions
    requests_tests resolve_url servers test_client test_client_regress urlpatterns
""".split()  # noqa: SIM905 - easier to read, and to add to

#: For one module, in seconds. The longest takes about a minute on a slow machine.
MODULE_LIMIT = 900


class Subject(NamedTuple):
    """What is refereed."""

    modules: list[str]
    quick: list[str]
    expected: Path
    #: What of it must not be none.
    counted: str


DATABASE = Subject(MODULES, QUICK, FOLDER / "expected.txt", "statements")
BRIDGE = Subject(REQUESTS, QUICK_REQUESTS, FOLDER / "expected-bridge.txt", "requests")


class RefereeError(Exception):
    """The tests cannot be run; the message is for people."""


def main() -> int:
    options = _parser().parse_args()
    # As Ctrl-C does: what was started is ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return _main(options)
    except (RefereeError, BenchError, PostgresError, source.SourceError, ValueError) as error:
        print(f"django-tests: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bin/django-tests",
        description="Run Django's own tests with every statement going through an engine of tornjango.",
    )
    parser.add_argument(
        "labels",
        nargs="*",
        metavar="module",
        help="module, class or test, such as queries or basic.tests.ModelTest (a quick share of the modules)",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help=f"all {len(MODULES)} modules that are about the database; with --bridge the {len(REQUESTS)} about requests",
    )
    parser.add_argument(
        "--bridge",
        action="store_true",
        help="in the place of an engine: the requests of the tests' clients go through tornjango's server",
    )
    parser.add_argument(
        "--engine", choices=ENGINES, action="append", help="may be given several times (momoko)"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="modules that run at once (2)"
    )
    return parser


def _main(options: argparse.Namespace) -> int:
    subject = BRIDGE if options.bridge else DATABASE
    listed = outcomes.load(subject.expected)
    labels = options.labels or (subject.modules if options.all else subject.quick)
    tests = source.tests(DATA.parent)
    DATA.mkdir(exist_ok=True)
    problems = 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tornjango-")))
        folder.chmod(0o711)
        if options.bridge:
            postgres, engines = None, ["bridge"]
        else:
            postgres = stack.enter_context(server.find(folder / "postgres"))
            engines = options.engine or ["momoko"]
        for engine in engines:
            referee = Referee(engine, tests, folder, postgres, DATA, options.jobs)
            problems += report(engine, referee.run(labels), listed, set(labels), subject.counted)
    return 1 if problems else 0


def _path(engine: str) -> str:
    """For PYTHONPATH. Django takes psycopg 3 wherever it can be imported, and psycopg2 elsewhere."""
    folders = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    has_psycopg = importlib.util.find_spec("psycopg") is not None
    if engine == "psycopg" and not has_psycopg:
        folders.append(psycopg_folder())
    if engine == "momoko" and has_psycopg:
        raise RefereeError("The engine momoko needs psycopg2, and Django takes psycopg 3 here.")
    return os.pathsep.join(folders)


class Referee:
    """Runs modules over one engine, or over the bridge, each in a process of its own, with databases of its own."""

    def __init__(
        self,
        engine: str,
        tests: Path,
        folder: Path,
        postgres: Postgres | None,
        logs: Path,
        jobs: int,
    ) -> None:
        """``postgres`` is for the engines but "-sqlite"."""
        self.engine = engine
        self.tests = tests
        self.folder = folder
        self.logs = logs
        self.postgres = postgres
        self.jobs = jobs
        self.env = _environment(postgres) | {
            "DJANGO_SETTINGS_MODULE": "tests.referee.settings",
            "PYTHONPATH": _path(engine),
            "REFEREE_ENGINE": engine,
            "REFEREE_FOLDER": str(folder),
        }

    def run(self, labels: list[str]) -> Iterator[Run]:
        """The modules' runs, in the order of the labels, as they end."""
        modules: dict[str, list[str]] = {}
        for label in labels:
            modules.setdefault(label.partition(".")[0], []).append(label)
        unknown = [module for module in modules if not (self.tests / module).is_dir()]
        if unknown:
            raise RefereeError(f"Django {django.__version__} has no tests {', '.join(unknown)}.")
        for module in list(modules):
            lacks = self._lacks(module)
            if lacks:
                print(
                    f"{module:28} left out: PostgreSQL has no {', '.join(lacks)} here", flush=True
                )
                del modules[module]
        with ThreadPoolExecutor(self.jobs) as pool:
            yield from pool.map(self._run, modules, modules.values())

    def _run(self, module: str, labels: list[str]) -> Run:
        run = Run(self.engine, module)
        start = time.monotonic()
        lines = self.folder / f"{self.engine}-{module}.jsonl"
        env = self.env | {"REFEREE_MODULE": module, "REFEREE_LINES": str(lines)}
        with self.log(module).open("wb") as log:
            code = self._call(labels, env, log.fileno())
        if lines.exists():
            outcomes.read(run, lines.read_text().splitlines())
        run.seconds = time.monotonic() - start
        if code not in (0, 1) or (code == 1 and not run.count("failed", "error")):
            run.broken = f"the process ended with {code}: see {self.log(module)}"
        return run

    def _lacks(self, module: str) -> list[str]:
        if self.postgres is None or self.engine.endswith("sqlite"):
            return []
        return server.lacks(self.postgres, module)

    def log(self, module: str) -> Path:
        return self.logs / f"{self.engine}-{django.__version__}-{module}.log"

    def _call(self, labels: list[str], env: dict[str, str], log: int) -> int | str:
        command = [sys.executable, "runtests.py", "--noinput", "--parallel=1", *labels]
        process = subprocess.Popen(
            command, cwd=self.tests, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            return process.wait(MODULE_LIMIT)
        except subprocess.TimeoutExpired:
            return f"nothing after {MODULE_LIMIT} s"
        finally:
            process.kill()
            process.wait()


def _environment(postgres: Postgres | None) -> dict[str, str]:
    """Without what would lead to other settings, or to another server."""
    ours = {n: v for n, v in os.environ.items() if not n.startswith(("PG", "DJANGO", "DATABASE"))}
    return ours | (postgres.env() if postgres else {})


def report(
    engine: str,
    runs: Iterator[Run],
    listed: list[Expected],
    labels: set[str],
    counted: str = "statements",
) -> int:
    """Prints a line for each module, then what was not expected; returns how much of that there is.

    ``counted`` is what the runs' ``counts`` are of.
    """
    here = [entry for entry in listed if entry.applies(engine, django.__version__)]
    print(f"\n{engine}, Django {django.__version__}, Python {platform.python_version()}")
    columns = [counted if name == "through" else name for name in COLUMNS]
    print(_row("", *columns), flush=True)
    totals: Counter[str] = Counter()
    problems: list[str] = []
    for run in runs:
        verdict = outcomes.judge(run, here, whole=run.module in labels)
        figures = _figures(run, verdict)
        totals.update(figures)
        problems += verdict.problems
        print(_row(run.module, *figures.values()), flush=True)
    print(_row("total", *(totals[name] for name in COLUMNS)))
    if not engine.startswith("django") and not totals["through"]:
        problems.append(f"no {counted} went through tornjango")
    print(f"Not expected: {len(problems)}", *problems, sep="\n  ", flush=True)
    return len(problems)


COLUMNS = ("passed", "failed", "errors", "skipped", "listed", "through", "seconds")


def _figures(run: Run, verdict: Verdict) -> dict[str, int]:
    return {
        "passed": run.count("passed"),
        "failed": run.count("failed"),
        "errors": run.count("error"),
        "skipped": run.count("skipped"),
        "listed": verdict.expected,
        "through": run.counts.total(),
        "seconds": round(run.seconds),
    }


def _row(name: str, *values: object) -> str:
    return f"{name:28}" + "".join(f"{value!s:>11}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
