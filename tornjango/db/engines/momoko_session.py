from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.conf import settings
from psycopg2 import extensions, extras

from tornjango.db.engines.session import Session, with_addresses


class MomokoSession(Session):
    """For connections of psycopg2."""

    def parameters(self) -> dict[str, Any]:
        """For ``psycopg2.connect``, host names looked up. Blocks."""
        params = self.wrapper.get_connection_params()
        params["cursor_factory"] = self._cursor_class(params["cursor_factory"])
        return with_addresses(params)

    def adopt(self, raw: Any) -> None:
        """What needs no statement. Raises Django's NotSupportedError for a server that is too old for it."""
        # JSON is decoded by the field, once.
        extras.register_default_jsonb(conn_or_curs=raw, loads=_unchanged)
        self.check_server(raw.server_version)

    def register_types(self, raw: Any, types: Iterable[tuple[str, int, int]]) -> None:
        for name, oid, array_oid in types:
            if name == "hstore":
                extras.register_hstore(raw, oid=(oid,), array_oid=(array_oid,))
            else:
                array = extensions.new_array_type((array_oid,), "citext[]", extensions.UNICODE)
                extensions.register_type(array, raw)

    def _cursor_class(self, base: Any) -> Any:
        tzinfo_factory = self.wrapper.tzinfo_factory if settings.USE_TZ else None

        class Cursor(base):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.tzinfo_factory = tzinfo_factory

        return Cursor


def _unchanged(value: str) -> str:
    return value
