"""Cancels a statement of psycopg2 without holding up the process.

``connection.cancel()`` keeps the interpreter's lock while it waits for the server, so that a frozen server would freeze
every thread. libpq itself does not mind: it is called here as psycopg2's ``pgconn_ptr`` is meant for, by ctypes, which
lets go of the lock.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import psycopg2
from psycopg2 import _psycopg

ERROR_SIZE = 256


def _load() -> ctypes.CDLL:
    # A symbol is looked for in the libraries that a module is linked to, too: the libpq that psycopg2 uses.
    libpq = ctypes.CDLL(_psycopg.__file__)
    libpq.PQgetCancel.argtypes = [ctypes.c_void_p]
    libpq.PQgetCancel.restype = ctypes.c_void_p
    libpq.PQcancel.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
    libpq.PQcancel.restype = ctypes.c_int
    libpq.PQfreeCancel.argtypes = [ctypes.c_void_p]
    libpq.PQfreeCancel.restype = None
    return libpq


_libpq = _load()


def prepare(connection: Any) -> Callable[[], None]:
    """A function that asks the server to end what ``connection`` runs, and returns when the server has been told.

    It blocks, and may be called in any thread, whatever becomes of the connection; but call it, once. It raises
    psycopg2's OperationalError when the server cannot be told.
    """
    cancel = _libpq.PQgetCancel(connection.pgconn_ptr)
    if not cancel:
        raise psycopg2.InterfaceError("There is no connection whose statement could be cancelled.")

    def tell() -> None:
        error = ctypes.create_string_buffer(ERROR_SIZE)
        try:
            told = _libpq.PQcancel(cancel, error, ERROR_SIZE)
        finally:
            _libpq.PQfreeCancel(cancel)
        if not told:
            raise psycopg2.OperationalError(error.value.decode(errors="replace"))

    return tell
