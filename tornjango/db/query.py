from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, ParamSpec, Self, TypeVar, overload

from django.db.models import Manager, QuerySet
from django.db.models.query import RawQuerySet
from django.db.utils import DEFAULT_DB_ALIAS

from tornjango import green
from tornjango.db import connection, fetching, pools, streaming
from tornjango.db.compiler import AnyQuerySet, Params, Row
from tornjango.db.engines.base import Result
from tornjango.db.engines.notices import Listener
from tornjango.db.prepared import Prepared
from tornjango.responses import running

P = ParamSpec("P")
T = TypeVar("T")


class Rows(list[Row]):
    """The rows of a raw query, as tuples; empty for a statement that returns none."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.rows)
        #: The names of the columns.
        self.columns = result.columns
        #: How many rows the statement returned, changed, or -1 where there is no such number.
        self.rowcount = result.rowcount


class Query:
    """A raw query. It is sent once: when it is first awaited, or when its first callback is added.

    ``await query`` gives its :class:`Rows`, as often as one likes, or raises its error (of ``django.db.utils``).
    Callbacks are called with the rows, errbacks with the error, each kind in the order they were added, in the context
    of the running request. What a callback raises fails the request's response. So does an error of the query when
    there is neither an errback nor anybody who awaits it.
    """

    def __init__(self, sql: str, params: Params, alias: str) -> None:
        self.sql = sql
        self.params = params
        self.alias = alias
        self._task: asyncio.Future[Rows] | None = None
        self._awaited = False
        self._callbacks: list[Callable[[Rows], object]] = []
        self._errbacks: list[Callable[[Exception], object]] = []

    def __repr__(self) -> str:
        return f"<Query on {self.alias!r}: {self.sql[:80]}>"

    def __await__(self) -> Generator[Any, None, Rows]:
        self._awaited = True
        if self._task is None and connection.transaction(self.alias) is not None:
            return self._here().__await__()
        return self._start().__await__()

    def __del__(self) -> None:
        if getattr(self, "_task", self) is None and not self._awaited:
            message = f"{self!r} was never sent: await it, or add a callback."
            warnings.warn(message, RuntimeWarning, stacklevel=2, source=self)

    def add_callback(self, callback: Callable[[Rows], object]) -> Self:
        """``callback(rows)`` when they are there; it may be ``async def``. Returns the query."""
        task = self._start()
        if not task.done():
            self._callbacks.append(callback)
        elif not task.cancelled() and not task.exception():
            _spawn(_call(callback, task.result()))
        return self

    def add_errback(self, errback: Callable[[Exception], object]) -> Self:
        """``errback(error)`` when the query has failed; it may be ``async def``. Returns the query."""
        task = self._start()
        if not task.done():
            self._errbacks.append(errback)
        elif not task.cancelled() and isinstance(error := task.exception(), Exception):
            _spawn(_call(errback, error))
        return self

    addCallback = add_callback
    addErrback = add_errback

    def _start(self) -> asyncio.Future[Rows]:
        if self._task is None:
            self._task = _spawn(self._run())
            self._task.add_done_callback(_look_at)
        return self._task

    async def _here(self) -> Rows:
        """In the task that owns the transaction."""
        self._task = asyncio.get_running_loop().create_future()
        try:
            rows = Rows(await fetching.execute(self.alias, self.sql, self.params))
        except BaseException as exc:
            if isinstance(exc, asyncio.CancelledError):
                self._task.cancel()
            else:
                self._task.set_exception(exc)
            _look_at(self._task)
            raise
        self._task.set_result(rows)
        return rows

    async def _run(self) -> Rows:
        try:
            result = await fetching.execute(self.alias, self.sql, self.params)
            rows = Rows(result)
            for callback in self._callbacks:
                await _call(callback, rows)
            return rows
        except Exception as exc:
            for errback in self._errbacks:
                await _call(errback, exc)
            if not self._errbacks and not self._awaited:
                _fail(exc)
            raise
        finally:
            del self  # the query holds its error, and that its traceback, which leads here


class Database:
    """The calls of this package for one database, or, without an alias, for those that Django's routers choose."""

    def __init__(self, alias: str | None = None) -> None:
        self.alias = alias

    @overload
    async def fetch(self, query: QuerySet[Any, T], *, using: str | None = None) -> list[T]: ...
    @overload
    async def fetch(self, query: RawQuerySet[Any], *, using: str | None = None) -> list[Any]: ...
    async def fetch(self, query: AnyQuerySet, *, using: str | None = None) -> list[Any]:
        """The list that iterating the queryset would give; the queryset itself is left as it was.

        Raises the errors of ``django.db.utils``, and ``Overloaded`` when no connection becomes free in time. When it
        is cancelled, so is the statement on the server.
        """
        _expect_queryset(query)
        return await fetching.fetch(query, using or self.alias or query.db)

    @overload
    def execute_async(
        self,
        query: QuerySet[Any, T],
        callback: Callable[[list[T]], object],
        on_error: Callable[[Exception], object] | None = None,
        *,
        using: str | None = None,
    ) -> asyncio.Task[None]: ...
    @overload
    def execute_async(
        self,
        query: RawQuerySet[Any],
        callback: Callable[[list[Any]], object],
        on_error: Callable[[Exception], object] | None = None,
        *,
        using: str | None = None,
    ) -> asyncio.Task[None]: ...
    def execute_async(
        self,
        query: AnyQuerySet,
        callback: Callable[[list[Any]], object],
        on_error: Callable[[Exception], object] | None = None,
        *,
        using: str | None = None,
    ) -> asyncio.Task[None]:
        """Returns at once; ``callback(rows)`` is called later, with the list that iterating the queryset would give.

        The callback, which may be ``async def``, runs in the context of the running request. An error of the query
        goes to ``on_error``, if there is one, else it fails the request's response; so does what a callback raises.
        Without a request, errors go to the event loop's exception handler. The query is cancelled with the task, and
        the task when the client leaves.
        """
        _expect_queryset(query)
        return _spawn(self._deliver(query, callback, on_error, using))

    def query(self, sql: str, params: Params = None, *, using: str | None = None) -> Query:
        """Raw SQL, with ``%s`` or ``%(name)s`` for ``params``; in autocommit. See :class:`Query`.

        A connection is held for the one statement: what a session keeps (SET, LISTEN, temporary tables) may be met by
        any other query, or none.
        """
        return Query(sql, params, using or self.alias or DEFAULT_DB_ALIAS)

    def prepare(self, function: Callable[P, QuerySet[Any, T]]) -> Prepared[P, T]:
        """``by_slug = db.prepare(lambda slug: Blog.objects.filter(slug=slug))``, for ``await by_slug(slug="x")``.

        The queryset is compiled once, on first use, for all values. See :class:`Prepared`. Raises TypeError for a
        function that is ``async def``, or takes ``*args`` or ``**kwargs``.
        """
        return Prepared(function, self.alias)

    @overload
    def stream(
        self, query: QuerySet[Any, T], *, chunk_size: int = 2000, using: str | None = None
    ) -> AsyncGenerator[T]: ...
    @overload
    def stream(
        self, query: RawQuerySet[Any], *, chunk_size: int = 2000, using: str | None = None
    ) -> AsyncGenerator[Any]: ...
    def stream(
        self, query: AnyQuerySet, *, chunk_size: int = 2000, using: str | None = None
    ) -> AsyncGenerator[Any]:
        """``async for item in db.stream(queryset)``: the queryset's objects, however many; ``chunk_size`` at one time.

        They are those of one moment. What ``prefetch_related`` says is prefetched for each chunk. From the first item
        on, a connection is held until the last one, in a transaction of its own, unless the task has one open: then it
        is that one. Leaving the loop early gives the connection back soon; to have it given back before the next
        line, iterate inside ``async with contextlib.aclosing(db.stream(...)) as items``. Cancelled, or after an error,
        it is at its end. Raises what `fetch` raises, and ValueError for a ``chunk_size`` below 1.
        """
        _expect_queryset(query)
        return streaming.stream(query, using or self.alias or query.db, chunk_size)

    def listen(self, *channels: str, using: str | None = None) -> Listener:
        """``async for notice in db.listen("channel")``: what NOTIFY sends on PostgreSQL's channels, from now on.

        Each `Notice` has its ``channel`` and ``payload``. A server that went away is waited for. What was sent
        meanwhile is lost, and so is what comes while a thousand wait for a slow reader: a notice whose ``payload`` is
        None then says, once, that some on its channel may have been missed. A reader that must know reads the state
        anew on it.

        The server listens once iterating has begun; ``async with db.listen(...) as notices`` returns when it does, so
        that nothing is missed of what happens after. Iterating ends when it is closed: by ``async with``,
        ``aclose()``, or when nobody has it any more. All who listen in a process share one connection to a database,
        outside of the pool. Raises OperationalError when the server cannot be reached to begin with, and
        NotSupportedError for a database that has no such thing.
        """
        return pools.get(using or self.alias or DEFAULT_DB_ALIAS).listen(*channels)

    async def _deliver(
        self,
        query: AnyQuerySet,
        callback: Callable[[list[Any]], object],
        on_error: Callable[[Exception], object] | None,
        using: str | None,
    ) -> None:
        try:
            rows = await self.fetch(query, using=using)
        except Exception as exc:  # noqa: BLE001 - goes to whoever handles it
            if on_error is None:
                _fail(exc)
            else:
                await _call(on_error, exc)
        else:
            await _call(callback, rows)


def using(alias: str) -> Database:
    """The same calls for one database: ``db.using("archive").query(...)``."""
    return Database(alias)


def _expect_queryset(query: object) -> None:
    if isinstance(query, (QuerySet, RawQuerySet)):
        return
    hint = " (its .all() is one)" if isinstance(query, Manager) else ""
    raise TypeError(f"Expected a QuerySet, not {type(query).__name__}{hint}: {query!r}")


def _spawn(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task in the context of the running request, which ends with it."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        work.close()
        raise RuntimeError(
            "Queries of tornjango.db run on the event loop; there is none in this thread. "
            "In a sync view, use the ORM as ever."
        ) from None
    response = running()
    if response is None:
        return loop.create_task(work)
    task = loop.create_task(work, context=response.context)
    green.adopt(task)
    response.track(task)
    return task


async def _call(callback: Callable[[T], object], value: T) -> None:
    try:
        result = callback(value)
        if asyncio.iscoroutine(result):
            await result
    except Exception as exc:  # noqa: BLE001 - a callback has no caller; the response has
        _fail(exc)


def _fail(exc: Exception) -> None:
    response = running()
    if response is not None:
        response.fail(exc)
        return
    message = "A query of tornjango.db failed, or its callback did, and nothing handles it"
    asyncio.get_running_loop().call_exception_handler({"message": message, "exception": exc})


def _look_at(task: asyncio.Future[Any]) -> None:
    """The error has gone where it belongs: asyncio need not report it once more."""
    if not task.cancelled():
        task.exception()
