from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeVar

from tornjango.conf import Config
from tornjango.db.engines.lease import Connection
from tornjango.db.engines.notices import Listener, NoticeConnection, Notices
from tornjango.db.engines.pooled import PooledEngine

C = TypeVar("C", bound=Connection)


class PostgresEngine(PooledEngine[C]):
    """A pool of connections to PostgreSQL, and beside it the one by which all listen."""

    def __init__(self, alias: str, config: Config) -> None:
        super().__init__(alias, config)
        self._notices = Notices(alias, self._connect_for_notices)

    def listen(self, *channels: str) -> Listener:
        return self._notices.listen(*channels)

    async def close(self) -> None:
        await self._notices.close()
        await super().close()

    def status(self) -> dict[str, Any]:
        return {**super().status(), "listening": self._notices.count}

    @abstractmethod
    async def _connect_for_notices(self) -> NoticeConnection:
        """One beside the pool. Raises errors of ``django.db.utils``."""
