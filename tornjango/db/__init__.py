"""Queries that wait on the event loop: ``fetch`` and ``execute_async`` for QuerySets, ``query`` for raw SQL."""

from tornjango.db.atomic import atomic
from tornjango.db.engines.notices import Notice
from tornjango.db.prepared import Prepared
from tornjango.db.query import Database, Query, Rows, using

__all__ = [
    "Database",
    "Notice",
    "Prepared",
    "Query",
    "Rows",
    "atomic",
    "execute_async",
    "fetch",
    "listen",
    "prepare",
    "query",
    "stream",
    "using",
]

_routed = Database()
execute_async = _routed.execute_async
fetch = _routed.fetch
listen = _routed.listen
prepare = _routed.prepare
query = _routed.query
stream = _routed.stream
