from __future__ import annotations

from typing import Any

from psycopg.conninfo import make_conninfo
from psycopg.pq.abc import PGconn

from tornjango.db.engines.psycopg_values import Values
from tornjango.db.engines.session import Session, with_addresses

# Of psycopg's `connect` rather than of libpq: what they make of a connection or a cursor of psycopg's, nobody sees here.
_OF_CONNECT = ("autocommit", "context", "cursor_factory", "prepare_threshold", "row_factory")


class PsycopgSession(Session):
    """For connections of libpq, with psycopg's adapters."""

    def conninfo(self) -> str:
        """What to connect by, host names looked up. Blocks."""
        params = self.wrapper.get_connection_params()
        wanted = {name: value for name, value in params.items() if name not in _OF_CONNECT}
        conninfo: str = make_conninfo(**with_addresses(wanted))
        return conninfo

    def values(self, pgconn: PGconn) -> Values:
        params: dict[str, Any] = self.wrapper.get_connection_params()
        return Values(
            pgconn,
            params["context"],
            server_side=self.wrapper.features.uses_server_side_binding,
            prepare_threshold=params["prepare_threshold"],
        )
