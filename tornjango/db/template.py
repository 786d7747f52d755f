"""A statement of Django's with places for values: compiled once, bound often. No I/O.

A queryset is built with placeholders for the arguments. Django takes them as expressions, and leaves them as they are.
`place` then turns each lookup that compares with a placeholder (each ``Value`` that holds one, and so on) into one that
compiles as it would with the argument's present value, and marks which parameters came of it. To bind other values,
those lookups alone are made anew, by Django's own conversions; each must compile to the same SQL as before, else the
values do not fit the template. What a placeholder meets that is none of this makes a template impossible: `Unfit`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NoReturn

from django.core.exceptions import EmptyResultSet, FullResultSet
from django.db import connections
from django.db.models import FilteredRelation, Prefetch, QuerySet
from django.db.models.expressions import (
    BaseExpression,
    Combinable,
    CombinedExpression,
    Expression,
    ExpressionList,
    Value,
)
from django.db.models.lookups import Lookup
from django.db.models.sql import Query
from django.db.models.sql.datastructures import BaseTable, Join
from django.db.models.sql.subqueries import UpdateQuery
from django.db.utils import DEFAULT_DB_ALIAS
from django.utils.tree import Node


class Unfit(Exception):
    """No template can be made of this, whatever the values; ``argument`` is the name of the one in its way, if known."""

    def __init__(self, reason: str, argument: str | None = None) -> None:
        super().__init__(reason)
        self.argument = argument


class Different(Exception):
    """With these values the SQL is another one."""


class Placeholder(Expression):
    """Stands for an argument. Django may handle it; code that looks at it otherwise is told so, and ``seen`` notes it."""

    def __init__(self, name: str, value: Any, seen: set[str]) -> None:
        super().__init__()
        self.name = name
        self.value = value
        self.seen = seen

    def look(self, how: str) -> NoReturn:
        self.seen.add(self.name)
        raise Unfit(f"{how} of the argument is asked for while the query is built", self.name)

    def resolve_expression(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def _unchanged(self, *args: Any) -> Any:
        return self

    copy: Any = _unchanged
    relabeled_clone: Any = _unchanged
    replace_expressions: Any = _unchanged
    __copy__: Any = _unchanged
    __deepcopy__: Any = _unchanged

    def get_group_by_cols(self) -> list[Any]:
        return []

    def as_sql(self, compiler: Any, connection: Any, **context: Any) -> NoReturn:
        raise Unfit("the argument stands where only its value can be compiled", self.name)

    def __getattribute__(self, name: str) -> Any:
        if _asked_by_django():
            return object.__getattribute__(self, name)
        if name == "__class__":
            # By isinstance().
            self.look("the type")
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        self.seen.add(self.name)
        raise AttributeError(name)

    def __bool__(self) -> bool:
        return _asked_by_django() or self.look("the truth")

    def __eq__(self, other: object) -> bool:
        if not _asked_by_django():
            self.look("the value")
        return type(other) is Placeholder and other.name == self.name

    def __hash__(self) -> int:
        if not _asked_by_django():
            self.look("the value")
        return hash(self.name)


def _looking(name: str) -> Callable[..., Any]:
    def method(self: Placeholder, *args: Any) -> Any:
        if args and isinstance(args[0], Combinable) and type(args[0]) is not Placeholder:
            # An F, say, which combines with anything.
            return NotImplemented
        return self.look(name)

    return method


LOOKS = (
    *("str", "repr", "format", "bytes", "int", "float", "complex", "index", "len", "getitem"),
    *("contains", "lt", "le", "gt", "ge", "abs", "neg", "pos", "invert", "round", "trunc", "floor"),
    *("ceil", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv"),
    *("rfloordiv", "mod", "rmod", "divmod", "rdivmod", "pow", "rpow", "matmul", "and", "rand"),
    *("or", "ror", "xor", "rxor", "lshift", "rlshift", "rshift", "rrshift", "fspath"),
)
for _look in LOOKS:
    setattr(Placeholder, f"__{_look}__", _looking(f"__{_look}__"))


def _asked_by_django() -> bool:
    frame: Any = sys._getframe(2)
    while frame.f_globals.get("__name__") == "abc":
        # isinstance() of a class of collections.abc.
        frame = frame.f_back
    name: str = frame.f_globals.get("__name__", "")
    return name.startswith(("django.", __package__))


class Marker:
    """In the place of a parameter: which of a fragment's it is."""

    def __init__(self, fragment: Fragment, index: int) -> None:
        self.fragment = fragment
        self.index = index

    def __repr__(self) -> str:
        raise Unfit("SQL is made of a parameter", self.fragment.slot.argument)


class Fragment:
    """A piece of SQL that came of a value; ``places`` tells where its parameters are in the statement's."""

    def __init__(self, slot: Slot, node: Any, compiler: Any, sql: str, count: int) -> None:
        self.slot = slot
        self.node = node
        self.compiler = compiler
        self.sql = sql
        self.count = count
        self.places: list[tuple[int, int]] = []

    def params(self, value: Any) -> Sequence[Any]:
        sql, params = self.compiler.compile(self.slot.make(self.node, value))
        if sql != self.sql or len(params) != self.count:
            raise Different
        return params  # type: ignore[no-any-return]


class Slot:
    """A node of the query that an argument's value is in."""

    def __init__(self, argument: str, base: Any, value: Any) -> None:
        self.argument = argument
        self.base = base
        #: The value that the template is made with.
        self.value = value
        self.node: Any = None
        self.fragments: list[Fragment] = []
        #: Whether the template is made, and has its fragments.
        self.sealed = False
        #: Whether the first value left nothing to compile: a number that is out of the column's range, say.
        self.elided = False

    def take(self, values: dict[str, Any]) -> Any:
        return values[self.argument]

    def make(self, node: Any, value: Any) -> Any:
        """What Django would have made of the value, where the node is."""
        raise NotImplementedError

    def compile(self, node: Any, compiler: Any) -> tuple[str, tuple[Any, ...]]:
        try:
            sql, params = compiler.compile(self.make(node, self.value))
        except (EmptyResultSet, FullResultSet):
            self.elided = True
            raise
        fragment = Fragment(self, node, compiler, sql, len(params))
        if not self.sealed:
            self.fragments.append(fragment)
        marked = enumerate(params)
        return sql, tuple(it if type(it) is Marker else Marker(fragment, at) for at, it in marked)


class LookupSlot(Slot):
    def compile(self, node: Any, compiler: Any) -> tuple[str, tuple[Any, ...]]:
        # A bilateral transform makes others of its class.
        if not self.sealed and not node.bilateral_transforms:
            node = _with_kept_lhs(node, compiler)
        return super().compile(node, compiler)

    def make(self, node: Any, value: Any) -> Any:
        lookup = self.base(node.lhs, value)
        rhs = lookup.rhs
        # What Query.build_lookup and build_filter make something else of.
        if rhs is None or (type(rhs) is list and None in rhs) or (rhs == "" and _empty_is_null()):
            raise Different
        return lookup


class ListSlot(LookupSlot):
    """Of a lookup that compares with several values, not all of them arguments: ``range=(1, x)``."""

    def __init__(self, items: list[Any], base: Any) -> None:
        self._items = [(it.name, None) if type(it) is Placeholder else (None, it) for it in items]
        first = next(it for it in items if type(it) is Placeholder)
        value = [it.value if type(it) is Placeholder else it for it in items]
        super().__init__(first.name, base, value)

    def take(self, values: dict[str, Any]) -> Any:
        return [values[name] if name else it for name, it in self._items]


class ValueSlot(Slot):
    def make(self, node: Any, value: Any) -> Any:
        made = object.__new__(self.base)
        made.__dict__.update(node.__dict__, value=value)
        return made


class AssignedSlot(Slot):
    """What an UPDATE sets a field to; ``base`` is the field."""

    def make(self, node: Any, value: Any) -> Any:
        return _Assigned(self.base, value)


class _Assigned(Expression):
    def __init__(self, field: Any, value: Any) -> None:
        super().__init__()
        self.to = field
        self.value = value

    def as_sql(self, compiler: Any, connection: Any, **context: Any) -> Any:
        """As SQLUpdateCompiler.as_sql compiles a value that is not an expression."""
        field, value = self.to, self.value
        if hasattr(value, "prepare_database_save"):
            if not field.remote_field:
                raise Different
            value = value.prepare_database_save(field)
        value = field.get_db_prep_save(value, connection=connection)
        if value is None or hasattr(value, "as_sql"):
            raise Different
        # The placeholder that the field asks for is around it.
        return "%s", (value,)


def _empty_is_null() -> bool:
    return bool(connections[DEFAULT_DB_ALIAS].features.interprets_empty_strings_as_nulls)


@cache
def _slotted(base: Any, vendor: str) -> type:
    def as_sql(self: Any, compiler: Any, connection: Any, **context: Any) -> Any:
        return self.slot.compile(self, compiler)

    @property  # type: ignore[misc]
    def identity(self: Any) -> Any:
        return (*base.identity.__get__(self), self.slot)

    methods: dict[str, Any] = {"as_sql": as_sql, f"as_{vendor}": as_sql}
    if issubclass(base, Lookup):
        methods["identity"] = identity
    return type(base.__name__, (base,), {**methods, "__module__": base.__module__})


def _with_kept_lhs(node: Any, compiler: Any) -> Any:
    """A copy whose left side, the same for all values, is compiled once: that is most of a lookup's work."""
    lhs = node.lhs.resolve_expression(compiler.query)
    base: Any = type(lhs)
    kept: Any = object.__new__(_kept(base, compiler.connection.vendor))
    kept.__dict__.update(lhs.__dict__, _kept={}, _original=lhs)
    copy = object.__new__(type(node))
    copy.__dict__.update(node.__dict__, lhs=kept)
    return copy


@cache
def _kept(base: Any, vendor: str) -> type:
    def as_sql(self: Any, compiler: Any, connection: Any, **context: Any) -> Any:
        if context or compiler is not self._kept.get("compiler"):
            found = _compile(self._original, compiler, connection, context)
            if context:
                return found
            self._kept.update(compiler=compiler, found=found)
        return self._kept["found"]

    def resolve_expression(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    methods: dict[str, Any] = {
        "as_sql": as_sql,
        f"as_{vendor}": as_sql,
        "resolve_expression": resolve_expression,
        "__module__": base.__module__,
    }
    return type(base.__name__, (base,), methods)


def _compile(node: Any, compiler: Any, connection: Any, context: dict[str, Any]) -> Any:
    as_sql = getattr(node, f"as_{connection.vendor}", node.as_sql)
    return as_sql(compiler, connection, **context)


class _Placing:
    def __init__(self, vendor: str) -> None:
        self.vendor = vendor
        self.slots: list[Slot] = []

    def visit(self, node: Any) -> None:
        if isinstance(node, UpdateQuery):
            self._update(node)
        elif isinstance(node, Lookup):
            self._lookup(node)
        elif isinstance(node, Value) and type(node.value) is Placeholder:
            self._value(node, node.value)
        elif isinstance(node, BaseExpression) and not isinstance(node, Query):
            self._sources(node)

    def _update(self, query: Any) -> None:
        query.values = [
            (field, model, self._set(field, value)) for field, model, value in query.values
        ]

    def _lookup(self, node: Any) -> None:
        rhs = node.rhs
        items = rhs.get_source_expressions() if type(rhs) is ExpressionList else rhs
        slot: Slot
        if type(rhs) is Placeholder:
            slot = LookupSlot(rhs.name, type(node), rhs.value)
        elif type(items) is list and any(type(it) is Placeholder for it in items):
            slot = ListSlot([it.value if type(it) is Value else it for it in items], type(node))
        else:
            return
        node.__dict__.update(slot.make(node, slot.value).__dict__)
        self._put(slot, node)

    def _sources(self, node: Any) -> None:
        sources = node.get_source_expressions()
        if any(type(it) is Placeholder for it in sources):
            combined = isinstance(node, CombinedExpression)
            node.set_source_expressions([self._operand(it, combined) for it in sources])

    def _value(self, node: Any, argument: Placeholder) -> None:
        for cached in ("output_field", "_output_field_or_none", "convert_value"):
            node.__dict__.pop(cached, None)
        node.value = argument.value
        self._put(ValueSlot(argument.name, type(node), argument.value), node)

    def _operand(self, operand: Any, combined: bool) -> Any:
        """As Django wraps what is no expression. A string names a column, save beside an operator."""
        if type(operand) is not Placeholder or (isinstance(operand.value, str) and not combined):
            return operand
        value = Value(operand)
        self._value(value, operand)
        return value

    def _set(self, field: Any, value: Any) -> Any:
        if type(value) is not Placeholder:
            return value
        node = _Assigned(field, value.value)
        self._put(AssignedSlot(value.name, field, value.value), node)
        return node

    def _put(self, slot: Slot, node: Any) -> None:
        base: Any = type(node)
        node.slot = slot
        node.__class__ = _slotted(base, self.vendor)
        slot.node = node
        self.slots.append(slot)


def place(query: Any, vendor: str) -> list[Slot]:
    """Makes slots of the query's nodes that have a placeholder; the query is to be compiled next.

    Raises Different where an argument's present value would have made it another query.
    """
    placing = _Placing(vendor)
    for node in list(_nodes(query)):
        placing.visit(node)
    return placing.slots


def has_placeholder(things: Iterable[Any]) -> bool:
    return any(type(it) is Placeholder for it in _reachable(list(things)))


_BRANCHES = (Query, QuerySet, Node, BaseExpression, FilteredRelation, BaseTable, Join, Prefetch)


def _nodes(root: Any) -> Iterator[Any]:
    return (it for it in _reachable(root) if not isinstance(it, (list, Placeholder)))


def _reachable(root: Any) -> Iterator[Any]:
    stack = [root]
    met: dict[int, Any] = {}
    while stack:
        it = stack.pop()
        if id(it) in met:
            continue
        met[id(it)] = it
        if type(it) is Placeholder:
            yield it
        elif isinstance(it, (list, tuple, set, frozenset)):
            stack.extend(it)
        elif isinstance(it, dict):
            stack.extend(it.values())
        elif isinstance(it, _BRANCHES):
            yield it
            # How an expression was made is not what it is now.
            stack.extend(value for name, value in vars(it).items() if name != "_constructor_args")


class Template:
    """``sql`` with the parameters that are always the same, and slots for the others."""

    def __init__(self, sql: str, params: Sequence[Any], slots: list[Slot], wrapper: Any) -> None:
        """Raises Unfit when something has become of a placeholder that is not known, Different when of its value."""
        if any(slot.elided for slot in slots):
            raise Different
        self.sql = sql
        self._params = list(params)
        self._raw: list[tuple[int, str]] = []
        self._fragments = [(slot.take, it) for slot in slots for it in slot.fragments]
        for slot in slots:
            slot.sealed = True
            for fragment in slot.fragments:
                # Django may have made it for the connection of the running task.
                fragment.compiler.connection = wrapper
        self._uncompiled = [slot for slot in slots if not slot.fragments]
        for at, param in enumerate(params):
            if type(param) is Marker:
                param.fragment.places.append((at, param.index))
            elif type(param) is Placeholder:
                self._raw.append((at, param.name))

    def bind(self, values: dict[str, Any]) -> tuple[Any, ...]:
        """The parameters for these values. Raises Different, or what Django raises for a bad value."""
        params = self._params.copy()
        for take, fragment in self._fragments:
            made = fragment.params(take(values))
            for at, index in fragment.places:
                params[at] = made[index]
        for slot in self._uncompiled:
            slot.make(slot.node, slot.take(values))
        for at, argument in self._raw:
            params[at] = values[argument]
        return tuple(params)


def same(params: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two statements have the same parameters. Those of a driver's own types may not know that they are equal."""
    return len(params) == len(others) and all(map(_same, params, others))


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if one is other or one == other:
        return True
    for value in ("adapted", "obj"):
        # What psycopg2, psycopg wrap as JSON.
        if hasattr(one, value):
            return bool(getattr(one, value) == getattr(other, value))
    return bool(getattr(one, "__dict__", None)) and vars(one) == vars(other)
