from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import PurePosixPath

# A template is a page's text. What is larger is data that happens to lie in the folder: read when it is asked for.
LARGE = 1024 * 1024

# Nobody writes templates in these, but DIRS may point at the whole project.
FOREIGN_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages"})
FOREIGN_SUFFIXES = frozenset({".py", ".pyc", ".so"})


def walk(folder: str) -> Iterator[tuple[str, str, int]]:
    """Each file below ``folder``: its template name, its absolute path, its size. Symbolic links are followed.

    A folder that is not there, or that may not be read, has none, as for Django's loaders.
    """
    folder = os.path.abspath(folder)
    yield from _walk(folder, "", frozenset())


def _walk(
    folder: str, prefix: str, above: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, str, int]]:
    for entry in _entries(folder):
        status = _status(entry)
        if status is None:
            continue
        identity = (status.st_dev, status.st_ino)
        if stat.S_ISREG(status.st_mode):
            yield prefix + entry.name, entry.path, status.st_size
        # A link to a folder above it would go round for ever.
        elif stat.S_ISDIR(status.st_mode) and identity not in above:
            yield from _walk(entry.path, f"{prefix}{entry.name}/", above | {identity})


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat()
    except OSError:  # It vanished just now, or is a link to nothing or to itself.
        return None


def foreign(name: str, size: int) -> bool:
    """Whether a file is hardly a template, so that reading it waits until somebody asks for it."""
    parts = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in parts.parts[:-1])
    return (
        size > LARGE
        or hidden
        or parts.suffix in FOREIGN_SUFFIXES
        or not FOREIGN_FOLDERS.isdisjoint(parts.parts)
    )


def inside(path: str | os.PathLike[str], folders: list[str]) -> bool:
    """Whether ``path`` lies below one of ``folders``, whether or not either is told through a symbolic link."""
    paths = {os.path.abspath(path), os.path.realpath(path)}
    roots = {os.path.abspath(folder) for folder in folders}
    roots |= {os.path.realpath(folder) for folder in folders}
    return any(file.startswith(os.path.join(root, "")) for file in paths for root in roots)
