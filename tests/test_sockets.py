from __future__ import annotations

import http.client
import os
import resource
import signal
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.projects import Process, Project
from tornjango import sockets
from tornjango.exceptions import ConfigurationError

CERTIFICATE = Path(__file__).parent / "localhost.pem"
SERVE = ("-m", "tornjango", "serve", "--noreload")


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=20)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self.path))


def get(connection: http.client.HTTPConnection, path: str = "/") -> str:
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


# Unix sockets


def test_a_unix_socket_is_open_to_whoever_may_enter_its_folder(path: Path) -> None:
    with sockets.on_path(str(path)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666


def test_a_socket_that_a_dead_server_left_is_replaced(path: Path) -> None:
    sockets.on_path(str(path)).close()
    assert path.exists()
    with sockets.on_path(str(path)), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_socket_on_which_another_server_listens_is_left_to_it(path: Path) -> None:
    with sockets.on_path(str(path)), socket.socket(socket.AF_UNIX) as client:
        with pytest.raises(ConfigurationError, match=f"Another server listens on {path}"):
            sockets.on_path(str(path))
        client.connect(str(path))


def test_a_server_whose_queue_is_full_is_alive(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as client:
        busy.bind(str(path))
        busy.listen(0)
        client.connect(str(path))
        with pytest.raises(ConfigurationError, match="Another server listens"):
            sockets.on_path(str(path))


def test_what_is_no_socket_is_not_removed(path: Path) -> None:
    path.write_text("dear")
    with pytest.raises(ConfigurationError, match="is not a socket: remove it"):
        sockets.on_path(str(path))
    assert path.read_text() == "dear"


def test_a_file_is_removed_once_and_not_when_it_is_anothers_by_now(path: Path) -> None:
    with sockets.on_path(str(path)):
        file = sockets.SocketFile(str(path))
        file.remove()
        assert not path.exists()
    with sockets.on_path(str(path)):
        first = sockets.SocketFile(str(path))
        kept = path.with_name("kept")
        path.rename(kept)  # it keeps its number: the next file gets another one
        with sockets.on_path(str(path)):
            first.remove()
            assert path.exists()
    file.remove()
    assert path.exists()


# Sockets that are open already


def test_a_descriptor_that_cannot_be_served_on_is_said_and_stays_open(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, pytest.raises(ConfigurationError) as refused:
        sockets.on_descriptor(file.fileno())
    assert "is not a socket" in str(refused.value)
    with (
        socket.socket(type=socket.SOCK_DGRAM) as datagrams,
        pytest.raises(ConfigurationError, match="is not a stream"),
    ):
        sockets.on_descriptor(datagrams.fileno())
    here, there = socket.socketpair()
    with here, there, pytest.raises(ConfigurationError, match="cannot listen"):
        sockets.on_descriptor(here.fileno())


def test_sockets_of_systemd_are_those_of_this_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    assert sockets.from_systemd() == []
    assert os.environ["LISTEN_FDS"] == "1"


def test_a_number_of_sockets_that_is_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "many")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    with pytest.raises(ConfigurationError, match="LISTEN_FDS is not a number of sockets: 'many'"):
        sockets.from_systemd()
    assert "LISTEN_PID" not in os.environ


def test_the_backlog_is_what_the_system_allows() -> None:
    assert 0 < sockets.backlog() <= 65535


def test_the_limit_of_open_files_is_raised_and_never_lowered() -> None:
    code = (
        "import resource as r; from tornjango import sockets\n"
        "hard = r.getrlimit(r.RLIMIT_NOFILE)[1]; r.setrlimit(r.RLIMIT_NOFILE, (64, hard))\n"
        "sockets.raise_file_limit(); sockets.raise_file_limit()\n"
        "print(r.getrlimit(r.RLIMIT_NOFILE)[0])\n"
    )
    raised = int(subprocess.check_output([sys.executable, "-c", code], text=True))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert raised == (sockets.MOST_FILES if hard < 0 else min(hard, sockets.MOST_FILES))


# TLS


def test_without_a_certificate_nothing_is_encrypted() -> None:
    assert sockets.tls_context("") is None


def test_old_tls_is_not_spoken() -> None:
    context = sockets.tls_context(str(CERTIFICATE))
    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "cannot be read: No such file"), ("nonsense", "No certificate with its key is in")],
)
def test_a_wrong_certificate_is_said_with_its_file(
    text: str | None, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "c.pem"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigurationError, match=reason) as refused:
        sockets.tls_context(str(file))
    assert str(file) in str(refused.value)


def test_a_certificate_without_its_key_is_said(tmp_path: Path) -> None:
    certificate, key = CERTIFICATE.read_text().split("-----BEGIN PRIVATE KEY", 1)
    (tmp_path / "c.pem").write_text(certificate)
    (tmp_path / "k.pem").write_text(f"-----BEGIN PRIVATE KEY{key}")
    with pytest.raises(ConfigurationError, match="No certificate with its key"):
        sockets.tls_context(str(tmp_path / "c.pem"))
    assert sockets.tls_context(str(tmp_path / "c.pem"), str(tmp_path / "k.pem"))
    with pytest.raises(ConfigurationError, match="KEYFILE needs a CERTFILE"):
        sockets.tls_context("", str(tmp_path / "k.pem"))


# Served


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("--workers", "1")])
def test_a_project_is_served_on_a_unix_socket_which_goes_with_it(
    workers: tuple[str, ...], path: Path, tmp_path: Path
) -> None:
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project", debug=False)
    with project.running(*SERVE, "--unix", str(path), *workers) as server:
        assert f"at unix:{path}" in server.wait_for("Starting tornjango")
        assert get(UnixConnection(path)) == "quick"
        second = project.run(*SERVE, "--unix", str(path))
        assert second.returncode == 1
        assert f"Another server listens on {path}" in second.stderr
        assert "Traceback" not in second.stderr
        assert get(UnixConnection(path)) == "quick"
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert not path.exists()


@pytest.mark.slow
def test_a_project_is_served_on_a_descriptor(listener: socket.socket, tmp_path: Path) -> None:
    project = Project(tmp_path, debug=False)
    number = listener.fileno()
    with project.running(*SERVE, "--fd", str(number), pass_fds=(number,)) as server:
        server.wait_until_it_serves()
        assert server.url == f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert server.get("/") == "quick"


ACTIVATE = """
import os, sys
first, second, *command = sys.argv[1:]
os.dup2(int(first), 13), os.dup2(int(second), 14)
os.dup2(13, 3), os.dup2(14, 4)
os.environ |= {"LISTEN_FDS": "2", "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": "a:b"}
os.execv(sys.executable, [sys.executable, *command])
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("--workers", "1")])
def test_sockets_of_systemd_are_served_all_of_them(
    workers: tuple[str, ...], listener: socket.socket, tmp_path: Path
) -> None:
    project = Project(tmp_path, debug=False)
    project.write(
        "urls.py",
        "import os\nfrom django.http import HttpResponse\nfrom django.urls import path\n"
        "def left(request):\n    return HttpResponse(' '.join(k for k in os.environ if k.startswith('LISTEN_')))\n"
        "urlpatterns = [path('', left)]\n",
    )
    project.write("activate.py", ACTIVATE)
    with socket.create_server(("127.0.0.1", 0)) as other:
        numbers = (listener.fileno(), other.fileno())
        ports = [listener.getsockname()[1], other.getsockname()[1]]
        command = ("activate.py", *map(str, numbers), *SERVE, *workers)
        with project.running(*command, pass_fds=numbers) as server:
            shown = server.wait_for("Starting tornjango")
            for port in ports:
                assert f"http://127.0.0.1:{port}/" in shown
                # The variables are gone: what the server starts has not got the sockets.
                assert get(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        (*SERVE, "127.0.0.1:0"),
        ("manage.py", "runserver", "--noreload", "127.0.0.1:0"),
        (*SERVE, "127.0.0.1:0", "--workers", "1"),
    ],
)
def test_a_project_is_served_over_tls(command: tuple[str, ...], tmp_path: Path) -> None:
    project = Project(tmp_path)
    with project.running(*command, "--certfile", str(CERTIFICATE)) as server:
        assert server.wait_until_it_serves().startswith("https://127.0.0.1:")
        assert _get_over_tls(server) == ("quick", "http/1.1")


def _get_over_tls(server: Process) -> tuple[str, str | None]:
    context = ssl.create_default_context(cafile=CERTIFICATE)
    context.set_alpn_protocols(["h2", "http/1.1"])
    port = int(server.url.rpartition(":")[2])
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
    connection.request("GET", "/")
    protocol = connection.sock.selected_alpn_protocol()
    answer = connection.getresponse().read().decode()
    connection.close()
    return answer, protocol


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--certfile", "/nowhere.pem"), "/nowhere.pem cannot be read: No such file or directory."),
        (("--fd", "1"), "File descriptor 1 is not a socket"),
        (("--unix", "manage.py"), "manage.py is not a socket"),
    ],
)
def test_what_cannot_be_served_on_is_one_clear_sentence(
    options: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    done = Project(tmp_path, debug=False).run(*SERVE, *options)
    assert done.returncode == 1
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
