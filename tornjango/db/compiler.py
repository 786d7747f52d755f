"""A QuerySet's two halves: the SQL it stands for, and the objects that its rows become. No I/O in either.

Both are Django's own work. Its iterables ask a compiler for rows; here they are handed the compiler that made the SQL,
which answers with rows that somebody else has fetched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from django.core.exceptions import EmptyResultSet
from django.db import connections
from django.db.models import QuerySet
from django.db.models.query import RawModelIterable, RawQuerySet
from django.db.models.sql import RawQuery

AnyQuerySet: TypeAlias = "QuerySet[Any, Any] | RawQuerySet[Any]"
Row: TypeAlias = tuple[Any, ...]
Params: TypeAlias = Sequence[Any] | Mapping[str, Any] | None


class Compiled(ABC):
    """``sql`` and ``params`` as Django would execute them; ``sql`` is None where no query is needed: no rows match."""

    #: Whether `objects` asks for the names of the columns.
    names_columns = False

    def __init__(self, queryset: Any, sql: str | None, params: Params) -> None:
        self.queryset = queryset
        self.sql = sql
        self.params = params

    @abstractmethod
    def objects(self, rows: Iterable[Row], columns: Sequence[str]) -> Iterator[Any]:
        """What iterating the queryset would give for these rows. ``columns`` matter to raw querysets only.

        May be called again, with the same rows or others.
        """

    def hydrate(self, rows: Iterable[Row], columns: Sequence[str] = ()) -> list[Any]:
        """All of :meth:`objects`."""
        return list(self.objects(rows, columns))


def compile(
    queryset: AnyQuerySet, using: str | None = None, connection: Any | None = None
) -> Compiled:
    """Compiles for the database ``using``, or for the one that the routers choose.

    ``connection`` is a wrapper of Django's for that database, if it is not to be the one of ``django.db.connections``.

    Opens no connection: what cannot be compiled without one (it asks for the server's version before a connection
    has told it, or quotes by the driver) raises ``SynchronousOnlyOperation`` on an event loop.
    """
    alias: str = using or queryset.db
    if isinstance(queryset, RawQuerySet):
        return _CompiledRaw(queryset, alias)
    return _CompiledQuery(queryset, alias, connection)


class _CompiledQuery(Compiled):
    def __init__(
        self, queryset: QuerySet[Any, Any], alias: str, connection: Any | None = None
    ) -> None:
        self.alias = alias
        wrapper = connection or connections[alias]
        query = _compilable(queryset.query)
        self.compiler: Any = wrapper.ops.compiler(query.compiler)(query, wrapper, alias)
        try:
            sql, params = self.compiler.as_sql()
        except EmptyResultSet:
            sql, params = None, ()
        super().__init__(queryset, sql or None, params)

    def objects(self, rows: Iterable[Row], columns: Sequence[str]) -> Iterator[Any]:
        if self.sql is None:
            return iter(())
        if self.compiler.has_extra_select:
            # Columns that only ORDER BY and DISTINCT needed.
            rows = [row[: self.compiler.col_count] for row in rows]
        # Another thread may make objects of other rows meanwhile.
        compiler = _copy(self.compiler, execute_sql=lambda *args, **kwargs: (rows,))
        query = _copy(self.queryset.query)
        query.get_compiler = lambda *args, **kwargs: compiler
        # The database is pinned: a router may choose another one when it is asked again.
        queryset = _copy(self.queryset, _db=self.alias, _query=query)
        return iter(queryset._iterable_class(queryset))


class _CompiledRaw(Compiled):
    names_columns = True

    def __init__(self, queryset: Any, alias: str) -> None:
        self.alias = alias
        super().__init__(queryset, queryset.query.sql, _adapted(queryset.query.params, alias))

    def objects(self, rows: Iterable[Row], columns: Sequence[str]) -> Iterator[Any]:
        query = _FetchedRawQuery(self.queryset.query, self.alias, rows, columns)
        queryset = _copy(self.queryset, _db=self.alias, query=query)
        # Another run of the same queryset may have had other columns.
        queryset.__dict__.pop("columns", None)
        return iter(RawModelIterable(queryset))


class _FetchedCursor(NamedTuple):
    rows: Iterable[Row]
    description: list[tuple[str]]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)

    def close(self) -> None:
        """Nothing is open."""


class _FetchedRawQuery(RawQuery):
    """A raw query that has been executed already."""

    def __init__(
        self, query: RawQuery, using: str, rows: Iterable[Row], columns: Sequence[str]
    ) -> None:
        super().__init__(query.sql, using, query.params)
        self._fetched = _FetchedCursor(rows, [(column,) for column in columns])

    def _execute_query(self) -> None:
        self.cursor: Any = self._fetched


def unevaluated(queryset: AnyQuerySet, using: str) -> Any:
    """A copy for the database ``using`` that will query when it is iterated, whatever ``queryset`` has seen."""
    copy = _copy(queryset, _db=using, _result_cache=None, _prefetch_done=False)
    if isinstance(queryset, RawQuerySet):
        # Not RawQuerySet.using(), which forgets prefetch_related().
        copy.query = queryset.query.chain(using)
        copy.__dict__.pop("columns", None)
    return copy


def _adapted(params: Any, alias: str) -> Params:
    """Parameters of a raw query as Django hands them to the driver."""
    adapt = connections[alias].ops.adapt_unknown_value
    if params is None:
        return None
    if isinstance(params, Mapping):
        return {key: adapt(value) for key, value in params.items()}
    return tuple(adapt(value) for value in params)


def _compilable(query: Any) -> Any:
    """Compiling a union adds to it the columns that it is ordered by, which are not to be seen in its values."""
    if not query.combinator:
        return query
    clone = query.clone()
    if clone.selected:
        # A clone shares it.
        clone.selected = dict(clone.selected)
    return clone


def _copy(original: Any, **changes: Any) -> Any:
    """A shallow copy; neither a QuerySet's nor a Query's own way of copying, which do much more."""
    copy = object.__new__(type(original))
    copy.__dict__.update(original.__dict__)
    copy.__dict__.update(changes)
    return copy
