"""Queries that wait on the event loop: ``fetch`` and ``execute_async`` for QuerySets, ``query`` for raw SQL."""

from tornjango.db.atomic import atomic
from tornjango.db.query import Database, Query, Rows, using

__all__ = ["Database", "Query", "Rows", "atomic", "execute_async", "fetch", "query", "using"]

_routed = Database()
execute_async = _routed.execute_async
fetch = _routed.fetch
query = _routed.query
