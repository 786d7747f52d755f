"""``bin/bench download``: what a large ``FileResponse`` costs its server."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.figures import table
from bench.servers import BenchError, Peer, Place, Server, serve
from bench.wire import request_bytes

TIMEOUT = 120.0
#: How often the server's memory is looked at, in seconds.
LOOK = 0.01


@dataclasses.dataclass(frozen=True)
class Download:
    server: str
    clients: int
    megabytes: float
    """Of one file."""
    idle_mib: float
    peak_mib: float
    """The most seen while the clients loaded."""
    cpu_ms: float
    """Of the server, for one file."""
    megabytes_per_second: float
    """Of all the clients together."""


@contextlib.contextmanager
def file(megabytes: int) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(prefix="bench-", suffix=".bin") as made:
        for _ in range(megabytes):
            made.write(os.urandom(10**6))
        made.flush()
        Path(made.name).chmod(0o644)
        yield Path(made.name)


def run(peer: Peer, place: Place, path: Path, clients: int) -> Download:
    """Raises BenchError when what arrives is not the file."""
    wanted = hashlib.sha256(path.read_bytes()).digest()
    target = f"/{peer.spelling}/download/"
    with serve(peer, place, middleware="default") as server:
        load(server.port, target, wanted)  # what is imported and opened once
        idle, before = server.rss(), server.cpu()
        start = time.monotonic()
        with _watched(server) as peak, ThreadPoolExecutor(clients) as pool:
            for loaded in [pool.submit(load, server.port, target, wanted) for _ in range(clients)]:
                loaded.result()
        seconds = time.monotonic() - start
        cpu = server.cpu() - before
    size = path.stat().st_size / 1e6
    return Download(
        server=peer.name,
        clients=clients,
        megabytes=size,
        idle_mib=idle / 2**20,
        peak_mib=max(peak) / 2**20,
        cpu_ms=cpu / clients * 1e3,
        megabytes_per_second=size * clients / seconds,
    )


@contextlib.contextmanager
def _watched(server: Server) -> Iterator[list[int]]:
    """The memory of the server, looked at until the end of the block."""
    seen, over = [server.rss()], threading.Event()

    def look() -> None:
        while not over.wait(LOOK):
            seen.append(server.rss())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def load(port: int, target: str, wanted: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as connection:
        request = request_bytes(target).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        connection.sendall(request)
        found, head = hashlib.sha256(), b""
        begun = False
        while data := connection.recv(1 << 20):
            if begun:
                found.update(data)
                continue
            head += data
            line, end, rest = head.partition(b"\r\n\r\n")
            if end:
                _check(line)
                found.update(rest)
                begun = True
    if found.digest() != wanted:
        raise BenchError(f"{target}: what arrived is not the file")


def _check(head: bytes) -> None:
    lines = head.lower().split(b"\r\n")
    if b" 200 " not in lines[0] + b" " or not any(b"content-length" in line for line in lines):
        raise BenchError(f"not a download: {head[:200]!r}")


def report(results: list[Download]) -> str:
    header = [
        f"{results[0].clients} downloads of {results[0].megabytes:.0f} MB",
        *("memory idle, MiB", "at its peak", "CPU for one, ms", "MB/s"),
    ]
    rows = [
        [
            r.server,
            f"{r.idle_mib:.1f}",
            f"{r.peak_mib:.1f} (+{r.peak_mib - r.idle_mib:.1f})",
            f"{r.cpu_ms:.0f}",
            f"{r.megabytes_per_second:.0f}",
        ]
        for r in results
    ]
    return table(header, rows)
