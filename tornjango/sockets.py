"""Where a server listens: addresses, a Unix socket, or sockets that it was started with; and TLS on them."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import ssl
import stat
from pathlib import Path

from tornado.netutil import bind_sockets

from tornjango.exceptions import ConfigurationError

#: The first of the sockets that systemd passes; sd_listen_fds(3).
FIRST_PASSED = 3
#: The variables that tell of them.
SYSTEMD = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
#: More open files than this no server has connections for, and some programs close each one they could have.
MOST_FILES = 1024 * 1024
#: For whoever may enter its folder: a proxy in front runs as another user.
UNIX_MODE = 0o666


def backlog() -> int:
    """How many connections may wait to be accepted: as many as the system allows."""
    with contextlib.suppress(OSError, ValueError):
        return min(int(Path("/proc/sys/net/core/somaxconn").read_text()), 65535)
    return socket.SOMAXCONN


def raise_file_limit() -> None:
    """Lets this process have as many connections open as it may; what the system refuses stays as it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # macOS has a limit of its own below "infinity".
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def on_address(address: str, port: int, *, ipv6: bool = False) -> list[socket.socket]:
    """Listens on an address or a name, as ``runserver`` takes them. Raises ``OSError``."""
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    return bind_sockets(port, address, family, backlog=backlog())


def on_path(path: str) -> socket.socket:
    """Listens on a Unix socket; what a server that is gone left there is replaced.

    Raises ConfigurationError where another server still listens, or something else stands; and ``OSError``.
    """
    _clear(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, UNIX_MODE)
        listener.listen(backlog())
    except BaseException:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def _clear(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise ConfigurationError(
                f"{path} is not a socket: remove it, or serve on another path."
            )
    except FileNotFoundError:
        return
    if _is_live(path):
        raise ConfigurationError(
            f"Another server listens on {path}: end it first, or serve on another path."
        )
    os.unlink(path)


def _is_live(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)  # with a full queue, connecting would wait
        try:
            client.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:
            return True
    return True


def on_descriptor(number: int) -> socket.socket:
    """A socket that whoever started this process has bound, and may listen on already.

    Raises ConfigurationError where the number is of no socket, or of one that cannot listen.
    """
    try:
        listener = socket.socket(fileno=number)
    except OSError as exc:
        raise ConfigurationError(
            f"File descriptor {number} is not a socket: {exc.strerror}."
        ) from exc
    try:
        if listener.type != socket.SOCK_STREAM:
            raise ConfigurationError(f"The socket of file descriptor {number} is not a stream.")
        listener.listen(backlog())
    except OSError as exc:
        listener.detach()
        raise ConfigurationError(
            f"The socket of file descriptor {number} cannot listen: {exc.strerror}."
        ) from exc
    except ConfigurationError:
        listener.detach()
        raise
    listener.setblocking(False)
    listener.set_inheritable(False)
    return listener


def from_systemd() -> list[socket.socket]:
    """The sockets that systemd has for this process; none where it was not started by one of its sockets.

    The variables that tell of them are taken away: a process that this one starts has
    not got the sockets. Raises ConfigurationError as `on_descriptor`.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = os.environ.get("LISTEN_FDS", "")
    for name in SYSTEMD:
        os.environ.pop(name, None)
    if not count.isdigit():
        raise ConfigurationError(f"LISTEN_FDS is not a number of sockets: {count!r}.")
    return [on_descriptor(FIRST_PASSED + index) for index in range(int(count))]


def shown(listener: socket.socket, scheme: str) -> str:
    """Where a socket listens, for the log: a URL, or ``unix:`` and a path."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        path = os.fsdecode(name)
        return f"unix:{path}" if path else "a Unix socket without a name"
    host = f"[{name[0]}]" if listener.family == socket.AF_INET6 else name[0]
    return f"{scheme}://{host}:{name[1]}/"


class SocketFile:
    """The path of a Unix socket, to be removed by whoever listens on it, and not after another has taken it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.made = _identity(path)

    def remove(self) -> None:
        """Harmless a second time."""
        if self.made is not None and _identity(self.path) == self.made:
            os.unlink(self.path)
        self.made = None


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def tls_context(certfile: str, keyfile: str = "") -> ssl.SSLContext | None:
    """How connections are encrypted; None without a certificate, when they are not.

    TLS 1.2 is the oldest that is spoken, and HTTP/1.1 what is offered (RFC 7301). The files are read now. Raises
    ConfigurationError, naming the file.
    """
    if not certfile:
        if keyfile:
            raise ConfigurationError("KEYFILE needs a CERTFILE: the certificate of that key.")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    for file in filter(None, (certfile, keyfile)):
        _check_readable(file)
    try:
        context.load_cert_chain(certfile, keyfile or None, password=_no_password)
    except ssl.SSLError as exc:
        files = f"{certfile} and {keyfile}" if keyfile else certfile
        raise ConfigurationError(
            f"No certificate with its key is in {files} (PEM is what is read): {exc.reason or exc}."
        ) from exc
    return context


def _check_readable(file: str) -> None:
    try:
        with open(file, "rb"):
            pass
    except OSError as exc:
        raise ConfigurationError(f"{file} cannot be read: {exc.strerror}.") from exc


def _no_password() -> str:
    """OpenSSL would ask on the terminal, and a worker would wait there."""
    raise ConfigurationError(
        "The key has a password, which a server cannot type: take one without."
    )
