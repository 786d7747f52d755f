"""Querysets that are compiled once and run often.

What is kept is kept for a shape: the operation, the types of the arguments, the active time zone. For a shape and a
database there is a `Template`, checked when it is made: with the values at hand it gives what Django gives. Whatever
has no template, or does not fit it, runs as Django runs it: slower, and the same by construction.
"""

from __future__ import annotations

import datetime as dt
import decimal
import inspect
import ipaddress
import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar
from weakref import WeakKeyDictionary, WeakSet
from zoneinfo import ZoneInfo

from django.core.exceptions import SynchronousOnlyOperation
from django.core.signals import setting_changed
from django.db import connections, router, transaction
from django.db.models import Model, QuerySet
from django.db.models.deletion import Collector
from django.db.models.query import RawQuerySet
from django.utils import timezone

from tornjango import green
from tornjango.db import connection, fetching, pools
from tornjango.db.compiler import Compiled, Params, compile
from tornjango.db.engines.base import Engine, Result
from tornjango.db.hydration import kept
from tornjango.db.template import (
    Different,
    Placeholder,
    Template,
    Unfit,
    has_placeholder,
    place,
    same,
)

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger("tornjango.db")

#: Shapes that a prepared queryset keeps; past it, the oldest goes.
KEPT = 256

#: How often the values at hand may happen not to show a template's shape (two of them are equal, say).
TRIES = 3


class Statement(NamedTuple):
    sql: str | None
    params: Params


class _Captured(BaseException):
    """Not an error: what Django's own method was about to run."""

    def __init__(self, *found: Any) -> None:
        self.found = found


class Operation:
    """What is asked of a queryset, by a method of Django's of the same name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.writes = name in ("update", "delete")

    def run(self, queryset: Any, options: dict[str, Any]) -> Any:
        """As Django does it."""
        return getattr(queryset, self.name)(**options)

    def check(self, queryset: Any) -> None:
        if getattr(type(queryset), self.name) is not getattr(QuerySet, self.name):
            raise Unfit(f"{type(queryset).__name__} has a {self.name}() of its own")

    def statement(self, queryset: Any, options: dict[str, Any], target: Target) -> Source:
        """What Django's method would run, uncompiled."""
        raise NotImplementedError

    async def result(self, ready: Ready, result: Result) -> Any:
        """What Django's method would return."""
        raise NotImplementedError


class Target(NamedTuple):
    alias: str
    #: For compiling: no task's own, and never connected.
    wrapper: Any


class Source(NamedTuple):
    query: Any
    queryset: Any
    compile: Callable[[], Any]


class _Reading(Operation):
    """Operations that make objects."""

    def check(self, queryset: Any) -> None:
        super().check(queryset)
        if type(queryset)._fetch_all is not QuerySet._fetch_all:
            raise Unfit(f"{type(queryset).__name__} has a _fetch_all() of its own")

    def statement(self, queryset: Any, options: dict[str, Any], target: Target) -> Source:
        derived = _iterated(queryset, lambda it: self.run(it, options))
        if derived._known_related_objects or derived._hints:
            raise Unfit("the queryset is a related manager's, and refers to its object")
        if has_placeholder([derived._prefetch_related_lookups]):
            raise Unfit("an argument is in a Prefetch")
        return Source(
            derived.query, derived, lambda: compile(derived, target.alias, target.wrapper)
        )

    async def result(self, ready: Ready, result: Result) -> Any:
        assert ready.compiled is not None
        objects = await fetching.hydrate(ready.compiled, result)
        lookups = ready.queryset._prefetch_related_lookups
        if lookups and objects:
            await fetching.prefetch(objects, lookups)
        return self.pick(ready.queryset, objects)

    def pick(self, queryset: Any, objects: list[Any]) -> Any:
        return objects


class _List(_Reading):
    def __init__(self) -> None:
        super().__init__("__iter__")

    def run(self, queryset: Any, options: dict[str, Any]) -> Any:
        return list(queryset)


class _Get(_Reading):
    def pick(self, queryset: Any, objects: list[Any]) -> Any:
        if len(objects) == 1:
            return objects[0]
        # Django's own error, by Django's own words.
        fetched = _shallow(queryset, _iterable_class=lambda *args, **options: objects)
        fetched._prefetch_related_lookups = ()
        return QuerySet.get(fetched)


class _First(_Reading):
    def pick(self, queryset: Any, objects: list[Any]) -> Any:
        return objects[0] if objects else None


class _Counting(Operation):
    """Operations of which one number, or none, comes back."""

    def statement(self, queryset: Any, options: dict[str, Any], target: Target) -> Source:
        pinned = _shallow(queryset, _db=target.alias)
        return _source(target, lambda: self.run(pinned, options))

    async def result(self, ready: Ready, result: Result) -> Any:
        if self.name == "exists":
            return bool(result.rows)
        return result.rows[0][0] if self.name == "count" else result.rowcount


class _Update(_Counting):
    def statement(self, queryset: Any, options: dict[str, Any], target: Target) -> Source:
        source = super().statement(queryset, options, target)
        if source.query.related_updates:
            raise Unfit("the update is of two tables")
        return source


class _Delete(_Counting):
    def statement(self, queryset: Any, options: dict[str, Any], target: Target) -> Source:
        query = queryset.query
        if query.combinator or query.is_sliced or query.distinct_fields or queryset._fields:
            raise Unfit("Django does not delete this")
        copy = queryset._chain()
        copy._for_write = True
        copy.query.select_for_update = copy.query.select_related = False
        copy.query.clear_ordering(force=True)
        if not self.is_alone(copy, target.alias):
            raise Unfit(f"deleting {queryset.model.__name__} takes more than one statement")
        return _source(target, lambda: copy._raw_delete(target.alias), copy)

    @staticmethod
    def is_alone(queryset: Any, alias: str) -> bool:
        """Whether one statement does it: no cascade, nobody who listens to signals."""
        return Collector(using=alias, origin=queryset).can_fast_delete(queryset)

    async def result(self, ready: Ready, result: Result) -> Any:
        count = result.rowcount
        return count, {ready.queryset.model._meta.label: count} if count else {}


LIST, GET, FIRST = _List(), _Get("get"), _First("first")
COUNT, EXISTS = _Counting("count"), _Counting("exists")
UPDATE, DELETE = _Update("update"), _Delete("delete")


class Ready(NamedTuple):
    """A shape's statement on one database."""

    engine: Engine
    template: Template
    queryset: Any
    compiled: Compiled | None


class Shape:
    """How the databases are chosen, and what is ready for each."""

    def __init__(self, queryset: Any) -> None:
        self.alias: str | None = queryset._db
        self.model = queryset.model
        self.route = router.db_for_write if queryset._for_write else router.db_for_read
        self.ready: dict[str, Ready] = {}

    def using(self) -> str:
        return self.alias or self.route(self.model)


class Prepared(Generic[P, T]):
    """A queryset that is compiled once for all values of its arguments, on first use. ``db.prepare`` makes it.

    ``await blogs(slug="x")`` is the list that the queryset would give; ``get``, ``first``, ``count``, ``exists``,
    ``update`` and ``delete`` are Django's. Each takes the function's arguments. What they return and what they raise
    is what the queryset's own method would return and raise, for any values.

    The function is called when a shape of arguments is new (their types, how many are in a list, the time zone), with
    stand-ins for the values, and not again: it must not read what changes, such as the time, the language or a request.
    An argument that it looks at, to branch or to compute, has a compiled query for each of its values.
    """

    def __init__(self, function: Callable[P, QuerySet[Any, T]], alias: str | None = None) -> None:
        self._function = function
        self._alias = alias
        self._signature = _signature(function)
        self._names = tuple(self._signature.parameters)
        #: Arguments whose values are parts of the shape.
        self._seen: set[str] = set()
        self._shapes: dict[Any, Shape] = {}
        self._unfit: set[Operation] = set()
        self._misses = 0
        self._told = False
        _all.add(self)

    def __repr__(self) -> str:
        function: Any = self._function
        return f"<prepared queryset {function.__module__}.{function.__qualname__}, line {function.__code__.co_firstlineno}>"

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> list[T]:
        result: list[T] = await self._run(LIST, self._values(args, kwargs))
        return result

    async def get(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Raises the model's DoesNotExist or MultipleObjectsReturned, as Django's."""
        result: T = await self._run(GET, self._values(args, kwargs))
        return result

    async def first(self, *args: P.args, **kwargs: P.kwargs) -> T | None:
        result: T | None = await self._run(FIRST, self._values(args, kwargs))
        return result

    async def count(self, *args: P.args, **kwargs: P.kwargs) -> int:
        result: int = await self._run(COUNT, self._values(args, kwargs))
        return result

    async def exists(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        result: bool = await self._run(EXISTS, self._values(args, kwargs))
        return result

    async def delete(self, *args: P.args, **kwargs: P.kwargs) -> tuple[int, dict[str, int]]:
        result: tuple[int, dict[str, int]] = await self._run(DELETE, self._values(args, kwargs))
        return result

    async def update(self, *args: Any, **kwargs: Any) -> int:
        """The function's arguments, and the fields' new values by name: ``blog.update(1, name="x")``.

        The function's arguments may be given by name, too. A name that is both is the function's argument, unless that
        is given by its position.
        """
        mine = {name: kwargs.pop(name) for name in self._names[len(args) :] if name in kwargs}
        result: int = await self._run(UPDATE, self._values(args, mine), kwargs)
        return result

    def clear(self) -> None:
        """Forgets what was compiled; for after lookups or fields were registered."""
        self._shapes.clear()
        self._unfit.clear()
        self._seen.clear()
        self._misses = 0

    async def _run(
        self, operation: Operation, values: dict[str, Any], options: dict[str, Any] | None = None
    ) -> Any:
        key = self._key(operation, values, options)
        if key is None:
            return await self._plain(operation, values, options)
        shape = self._shapes.get(key)
        if shape is None or (ready := shape.ready.get(alias := shape.using())) is None:
            made = await fetching.here_or_green(self._make, key, operation, values, options)
            if made is None:
                return await self._plain(operation, values, options)
            alias, ready = made
        if ready.engine is not pools.get(alias):
            self._shapes.pop(key, None)
            return await self._run(operation, values, options)
        if operation is DELETE and not _Delete.is_alone(ready.queryset, alias):
            return await self._plain(operation, values, options)
        try:
            params = ready.template.bind(_merged(values, options) if options else values)
        except Exception:  # noqa: BLE001 - Django itself is asked next, and raises what there is to raise
            return await self._plain(operation, values, options)
        result = await self._execute(operation, alias, ready.template.sql, params)
        return await operation.result(ready, result)

    async def _execute(self, operation: Operation, alias: str, sql: str, params: Params) -> Result:
        if not operation.writes:
            return await fetching.execute(alias, sql, params)
        with transaction.mark_for_rollback_on_error(using=alias):
            return await fetching.execute(alias, sql, params)

    async def _plain(
        self, operation: Operation, values: dict[str, Any], options: dict[str, Any] | None
    ) -> Any:
        if operation is LIST:
            queryset = await fetching.here_or_green(self._queryset, values)
            return await fetching.fetch(queryset, queryset.db)
        return await green.run(lambda: operation.run(self._queryset(values), options or {}))

    # Arguments

    def _values(self, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """By name, in the function's order."""
        if not args and len(kwargs) == len(self._names):
            try:
                return {name: kwargs[name] for name in self._names}
            except KeyError:
                pass
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def _key(
        self, operation: Operation, values: dict[str, Any], options: dict[str, Any] | None
    ) -> Any:
        """What the SQL depends on; None where that is more than can be told."""
        if operation in self._unfit:
            return None
        key: list[Any] = [operation, _zone()]
        if options is not None:
            key.append(tuple(options))
            values = _merged(values, options)
        for name, value in values.items():
            cls: Any = type(value)
            kind = _kind(cls)
            if kind is None:
                return None
            if name in self._seen:
                if type(value) not in KEYS:
                    return None
                key.append((type(value), value))
            elif kind is list:
                if not all(map(_is_scalar, value)):
                    return None
                key.append((type(value), len(value)))
            else:
                key.append(type(value) if kind is object else value)
        return tuple(key)

    def _queryset(self, values: dict[str, Any]) -> Any:
        bound = inspect.BoundArguments(self._signature, values)
        queryset: Any = self._function(*bound.args, **bound.kwargs)
        if not isinstance(queryset, (QuerySet, RawQuerySet)):
            raise TypeError(f"{self!r}: its function has to return a QuerySet, not {queryset!r}.")
        return queryset.using(self._alias) if self._alias else queryset

    # Making templates

    def _make(
        self,
        key: Any,
        operation: Operation,
        values: dict[str, Any],
        options: dict[str, Any] | None,
    ) -> tuple[str, Ready] | None:
        """None where the values at hand, or any, have none; Django then says why, or does the same at greater length."""
        options = options or {}
        try:
            shape, alias, ready = self._made(operation, values, options)
        except Different:
            return None
        except Unfit as exc:
            self._learn(operation, exc, list(_merged(values, options)))
            return None
        if len(self._shapes) >= KEPT:
            self._shapes.pop(next(iter(self._shapes)), None)
        self._shapes.setdefault(key, shape).ready[alias] = ready
        return alias, ready

    def _made(
        self, operation: Operation, values: dict[str, Any], options: dict[str, Any]
    ) -> tuple[Shape, str, Ready]:
        try:
            queryset = self._queryset(values)
            _expect(operation, queryset)
            queryset = _shallow(queryset, _for_write=queryset._for_write or operation.writes)
            target = _target(queryset.db)
            source = operation.statement(queryset, options, target)
            plain = source.compile()
        except (Unfit, SynchronousOnlyOperation):
            raise
        except Exception as exc:  # Django raises it again, where it belongs
            raise Different from exc
        if not plain.sql:
            raise Different
        seen: set[str] = set()
        stands = {name: self._stand_in(name, it, seen) for name, it in values.items()}
        sets = {name: self._stand_in(f"={name}", it, seen) for name, it in options.items()}
        merged = _merged(values, options)
        ready = self._checked(operation, stands, sets, seen, target, plain, merged)
        return Shape(queryset), target.alias, ready

    def _stand_in(self, name: str, value: Any, seen: set[str]) -> Any:
        if name in self._seen or value is None or type(value) is bool:
            return value
        return Placeholder(name, value, seen)

    def _checked(
        self,
        operation: Operation,
        stands: dict[str, Any],
        sets: dict[str, Any],
        seen: set[str],
        target: Target,
        plain: Any,
        values: dict[str, Any],
    ) -> Ready:
        try:
            queryset = self._queryset(stands)
            if has_placeholder([queryset._db]):
                seen.add(queryset._db.name)
            source = operation.statement(queryset, sets, target)
            slots = place(source.query, target.wrapper.vendor)
            compiled = source.compile()
            template = Template(compiled.sql or "", compiled.params, slots, target.wrapper)
            params = template.bind(values)
        except (Unfit, Different, SynchronousOnlyOperation):
            if not seen:
                raise
            params = ()
        except Exception as exc:  # a stand-in was where it cannot be
            raise Unfit(f"{type(exc).__name__}: {exc}", next(iter(seen), None)) from exc
        if seen:
            name = min(seen)
            raise Unfit(f"the function looks at its argument {name!r}", name)
        if template.sql != plain.sql or not same(params, plain.params):
            self._misses += 1
            if self._misses < TRIES:
                raise Different
            raise Unfit("the SQL depends on the values in a way that is not known")
        compiled = kept(compiled) if isinstance(compiled, Compiled) else None
        return Ready(pools.get(target.alias), template, source.queryset, compiled)

    def _learn(self, operation: Operation, exc: Unfit, names: list[str]) -> None:
        before = len(self._seen)
        self._seen.update(names if exc.argument is None else [exc.argument])
        if len(self._seen) == before:
            self._unfit.add(operation)
            how = f"{operation.name} runs unprepared"
        else:
            how = f"it is compiled once for each value of {', '.join(sorted(self._seen))}"
        if not self._told:
            self._told = True
            logger.warning(
                "%r: %s; so %s. To have it compiled once for all, use each argument in the queryset as it is, and "
                "as the value of a lookup, a Value() or an update.",
                self,
                exc,
                how,
            )


_all: WeakSet[Prepared[Any, Any]] = WeakSet()

#: Types whose equal values are the same to any code.
KEYS = (int, str, bytes, bool, type(None))

SCALARS = (
    str,
    int,
    float,
    decimal.Decimal,
    bytes,
    dt.date,
    dt.time,
    dt.timedelta,
    uuid.UUID,
    ipaddress.IPv4Address,
    ipaddress.IPv6Address,
    Model,
)


@cache
def _kind(cls: Any) -> type | None:
    """What a template does with values of a type: None, nothing."""
    if cls in (type(None), bool):
        return type(None)
    if cls in (list, tuple):
        return list
    if issubclass(cls, SCALARS) and not hasattr(cls, "resolve_expression"):
        return object
    return None


def _is_scalar(value: object) -> bool:
    cls: Any = type(value)
    return cls is bool or _kind(cls) is object


def _zone() -> Any:
    zone: Any = timezone.get_current_timezone()
    return zone if type(zone) is ZoneInfo else timezone.get_current_timezone_name()


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    if inspect.iscoroutinefunction(function):
        raise TypeError("db.prepare() takes a function that returns a QuerySet, not an async one.")
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(
                "db.prepare() takes a function whose arguments have names, without * or **."
            )
    return signature


def _expect(operation: Operation, queryset: Any) -> None:
    if not isinstance(queryset, QuerySet) or queryset._result_cache is not None:
        raise Unfit("it is not an unevaluated QuerySet")
    operation.check(queryset)


def _merged(values: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The function's arguments, and what an update sets, which may be of the same name."""
    return values | {f"={name}": value for name, value in options.items()}


def _target(alias: str) -> Target:
    engine = pools.get(alias)
    wrapper = _wrappers.get(engine)
    if wrapper is None:
        wrapper = connection.make(engine) if green.is_served() else engine.wrapper
        _wrappers[engine] = wrapper
    return Target(alias, wrapper)


_wrappers: WeakKeyDictionary[Engine, Any] = WeakKeyDictionary()


def _iterated(queryset: Any, run: Callable[[Any], Any]) -> Any:
    """The queryset that Django's method would iterate over."""

    def capture(queryset: Any, **options: Any) -> Any:
        raise _Captured(queryset)

    try:
        run(_shallow(queryset, _iterable_class=capture))
    except _Captured as captured:
        [derived] = captured.found
        derived._iterable_class = queryset._iterable_class
        return derived
    raise Unfit("Django asks for no rows")


def _source(target: Target, run: Callable[[], Any], queryset: Any = None) -> Source:
    """The query that Django's method would have compiled and executed."""
    try:
        with _uncompiled(target.alias):
            run()
    except _Captured as captured:
        query, elide_empty = captured.found
    else:
        raise Unfit("Django asks for no query")
    compiler: Any = target.wrapper.ops.compiler(query.compiler)
    made = compiler(query, target.wrapper, target.alias, elide_empty)
    return Source(query, queryset, lambda: Statement(*made.as_sql()))


@contextmanager
def _uncompiled(alias: str) -> Iterator[None]:
    """Raises _Captured instead of making a compiler. No other task has its turn meanwhile."""

    def capture(query: Any, connection: Any, using: Any, elide_empty: bool = True) -> Any:
        raise _Captured(query, elide_empty)

    operations: Any = connections[alias].ops
    operations.compiler = lambda name: capture
    try:
        yield
    finally:
        del operations.compiler


def _shallow(queryset: Any, **changes: Any) -> Any:
    copy = object.__new__(type(queryset))
    copy.__dict__.update(queryset.__dict__)
    copy.__dict__.update(changes)
    return copy


def _forget(**kwargs: Any) -> None:
    for prepared in list(_all):
        prepared.clear()


setting_changed.connect(_forget, dispatch_uid="tornjango.db.prepared")
