"""What engines do on a connection of Django's own. It blocks: it is called in a thread.

Errors are those of ``django.db.utils``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

from django.db.utils import Error, NotSupportedError, OperationalError

from tornjango.db.compiler import Params, Row
from tornjango.db.engines.base import Result, left_open

#: Of psycopg's ``transaction_status``, in a transaction and in a failed one: libpq's numbers.
IN_TRANSACTION, IN_ERROR = 2, 3


def execute(wrapper: Any, sql: str, params: Params) -> Result:
    with wrapper.cursor() as cursor:
        cursor.execute(sql, params)
        # Before the rest: some drivers count a statement's rows while they are fetched.
        rows: list[Row] = [] if cursor.description is None else list(cursor.fetchall())
        return Result(
            rows,
            cursor.description,
            cursor.rowcount,
            _sent(cursor),
            getattr(cursor, "lastrowid", None),
        )


def execute_alone(wrapper: Any, sql: str, params: Params) -> Result:
    """In autocommit: see `Engine.execute`. MySQL's driver does not tell whether a transaction was left open."""
    if not wrapper.get_autocommit():
        # Django's own connection of the caller, in his transaction.
        return execute(wrapper, sql, params)
    try:
        result = execute(wrapper, sql, params)
    except BaseException:
        _end_transaction(wrapper)
        raise
    if _end_transaction(wrapper):
        raise left_open(sql, wrapper.alias)
    return result


def execute_in_transaction(wrapper: Any, sql: str, params: Params) -> Result:
    check_transaction(wrapper)
    return execute(wrapper, sql, params)


def stream(wrapper: Any, sql: str, params: Params) -> Any:
    """A cursor that has run the query; as few of its rows are in memory as the driver can do with."""
    cursor = wrapper.chunked_cursor()
    try:
        cursor.execute(sql, params)
    except BaseException:
        close_cursors(wrapper, [cursor])
        raise
    return cursor


def mogrify(wrapper: Any, sql: str, params: Params) -> bytes:
    """Raises NotSupportedError where the driver does not quote by itself."""
    quote: Callable[[str, Params], str | bytes] | None
    with wrapper.cursor() as cursor, wrapper.wrap_database_errors:
        quote = getattr(wrapper.ops, "compose_sql", None) or getattr(cursor, "mogrify", None)
        if quote is None:
            raise NotSupportedError(
                f"{wrapper.display_name}'s driver sends parameters apart from the statement, and has no function that "
                f"puts them into it (database {wrapper.alias!r})."
            )
        quoted = quote(sql, params)
    return quoted.encode() if isinstance(quoted, str) else quoted


def begin(wrapper: Any) -> None:
    wrapper.set_autocommit(False, force_begin_transaction_with_broken_autocommit=True)


def commit(wrapper: Any, cursors: Iterable[Any]) -> None:
    """Afterwards the connection is in autocommit again; raises what kept the transaction from being committed."""
    close_cursors(wrapper, cursors)
    try:
        check_transaction(wrapper)
        wrapper.commit()
    except Error:
        reset(wrapper, ())
        raise
    # Committed it is, whatever becomes of the connection.
    _set_autocommit(wrapper)


def reset(wrapper: Any, cursors: Iterable[Any]) -> None:
    """Rolls back, and leaves a connection that is as good as new: in autocommit, or closed. Raises nothing."""
    close_cursors(wrapper, cursors)
    if wrapper.connection is None:
        return
    try:
        wrapper.rollback()
    except Error:
        # The server rolls back what a lost connection has begun.
        close(wrapper)
    else:
        _set_autocommit(wrapper)


def close_cursors(wrapper: Any, cursors: Iterable[Any]) -> None:
    for cursor in cursors:
        # A cursor whose connection is lost, or its transaction aborted, has gone with it.
        with contextlib.suppress(Error), wrapper.wrap_database_errors:
            cursor.close()


def close(wrapper: Any) -> None:
    """Also a database in memory, whose connection Django does not close."""
    raw, wrapper.connection = wrapper.connection, None
    if raw is not None:
        # Closing twice, or after the server did, is an error to some drivers.
        with contextlib.suppress(wrapper.Database.Error):
            raw.close()


def check_transaction(wrapper: Any) -> None:
    """Raises OperationalError when the transaction is lost: the next statement would not be in it."""
    if is_closed(wrapper):
        raise OperationalError(
            f"The connection to database {wrapper.alias!r} was lost in a transaction, and with it all that was "
            "done there. Begin again from its start."
        )
    # sqlite3's
    if getattr(wrapper.connection, "in_transaction", True) is False:
        raise OperationalError(
            f"The transaction on database {wrapper.alias!r} has ended: SQLite rolls it back by itself when a "
            "statement that writes is interrupted, or the disk is full. Begin again from its start."
        )


def _set_autocommit(wrapper: Any) -> None:
    """As good as new, or closed."""
    try:
        wrapper.set_autocommit(True)
    except Error:
        close(wrapper)


def is_closed(wrapper: Any) -> bool:
    """As psycopg tells; other drivers' statements say so themselves, each time."""
    return wrapper.connection is None or bool(getattr(wrapper.connection, "closed", False))


def _end_transaction(wrapper: Any) -> bool:
    """Whether there was one to roll back, in autocommit."""
    if not in_transaction(wrapper):
        return False
    try:
        # The driver's own rollback does nothing in autocommit.
        with wrapper.cursor() as cursor:
            cursor.execute("ROLLBACK")
    except Error:
        close(wrapper)
    return True


def in_transaction(wrapper: Any) -> bool:
    raw = wrapper.connection
    # sqlite3's, and oracledb's
    for name in ("in_transaction", "transaction_in_progress"):
        if (value := getattr(raw, name, None)) is not None:
            return bool(value)
    return transaction_status(wrapper) in (IN_TRANSACTION, IN_ERROR)


def transaction_status(wrapper: Any) -> int:
    status: int = getattr(getattr(wrapper.connection, "info", None), "transaction_status", 0)
    return status


def _sent(cursor: Any) -> bytes | None:
    """psycopg2 tells, and MySQLdb."""
    sent = getattr(cursor, "query", None) or getattr(cursor, "_executed", None)
    return sent if isinstance(sent, bytes) else None
