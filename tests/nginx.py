"""A real nginx before a test's server: what it does to streams, real sites meet."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin")

#: For what needs it.
needs_nginx = pytest.mark.skipif(
    NGINX is None, reason="needs nginx (on Debian: apt-get install nginx)"
)

#: A WebSocket's handshake, which nginx passes on to nobody unless it is told.
UPGRADE = """
    proxy_http_version 1.1;
    proxy_set_header Upgrade $http_upgrade;
    proxy_set_header Connection upgrade;
"""

_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
_MAIN = """
daemon off;
{user}
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log off;
    {temporary}
    {servers}
}}
"""
_SERVER = """
server {{
    listen {address};
    location / {{
        proxy_pass http://127.0.0.1:{upstream};
        proxy_set_header Host $http_host;
        {inside}
    }}
    {beside}
}}
"""


@contextmanager
def proxies(
    folder: Path, upstream: int, servers: Mapping[str, tuple[str, str]]
) -> Iterator[dict[str, str]]:
    """One nginx with a server for each name, before the port ``upstream``; yields their addresses, without a slash.

    Each is described by its directives: those inside of ``location /``, and those beside it.
    """
    assert NGINX is not None
    with ExitStack() as stack:
        listening = {name: stack.enter_context(_listen()) for name in servers}
        addresses = {name: f"127.0.0.1:{sock.getsockname()[1]}" for name, sock in listening.items()}
        config = _MAIN.format(
            folder=folder,
            # A worker that root starts is nobody, who may not enter here.
            user="user root;" if os.geteuid() == 0 else "",
            temporary="\n".join(f"{name}_temp_path {folder}/{name};" for name in _TEMPORARY),
            servers="".join(
                _SERVER.format(
                    address=addresses[name], upstream=upstream, inside=inside, beside=beside
                )
                for name, (inside, beside) in servers.items()
            ),
        )
        (folder / "nginx.conf").write_text(config)
        fds = [sock.fileno() for sock in listening.values()]
        process = subprocess.Popen(
            [
                NGINX,
                "-p",
                str(folder),
                "-c",
                str(folder / "nginx.conf"),
                "-e",
                str(folder / "error.log"),
            ],
            pass_fds=fds,
            # Sockets that listen already, as those that one nginx hands to the next: so ports come from the kernel.
            env=os.environ | {"NGINX": "".join(f"{fd};" for fd in fds)},
        )
        try:
            yield {name: f"http://{address}" for name, address in addresses.items()}
        finally:
            process.terminate()
            process.wait(20)


def _listen() -> socket.socket:
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)  # as nginx leaves them to the next
    return listening
