"""For whoever watches the server: whether it is well (``TORNJANGO["HEALTH"]``), and its numbers (``TORNJANGO["METRICS"]``).

Both are paths, as they come over the wire, that Tornado answers: without middleware, a database, ALLOWED_HOSTS, or a line
in the access log. Whoever reaches them may read them: a proxy in front keeps strangers out. Where neither is set, one timer
a second is all there is, for the status page.

Health is 200, and 503 once the server drains. Metrics are in Prometheus's text formats: the project's own, in
prometheus-client's registry, are among them. With several workers each scrape reaches one of them, and tells of that one
alone; where PROMETHEUS_MULTIPROC_DIR names a folder (an empty one at each start) it tells of all, as prometheus-client
does it: counters are summed, so are gauges of the workers that live, and the loop's delay is that of the worst.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import os
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tornado.routing import PathMatches, Rule
from tornado.web import RequestHandler

from tornjango import comet
from tornjango.access import Answer
from tornjango.conf import Config
from tornjango.db import pools
from tornjango.exceptions import ConfigurationError, Overloaded
from tornjango.http1 import HTTP1Server
from tornjango.workers import WorkerPool

if TYPE_CHECKING:
    from tornjango.application import Application

#: How often the loop's delay is measured, in seconds, and how many of the last times count.
STEP = 1.0
STEPS = 10

#: Scrapes that may wait for the one under way; one more is answered 503.
SCRAPES = 3

MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


class Monitor:
    """What is told of one application."""

    def __init__(self, application: Application, config: Config) -> None:
        """Raises ConfigurationError for METRICS without prometheus-client."""
        if config.HEALTH and config.HEALTH == config.METRICS:
            raise ConfigurationError(
                f'TORNJANGO["HEALTH"] and TORNJANGO["METRICS"] are both {config.HEALTH!r}. Each needs a path of its own.'
            )
        self._application = application
        self._delays: deque[float] = deque([0.0], maxlen=STEPS)
        self._timer: asyncio.TimerHandle | None = None
        self._http: HTTP1Server | None = None
        self.metrics = Metrics() if config.METRICS else None
        #: For the application's router.
        self.rules: list[Rule] = []
        if config.HEALTH:
            self._add_rule(config.HEALTH, HealthHandler)
        if self.metrics is not None:
            self._add_rule(config.METRICS, MetricsHandler)
            application.observers.append(self.metrics.observe)

    def _add_rule(self, path: str, handler: type[RequestHandler]) -> None:
        self.rules.append(Rule(PathMatches(re.escape(path)), handler, {"monitor": self}))

    @contextlib.contextmanager
    def measuring(self, http: HTTP1Server) -> Iterator[None]:
        """Inside, the delay of the running loop is measured, and the connections are those of ``http``."""
        self._http = http
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(STEP, self._step, loop, loop.time() + STEP)
        try:
            yield
        finally:
            self._timer.cancel()
            if self.metrics is not None:
                self.metrics.close()

    def _step(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        now = loop.time()
        self._delays.append(max(now - due, 0.0))
        self._timer = loop.call_at(now + STEP, self._step, loop, now + STEP)
        if self.metrics is not None and self.metrics.shared:  # any worker may be asked
            self.metrics.set(self.status())

    def status(self) -> dict[str, Any]:
        """The numbers of this process: what health tells, and the gauges."""
        application = self._application
        return {
            "status": "draining" if application.draining else "ok",
            "pid": os.getpid(),
            "connections": self._http.connections if self._http is not None else 0,
            "in_flight": len(application.in_flight),
            "arriving": len(application.arriving),
            "native": sum(not isinstance(at, Endpoint) for at in application.native.values()),
            "workers": application.workers.status(),
            "pools": pools.status(),
            "comet": comet.status(),
            #: By how much the loop was late, at worst, in the last ten seconds; in seconds.
            "loop_delay": round(max(self._delays), 6),
        }


class Metrics:
    """What Prometheus is told, in a registry of the application's own."""

    def __init__(self) -> None:
        try:
            import prometheus_client
            import prometheus_client.multiprocess
        except ImportError as exc:
            raise ConfigurationError(
                'TORNJANGO["METRICS"] needs prometheus-client (pip install "tornjango[metrics]").'
            ) from exc
        self._client: Any = prometheus_client
        self._folder = os.environ.get(MULTIPROCESS_DIR)
        self._own: Any = prometheus_client.CollectorRegistry()
        self._thread = WorkerPool(1, SCRAPES)
        self._children: dict[tuple[str, int, str], tuple[Any, Any]] = {}
        self._gauges: dict[str, Any] = {}
        self._requests = prometheus_client.Counter(
            "tornjango_requests",
            "Answered requests; 499 is a client that left before.",
            ["method", "status", "view"],
            registry=self._own,
        )
        self._seconds = prometheus_client.Histogram(
            "tornjango_request_duration_seconds",
            "From a request's headers to its answer's end.",
            ["view"],
            registry=self._own,
        )

    @property
    def shared(self) -> bool:
        """Whether any worker can tell of all."""
        return self._folder is not None

    def observe(self, answer: Answer) -> None:
        """Views are named as the URL patterns name them, so a client makes no series of its own."""
        key = answer.request.method, answer.status, answer.view
        counter, histogram = self._children.get(key) or self._child(*key)
        counter.inc()
        histogram.observe(answer.request.request_time())

    def _child(self, method: str, status: int, view: str) -> tuple[Any, Any]:
        if method not in _METHODS:
            method = "other"
        view = view or "none"
        counter = self._requests.labels(method, str(status), view)
        child = counter, self._seconds.labels(view)
        if method != "other":
            self._children[method, status, view] = child
        return child

    def set(self, status: dict[str, Any]) -> None:
        """Sets the gauges; called on the loop."""
        self._set("connections_open", "Connections of clients.", status["connections"])
        self._set("requests_in_flight", "Requests that are being answered.", status["in_flight"])
        self._set("requests_arriving", "Requests whose body is on its way.", status["arriving"])
        self._set(
            "native_handlers", "Tornado handlers at work, open WebSockets too.", status["native"]
        )
        self._set("loop_delay_seconds", "The event loop's delay, at worst.", status["loop_delay"])
        for state, count in status["workers"].items():
            self._set("threads", "Worker threads, and calls waiting.", count, state=state)
        for alias, pool in status["pools"].items():
            for name, value in _numbers(pool):
                self._set("pool", "A database's pool.", value, database=alias, state=name)
        for name, value in _numbers(status["comet"]):
            self._set("comet", "COMET's channels and readers.", value, state=name)
        for transport, count in status["comet"]["readers"].items():
            self._set("comet_readers", "COMET's readers.", count, transport=transport)

    def _set(self, name: str, help: str, value: float, **labels: str) -> None:
        gauge = self._gauges.get(name)
        if gauge is None:
            mode = "livemax" if name == "loop_delay_seconds" else "livesum"
            gauge = self._gauges[name] = self._client.Gauge(
                f"tornjango_{name}", help, list(labels), registry=self._own, multiprocess_mode=mode
            )
        (gauge.labels(**labels) if labels else gauge).set(value)

    async def text(self, accept: str) -> tuple[bytes, str]:
        """The metrics, and their content type; in a thread, for the project's collectors may wait.

        Raises Overloaded when too many scrapes wait.
        """
        encode, content_type = self._client.exposition.choose_encoder(accept)
        return await asyncio.wrap_future(self._thread.submit(encode, self)), content_type

    def collect(self) -> Iterator[Any]:
        """As prometheus-client asks a registry."""
        if self._folder is not None:
            self._forget_dead(self._folder)
            yield from self._client.multiprocess.MultiProcessCollector(None, self._folder).collect()
        else:
            yield from self._own.collect()
            yield from self._client.REGISTRY.collect()

    def _forget_dead(self, folder: str) -> None:
        """The gauges of workers that are gone, however they went."""
        for file in glob.glob(os.path.join(glob.escape(folder), "gauge_live*.db")):
            pid = int(Path(file).stem.rpartition("_")[2])
            if not _is_alive(pid):
                self._client.multiprocess.mark_process_dead(pid, folder)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def _numbers(values: dict[str, Any]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in values.items() if isinstance(value, (int, float))]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


class Endpoint(RequestHandler):
    """An answer for machines: GET and HEAD, kept by nobody, and not logged."""

    def initialize(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def set_default_headers(self) -> None:
        self.set_header("Server", "tornjango")
        self.set_header("Cache-Control", "no-store")

    def compute_etag(self) -> None:
        return None

    def _log(self) -> None:
        pass


class HealthHandler(Endpoint):
    async def get(self) -> None:
        status = self.monitor.status()
        self.set_status(200 if status["status"] == "ok" else 503)
        self.finish(status)

    head = get


class MetricsHandler(Endpoint):
    async def get(self) -> None:
        metrics = self.monitor.metrics
        assert metrics is not None
        metrics.set(self.monitor.status())
        try:
            text, content_type = await metrics.text(self.request.headers.get("Accept", ""))
        except Overloaded:
            self.send_error(503)
            return
        self.set_header("Content-Type", content_type)
        self.finish(text)

    head = get
