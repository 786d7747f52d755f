"""A backend as PostGIS's is: PostgreSQL's, with features and operations of its own."""

from __future__ import annotations

from typing import Any

from django.db.backends.postgresql import base, features, operations


class DatabaseFeatures(features.DatabaseFeatures):
    has_places = True


class DatabaseOperations(operations.DatabaseOperations):
    compiler_module = "django.db.models.sql.compiler"

    def quote_name(self, name: str) -> str:
        return super().quote_name(name.removeprefix("place_of_"))


class DatabaseWrapper(base.DatabaseWrapper):
    features_class = DatabaseFeatures
    ops_class = DatabaseOperations

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.places: list[str] = []

    def visit(self, place: str) -> int:
        self.places.append(place)
        with self.cursor() as cursor:
            cursor.execute("select length(%s)", [place])
            return int(cursor.fetchone()[0])
