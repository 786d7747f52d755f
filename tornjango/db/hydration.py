"""Making objects of rows again and again, for a statement that is kept. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from django.db.models import query as django_query
from django.db.models.query import ModelIterable, get_related_populators

from tornjango.db.compiler import Compiled, Row


def kept(compiled: Any) -> Compiled:
    """``compiled``, with what its objects have in common worked out once; as it is, where it has objects of no model."""
    queryset = compiled.queryset
    mode = getattr(queryset, "_fetch_mode", None)
    if queryset._iterable_class is not ModelIterable or queryset._known_related_objects:
        return compiled  # type: ignore[no-any-return]
    if mode is not None and mode.track_peers:
        # The objects of one run are told of each other.
        return compiled  # type: ignore[no-any-return]
    compiler = compiled.compiler
    columns = [column for column, *_ in compiler.select[: compiler.col_count]]
    if compiler.has_composite_fields(columns):
        return compiled  # type: ignore[no-any-return]
    return _Models(compiled, columns, mode)


class _Models(Compiled):
    """Does what Django's ModelIterable does for each row; what that does before the first, is done."""

    def __init__(self, compiled: Any, columns: list[Any], mode: Any) -> None:
        super().__init__(compiled.queryset, compiled.sql, compiled.params)
        compiler, alias = compiled.compiler, compiled.alias
        info = compiler.klass_info
        fields = info["select_fields"]
        self._alias = alias
        self._start, self._end = fields[0], fields[-1] + 1
        self._names = [
            column.target.attname for column, *_ in compiler.select[self._start : self._end]
        ]
        self._make = _maker(info["model"], mode)
        modes = () if mode is None else (mode,)
        populators = get_related_populators(info, compiler.select, alias, *modes)
        self._populate = [populator.populate for populator in populators]
        self._annotations = list(compiler.annotation_col_map.items())
        self._converters = compiler.get_converters(columns)
        self._convert = compiler.apply_converters

    def objects(self, rows: Iterable[Row], columns: Sequence[str]) -> Iterator[Any]:
        if self._converters:
            rows = self._convert(rows, self._converters)
        make, alias, names = self._make, self._alias, self._names
        part = slice(self._start, self._end)
        populators, annotations = self._populate, self._annotations
        for row in rows:
            made = make(alias, names, row[part])
            for populate in populators:
                populate(row, made)
            for name, at in annotations:
                setattr(made, name, row[at])
            yield made


def _maker(model: Any, mode: Any) -> Any:
    """``from_db`` as ModelIterable calls it, in the versions of Django that have fetch modes and those that have not."""
    if mode is None:
        return model.from_db
    get_from_db = getattr(django_query, "_get_from_db", None)
    return (
        partial(model.from_db, fetch_mode=mode) if get_from_db is None else get_from_db(model, mode)
    )
