from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from tests import views
from tests.projects import ROOT
from tests.serving import Site, serving, until
from tornjango import access, monitoring
from tornjango.application import Application
from tornjango.db import pools
from tornjango.exceptions import ConfigurationError

HEALTH, METRICS = "/-/health", "/-/metrics"
ON = {"HEALTH": HEALTH, "METRICS": METRICS}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def _samples(text: bytes) -> Samples:
    families = text_string_to_metric_families(text.decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def _value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


async def _scraped(site: Site) -> Samples:
    answer = await site.request(METRICS)
    assert answer.status == 200
    return _samples(answer.body)


# Health


@pytest.mark.gen_test
async def test_a_server_that_is_well_says_so_with_its_numbers() -> None:
    settings = {"ROOT_URLCONF": "tests.urls", "TORNJANGO": {"HEALTH": HEALTH, "THREADS": 3}}
    async with serving(**settings) as site, await site.connect() as client:
        await client.send(b"GET /parks-async/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await views.gates["parked"].wait()
        answer = await site.request(HEALTH, headers=[("Host", "not-allowed.example")])
    assert answer.status == 200
    assert answer.header("Cache-Control") == "no-store"
    assert answer.header("Content-Type") == "application/json; charset=UTF-8"
    told = json.loads(answer.body)
    assert (told["status"], told["pid"], told["in_flight"]) == ("ok", os.getpid(), 1)
    assert (told["native"], told["arriving"], told["connections"]) == (0, 0, 2)
    assert told["workers"] == {"size": 3, "busy": 0, "waiting": 0}
    assert set(told["pools"]) == {"default", "own", "sqlite"}
    assert told["loop_delay"] >= 0


@pytest.mark.gen_test
async def test_a_server_that_drains_is_not_well() -> None:
    async with serving(TORNJANGO={"HEALTH": HEALTH}) as site, await site.connect() as client:
        assert (await client.request(HEALTH)).status == 200
        site.application.draining = True
        answer = await client.request(HEALTH)
    assert (answer.status, json.loads(answer.body)["status"]) == (503, "draining")


@pytest.mark.gen_test
async def test_health_passes_no_middleware_and_asks_no_database() -> None:
    settings = {"TORNJANGO": {"HEALTH": HEALTH}, "MIDDLEWARE": ["tests.test_monitoring.breaks"]}
    async with serving(**settings) as site:
        assert (await site.request(HEALTH)).status == 200
        assert all(pool.get("connections", 0) == 0 for pool in pools.status().values())


def breaks(get_response: Any) -> Any:
    async def middleware(request: Any) -> Any:
        raise AssertionError("no request was to come here")

    return middleware


breaks.async_capable = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", [HEALTH, METRICS])
@pytest.mark.gen_test
async def test_head_is_answered_and_what_changes_things_is_not(path: str) -> None:
    async with serving(TORNJANGO=ON) as site, await site.connect() as client:
        head = await client.request(path, method="HEAD")
        assert (head.status, head.header("Cache-Control")) == (200, "no-store")
        assert int(head.header("Content-Length") or 0) > 0
        assert (await client.request(path)).status == 200
        assert (await client.request(path, method="POST", body=b"x")).status == 405


@pytest.mark.gen_test
async def test_neither_is_there_unless_asked_for() -> None:
    async with serving() as site:
        assert (await site.request(HEALTH)).status == 404
        assert (await site.request(METRICS)).status == 404
        assert site.application.observers == []


@pytest.mark.gen_test
async def test_neither_is_in_the_access_log(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        access, "make", lambda config: lambda answer: seen.append(answer.request.path)
    )
    async with serving(TORNJANGO=ON) as site, await site.connect() as client:
        for path in (HEALTH, METRICS, "/status/200/"):
            await client.request(path)
        await until(lambda: seen)
    assert seen == ["/status/200/"]


@pytest.mark.gen_test
async def test_the_loops_delay_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitoring, "STEP", 0.001)
    async with serving(TORNJANGO=ON) as site:
        monitor = site.application.monitor
        assert monitor is not None
        await until(lambda: len(monitor._delays) == monitoring.STEPS)
        assert monitor.status()["loop_delay"] > 0
        monitor._step(asyncio.get_running_loop(), asyncio.get_running_loop().time() - 5)
        assert monitor.status()["loop_delay"] >= 5


# Metrics


@pytest.mark.gen_test
async def test_answers_are_counted_by_method_status_and_view() -> None:
    async with serving(TORNJANGO=ON) as site, await site.connect() as client:
        for target in ("/status/200/", "/status/200/?x=1", "/status/404/", "/no-such-path/"):
            await client.request(target)
        await client.request("/status/200/", method="HEAD")
        await client.request("/status/200/", method="BREW")
        await client.request("/status/200/")  # the answer before it is counted by now
        samples = await _scraped(site)
    view = "tests.views.status"
    counted = {key: value for key, value in samples.items() if key[0] == "tornjango_requests_total"}
    assert sum(counted.values()) >= 6

    def count(method: str, status: str, view: str) -> float:
        labels = {"method": method, "status": status, "view": view}
        return _value(samples, "tornjango_requests_total", **labels)

    assert count("GET", "200", view) in (2, 3)
    assert (
        count("GET", "404", view) == count("GET", "404", "none") == count("HEAD", "200", view) == 1
    )
    assert count("other", "403", view) == 1
    assert _value(samples, "tornjango_request_duration_seconds_count", view=view) >= 5
    assert _value(samples, "tornjango_request_duration_seconds_bucket", view=view, le="+Inf") >= 5


@pytest.mark.gen_test
async def test_the_state_of_the_server_is_told() -> None:
    settings = {"ROOT_URLCONF": "tests.urls", "TORNJANGO": {**ON, "THREADS": 3}}
    async with serving(**settings) as site, await site.connect() as client:
        await client.send(b"GET /parks-async/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await views.gates["parked"].wait()
        samples = await _scraped(site)
    assert _value(samples, "tornjango_requests_in_flight") == 1
    assert _value(samples, "tornjango_connections_open") == 2
    assert _value(samples, "tornjango_threads", state="size") == 3
    assert _value(samples, "tornjango_pool", database="default", state="in_use") == 0
    assert _value(samples, "tornjango_comet", state="parked") == 0
    assert _value(samples, "tornjango_loop_delay_seconds") >= 0


class _Custom:
    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("shop_orders", "Open orders.", value=7)


@pytest.mark.gen_test
async def test_the_projects_own_metrics_are_among_them() -> None:
    collector = _Custom()
    prometheus_client.REGISTRY.register(collector)  # type: ignore[arg-type]
    try:
        async with serving(TORNJANGO=ON) as site:
            samples = await _scraped(site)
    finally:
        prometheus_client.REGISTRY.unregister(collector)  # type: ignore[arg-type]
    assert _value(samples, "shop_orders") == 7


@pytest.mark.gen_test
async def test_openmetrics_is_spoken_to_whoever_asks_for_it() -> None:
    async with serving(TORNJANGO=ON) as site:
        accept = "application/openmetrics-text; version=1.0.0"
        answer = await site.request(METRICS, headers=[("Accept", accept)])
    assert str(answer.header("Content-Type")).startswith("application/openmetrics-text")
    assert answer.body.endswith(b"# EOF\n")


def test_two_applications_in_one_process_count_for_themselves() -> None:
    first, second = monitoring.Metrics(), monitoring.Metrics()
    first.observe(access.Answer(access.Unread("", "GET", "/"), 200, 1, "a"))
    names = [[s.name for m in x.collect() for s in m.samples] for x in (first, second)]
    assert "tornjango_requests_total" in names[0]
    assert "tornjango_requests_total" not in names[1]


def test_methods_that_clients_make_up_make_no_series() -> None:
    metrics = monitoring.Metrics()
    for number in range(100):
        metrics.observe(access.Answer(access.Unread("", f"M{number}", "/"), 405, 1, "a"))
    assert len(metrics._children) == 0
    (family,) = (m for m in metrics._own.collect() if m.name == "tornjango_requests")
    assert [s.value for s in family.samples if s.name.endswith("_total")] == [100]


@pytest.mark.gen_test
async def test_metrics_without_the_package_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with (
        override_settings(TORNJANGO={"METRICS": METRICS}),
        pytest.raises(ConfigurationError, match=r'pip install "tornjango\[metrics\]"') as raised,
    ):
        monitoring.Metrics()
    assert isinstance(raised.value, ImproperlyConfigured)


def test_one_path_for_both_is_refused() -> None:
    with (
        override_settings(TORNJANGO={"METRICS": "/x", "HEALTH": "/x"}),
        pytest.raises(ConfigurationError, match="Each needs a path of its own"),
    ):
        Application()


# Several workers

WORKER = """
import os, sys
import django
from django.conf import settings
settings.configure()
django.setup()
from tornjango import access, monitoring
metrics = monitoring.Metrics()
metrics.observe(access.Answer(access.Unread("", "GET", "/"), 200, 1, "a"))
gauges = {"in_flight": 1, "connections": 0, "native": 0, "arriving": 0, "workers": {}, "pools": {}, "comet": {"readers": {"poll": 1}}}
metrics.set({**gauges, "loop_delay": float(sys.argv[1])})
import prometheus_client
print("ready", flush=True)
sys.stdin.readline()
print(prometheus_client.generate_latest(metrics).decode())
metrics.close()
"""


@pytest.mark.slow
def test_with_a_folder_each_worker_tells_of_all(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    del environment["DJANGO_SETTINGS_MODULE"]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(delay)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for delay in (1, 2, 3)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    workers[2].kill()
    workers[2].communicate()
    texts = [worker.communicate("\n")[0] for worker in workers[:2]]
    samples = _samples(texts[0].encode())
    labels = {"method": "GET", "status": "200", "view": "a"}
    assert _value(samples, "tornjango_requests_total", **labels) == 3  # the dead one's counts stay
    assert _value(samples, "tornjango_requests_in_flight") == 2
    assert _value(samples, "tornjango_loop_delay_seconds") == 2
