"""``bin/bench profile``: by layer and by function, where tornjango's time for one view goes."""

from __future__ import annotations

import dataclasses
import json
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench.compare import Pace, measure
from bench.figures import shares, table
from bench.load import Exchange
from bench.servers import TORNJANGO, BenchError, Place, serve

Stack = list[tuple[str, str]]

TOP = 25
CONNECTIONS = 20
WARM_UP = 1.0

# Time belongs to the innermost function that lies in one of these; so what the standard library or django.utils
# does is on the account of who called it. The first that fits, fits.
LAYERS = (
    ("/django/template/", "Django: rendering the template"),
    ("/django/db/models/sql/", "Django: building and compiling the query"),
    ("/django/db/models/base.py", "Django: rows into objects"),
    ("/django/db/", "Django: building and compiling the query"),
    ("/django/middleware/", "Django: middleware"),
    ("/django/contrib/", "Django: middleware"),
    ("/django/utils/deprecation.py", "Django: middleware"),
    ("/django/urls/", "Django: resolving the URL"),
    ("/django/", "Django: request, response, signals"),
    ("/momoko/", "momoko and psycopg2"),
    ("/psycopg2/", "momoko and psycopg2"),
    ("/psycopg/", "psycopg 3"),
    ("/tornjango/green.py", "tornjango: green code"),
    ("/tornjango/asyncdjango.py", "tornjango: green code"),
    ("/tornjango/db/", "tornjango: queries and pool"),
    ("/tornjango/templates.py", "tornjango: templates"),
    ("/tornjango/", "tornjango: request, response, view"),
    ("/tornado/ioloop.py", "event loop"),
    ("/tornado/platform/", "event loop"),
    ("/tornado/", "Tornado: HTTP and sockets"),
    ("/asyncio/", "event loop"),
    ("/asgiref/", "asgiref"),
    ("/bench/", "the view itself"),
)
# Helpers, on the account of who calls them.
TRANSPARENT = ("/django/utils/", "/django/conf/", "/django/dispatch/", "/django/core/signals")


@dataclasses.dataclass(frozen=True)
class Profile:
    view: str
    cpu_us: float
    """Per request, sampling included."""
    samples: int
    layers: list[tuple[str, float, float]]
    functions: list[tuple[str, float, float]]
    """Name, share, microseconds: of the function's own time."""


def run(place: Place, answers: list[Exchange], *, middleware: str, seconds: float) -> Profile:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        out = Path(folder, "stacks")
        under = ("bench.sampled", str(out))
        with serve(TORNJANGO, place, middleware=middleware, under=under) as server:
            pace = Pace(rounds=1, seconds=WARM_UP, warm_up=0.2, connections=CONNECTIONS)
            measure(server, TORNJANGO, answers, pace)
            server.popen.send_signal(signal.SIGUSR2)
            pace = dataclasses.replace(pace, seconds=seconds)
            sample = measure(server, TORNJANGO, answers, pace)
            server.popen.send_signal(signal.SIGUSR2)
            stacks = _read(out)
    return analyse(stacks, answers[0][0], sample.cpu / sample.requests * 1e6)


def _read(out: Path) -> list[tuple[Stack, int]]:
    deadline = time.monotonic() + 30
    while not out.exists():
        if time.monotonic() > deadline:
            raise BenchError("The sampler wrote nothing.")
        time.sleep(0.05)
    stacks: list[tuple[Stack, int]] = json.loads(out.read_text())
    return stacks


def analyse(stacks: list[tuple[Stack, int]], view: str, cpu_us: float) -> Profile:
    layers: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    for stack, count in stacks:
        layers[layer_of(stack)] += count
        functions[_short(*stack[0])] += count
    return Profile(
        view=view,
        cpu_us=cpu_us,
        samples=sum(layers.values()),
        layers=shares(layers, cpu_us),
        functions=shares(functions, cpu_us)[:TOP],
    )


def layer_of(stack: Stack) -> str:
    """``stack`` goes from the innermost function outwards."""
    for file, _ in stack:
        if any(part in file for part in TRANSPARENT) and "deprecation.py" not in file:
            continue
        for part, layer in LAYERS:
            if part in file:
                return layer
    return "elsewhere"


def _short(file: str, function: str) -> str:
    parts = Path(file).parts
    if "site-packages" in parts:
        parts = parts[parts.index("site-packages") + 1 :]
    return f"{'/'.join(parts[-4:])}:{function}"


def report(profile: Profile, view: str) -> str:
    def lines(entries: list[tuple[str, float, float]]) -> list[list[str]]:
        return [[name, f"{share:.1%}", f"{us:,.0f}"] for name, share, us in entries]

    return "\n".join(
        [
            f"{view}: {profile.cpu_us:,.0f} us of CPU per request while sampling, "
            f"{profile.samples:,} samples of the loop's thread",
            "",
            table(["layer", "share", "us"], lines(profile.layers)),
            "",
            table(["function, own time", "share", "us"], lines(profile.functions)),
        ]
    )
