"""Django's database connection over an engine, for green code.

A wrapper of Django's has everything that Django does with a connection: atomic blocks, savepoints, hooks on commit,
execute_wrappers, the log of queries. Here it is subclassed, whatever backend it is of, and given a connection whose
cursor sends statements to the engine: in autocommit each to any connection of the pool, in a transaction all to one.

Each scope of green code (``tornjango.green``) has wrappers of its own; ``django.db.connections`` finds them there.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from copy import copy
from functools import cache
from typing import Any, NoReturn

from asgiref.sync import iscoroutinefunction
from django.db import connections
from django.db.backends.utils import debug_transaction
from django.db.transaction import TransactionManagementError
from django.db.utils import Error, NotSupportedError
from django.utils.asyncio import async_unsafe
from django.utils.functional import cached_property

from tornjango import green
from tornjango.db.compiler import Params, Row
from tornjango.db.cursors import Cursor, PoolConnection, ServerCursor
from tornjango.db.engines.base import CANCEL_TIMEOUT, Engine, Result, Stream

logger = logging.getLogger("tornjango.db")

#: Wrappers kept for the next green call, for each database.
KEPT = 32


class InTurn:
    """The connection of a transaction that tasks share: a statement waits until nobody else is at it."""

    def __init__(self, connection: PoolConnection, scope: green.Scope, alias: str) -> None:
        self._connection = connection
        self._scope = scope
        self._alias = alias

    def is_of(self, scope: green.Scope) -> bool:
        return self._scope is scope

    async def execute(self, sql: str, params: Params = None) -> Result:
        async with self._scope.turn():
            return await self._target().execute(sql, params)

    def stream(self, stream: Stream) -> Stream:
        """``stream``, a part of the transaction, for a task that others take turns with."""
        return StreamInTurn(self._scope, stream)

    def _target(self) -> PoolConnection | Engine:
        """The transaction may have ended while its turn was waited for."""
        found = transaction(self._alias)
        assert not isinstance(found, InTurn)
        return self._connection.engine if found is None else found


class StreamInTurn(Stream):
    def __init__(self, scope: green.Scope, stream: Stream) -> None:
        self._scope = scope
        self._stream = stream

    @property
    def description(self) -> Sequence[Any] | None:  # type: ignore[override]
        return self._stream.description

    async def fetch(self, size: int) -> list[Row]:
        async with self._scope.turn():
            return await self._stream.fetch(size)

    async def close(self) -> None:
        async with self._scope.turn():
            await self._stream.close()

    def abandon(self) -> None:
        self._stream.abandon()


class PoolWrapper:
    """Over a class of Django's database wrappers: its connection is a `PoolConnection`."""

    # Not in its vars(), which it is compared to.
    __slots__ = ("__dict__", "as_new")

    engine: Engine
    connection: Any
    as_new: dict[str, Any]

    # Where Django opens a connection

    def get_new_connection(self, conn_params: object) -> PoolConnection:
        return PoolConnection(self.engine)

    def connect(self) -> None:
        """Sends nothing: what Django sets up on a new connection, the engine has, on each of its own."""
        self.in_atomic_block = False
        self.savepoint_ids: list[Any] = []
        self.atomic_blocks: list[Any] = []
        self.needs_rollback = False
        self.health_check_enabled = False
        self.health_check_done = True
        self.close_at = None
        self.closed_in_transaction = False
        self.errors_occurred = False
        self.connection = self.get_new_connection(None)
        self.set_autocommit(self.settings_dict["AUTOCOMMIT"])  # type: ignore[attr-defined]
        self.run_on_commit: list[Any] = []

    def create_cursor(self, name: str | None = None) -> Cursor | ServerCursor:
        cursor: Cursor | ServerCursor = self.connection.cursor(name)
        return cursor

    def chunked_cursor(self) -> Any:
        """A stream of the engine's, where Django itself has a server-side cursor.

        Elsewhere it would hold another connection than the statements that come between: SQLite would lock them out.
        """
        wrapper: Any = self
        return (
            wrapper._cursor(name="stream") if wrapper.vendor == "postgresql" else wrapper.cursor()
        )

    def ensure_connection(self) -> None:
        if self.connection is None:
            super().ensure_connection()  # type: ignore[misc]

    def get_autocommit(self) -> bool:
        """Asked on the loop, too, by ``on_commit``."""
        if self.connection is None:
            return bool(self.settings_dict["AUTOCOMMIT"])  # type: ignore[attr-defined]
        return bool(self.autocommit)  # type: ignore[attr-defined]

    def _set_autocommit(self, autocommit: bool) -> None:
        self.connection.set_autocommit(autocommit)

    def _start_transaction_under_autocommit(self) -> None:
        with debug_transaction(self, "BEGIN"):
            self.connection.set_autocommit(False)

    # Cancelled in the middle, a transaction would have an end that nobody knows, or hooks that never run.

    def _commit(self) -> None:
        if self.connection is not None:
            with debug_transaction(self, "COMMIT"), green.shielded(CANCEL_TIMEOUT):
                self.connection.commit()

    def _rollback(self) -> None:
        if self.connection is not None:
            with debug_transaction(self, "ROLLBACK"), green.shielded(CANCEL_TIMEOUT):
                self.connection.rollback()

    # The transaction around a savepoint may go on after a time-out inside.

    @async_unsafe
    def _savepoint(self, sid: str) -> None:
        green.wait(self.connection.begun())
        with green.shielded(CANCEL_TIMEOUT):
            super()._savepoint(sid)  # type: ignore[misc]

    def _savepoint_rollback(self, sid: str) -> None:
        with green.shielded(CANCEL_TIMEOUT):
            super()._savepoint_rollback(sid)  # type: ignore[misc]

    def _savepoint_commit(self, sid: str) -> None:
        with green.shielded(CANCEL_TIMEOUT):
            super()._savepoint_commit(sid)  # type: ignore[misc]

    def run_and_clear_commit_hooks(self) -> None:
        with green.shielded():
            super().run_and_clear_commit_hooks()  # type: ignore[misc]

    def disable_constraint_checking(self) -> bool:
        """Not in autocommit: it is done to one connection, and each statement may have another."""
        return self.in_transaction and bool(super().disable_constraint_checking())  # type: ignore[misc]

    def _close(self) -> None:
        if self.connection is not None:
            self.connection.close()

    def is_usable(self) -> bool:
        """Whether statements can be sent. A pool replaces connections by itself, but not that of a transaction."""
        if self.connection is None or self.connection.lease is None:
            return self.connection is not None
        try:
            self.connection.cursor().execute("SELECT 1")
        except Error:
            return False
        return True

    def copy(self, alias: str | None = None) -> Any:
        """A wrapper that is in no transaction, over the same engine."""
        copy: Any = super().copy(alias)  # type: ignore[misc]
        copy.engine = self.engine
        return copy

    def _nodb_cursor(self) -> NoReturn:
        raise NotSupportedError(
            "In green code there is no connection to a server without its database: the pool is of the one database. "
            "Use a command, or a sync view in a worker thread."
        )

    def ensure_timezone(self) -> bool:
        return False

    @property
    def pg_version(self) -> int:
        """Every connection of the engine tells its wrapper; one is opened if none has been yet."""
        if "pg_version" not in vars(self.engine.wrapper):
            green.wait(self.engine.open())
        version: int = self.engine.wrapper.pg_version
        return version

    @property
    def queries_logged(self) -> bool:
        return bool(
            self.force_debug_cursor  # type: ignore[attr-defined]
            or self.engine.wrapper.queries_logged
        )

    def on_commit(self, func: Callable[[], Any], robust: bool = False) -> None:
        """Django's, which takes ``async def`` functions as well: they are awaited, one after the other."""
        if iscoroutinefunction(func):
            func = _Awaited(func)
        super().on_commit(func, robust)  # type: ignore[misc]

    # As a resource of a scope

    @property
    def in_transaction(self) -> bool:
        return self.connection is not None and not self.connection.autocommit

    def release(self) -> None:
        """Its scope has ended: it is kept for another one, if it is as good as new."""
        wrapper: Any = self
        if wrapper.queries_log:
            self.engine.wrapper.queries_log.extend(wrapper.queries_log)
            wrapper.queries_log.clear()
        if wrapper.in_atomic_block or self.in_transaction:
            logger.error(
                "Green code left a transaction open on database %r; it is rolled back. "
                "Begin and end a transaction in one call, or in one `async with db.atomic()`.",
                wrapper.alias,
            )
            if self.connection is not None:
                self.connection.abandon()
            return
        free = _free.get(self.engine)
        if free is not None and len(free) < KEPT and self._is_as_new():
            free.append(wrapper)

    def _is_as_new(self) -> bool:
        """What somebody has set on it, a tenant say, would otherwise be met by the next one."""
        state = vars(self)
        if state == self.as_new:
            return True
        state.update(savepoint_state=0, errors_occurred=False, rollback_exc=None)
        for name in state.keys() - self.as_new.keys():
            # Worked out from the settings, which a test may change.
            if isinstance(getattr(type(self), name, None), cached_property):
                del state[name]
        return state == self.as_new


class _Awaited:
    """A coroutine function as Django's hooks on commit are: green code calls it, or, in autocommit, the loop does."""

    def __init__(self, func: Callable[[], Awaitable[object]]) -> None:
        self.func = func
        self.__qualname__ = getattr(func, "__qualname__", repr(func))

    def __call__(self) -> None:
        if green.active():
            green.wait(self.func())
            return
        task = asyncio.ensure_future(self.func())
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)


_tasks: set[asyncio.Future[Any]] = set()
#: Of the engines that are open.
_free: dict[Engine, list[Any]] = {}


@cache
def _wrapper_class(base: Any) -> type[Any]:
    return type(base.__name__, (PoolWrapper, base), {"__module__": base.__module__})


def make(engine: Engine) -> Any:
    """A wrapper that is in no transaction, for a scope to keep."""
    free = _free.get(engine)
    if free:
        return free.pop()
    wrapper = _make_unconnected(engine)
    wrapper.connect()
    wrapper.as_new = {
        name: copy(value) if isinstance(value, (dict, list, set, deque)) else value
        for name, value in vars(wrapper).items()
    }
    return wrapper


def _make_unconnected(engine: Engine) -> Any:
    plain = engine.wrapper
    base: Any = type(plain)
    wrapper = _wrapper_class(base)(plain.settings_dict, plain.alias)
    wrapper.engine = engine
    return wrapper


class Connections:
    """Where ``django.db.connections`` looks for a connection while the pools are open.

    Green code finds that of its scope; other code on the event loop too, in a transaction of its own, else one that is
    never connected, and good for compiling SQL; any other thread what it would find anyway.
    """

    def __init__(self, threads: Any, engines: dict[str, Engine]) -> None:
        vars(self).update(_threads=threads, _engines=engines, _unconnected={})

    def __getattr__(self, alias: str) -> Any:
        if green.active():
            return self._of_scope(alias)
        if asyncio._get_running_loop() is None or not green.is_served():
            return getattr(self._threads, alias)
        scope = green.current()
        if scope is not None and alias in scope.resources and scope.admits(asyncio.current_task()):
            return scope.resources[alias]
        return self._unconnected.get(alias) or self._make_unconnected(alias)

    def _of_scope(self, alias: str) -> Any:
        scope = green.current()
        assert scope is not None
        wrapper = scope.resources.get(alias)
        if wrapper is None:
            _refuse(scope.outer, alias)
            wrapper = scope.resources[alias] = make(self._engine(alias))
        return wrapper

    def _make_unconnected(self, alias: str) -> Any:
        engine = self._engine(alias)
        wrapper = self._unconnected[alias] = _make_unconnected(engine)
        wrapper.queries_log = engine.wrapper.queries_log
        return wrapper

    def _engine(self, alias: str) -> Engine:
        try:
            engine: Engine = self._engines[alias]
        except KeyError:
            raise AttributeError(alias) from None  # django.db.connections knows what to say of it
        return engine

    def __setattr__(self, alias: str, value: Any) -> None:
        if green.active():
            scope = green.current()
            assert scope is not None
            scope.resources[alias] = value
        else:
            setattr(self._threads, alias, value)

    def __delattr__(self, alias: str) -> None:
        if green.active():
            scope = green.current()
            assert scope is not None
            scope.resources.pop(alias, None)
        else:
            delattr(self._threads, alias)


def install(engines: dict[str, Engine]) -> None:
    _free.update((engine, []) for engine in engines.values())
    connections._connections = Connections(connections._connections, engines)  # type: ignore[attr-defined]


def uninstall() -> None:
    storage = connections._connections  # type: ignore[attr-defined]
    for engine in storage._engines.values():
        _free.pop(engine, None)
    connections._connections = storage._threads  # type: ignore[attr-defined]


def transaction(alias: str) -> PoolConnection | InTurn | None:
    """The connection of the transaction that the running task has open on a database; None if it has none.

    Raises TransactionManagementError when the transaction around the caller is another task's.
    """
    scope = green.current()
    if scope is None or not green.is_served():
        return None
    if not scope.admits(asyncio.current_task()):
        _refuse(scope, alias)
        return None
    wrapper: Any = scope.resources.get(alias)
    if wrapper is None or not wrapper.in_transaction:
        _refuse(scope.outer, alias)
        return None
    connection: PoolConnection = wrapper.connection
    if scope.lock is not None:
        return _in_turn(connection, scope, alias)
    wrapper.validate_no_broken_transaction()
    return connection


def _in_turn(connection: PoolConnection, scope: green.Scope, alias: str) -> InTurn:
    shared: InTurn | None = connection.in_turn
    if shared is None or not shared.is_of(scope):
        shared = connection.in_turn = InTurn(connection, scope, alias)
    return shared


def of_task(alias: str) -> Any:
    """The wrapper that the running task's scope has of a database; None if it has none."""
    scope = green.current()
    if scope is None or not scope.admits(asyncio.current_task()):
        return None
    return scope.resources.get(alias)


def in_transaction() -> bool:
    """Whether a transaction is open around the caller, on any database and of whichever task."""
    scope = green.current()
    while scope is not None:
        wrappers: Any = scope.resources.values()
        if not scope.ended and any(wrapper.in_transaction for wrapper in wrappers):
            return True
        scope = scope.outer
    return False


def _refuse(scope: green.Scope | None, alias: str) -> None:
    while scope is not None:
        wrapper: Any = scope.resources.get(alias)
        if not scope.ended and wrapper is not None and wrapper.in_transaction:
            raise TransactionManagementError(
                f"A transaction is open on database {alias!r}, and it is another task's: of the task that entered "
                "`async with db.atomic()`. Only that task may use it: await there, one query after the other. "
                "(gather, create_task, execute_async, and wait_for before Python 3.12, make tasks.)"
            )
        scope = scope.outer
