from __future__ import annotations

from tests.comet_brokers import Server
from tests.postgres import Postgres
from tornjango.comet.brokers.postgres import PostgresBroker

DATABASE = "tornjango"


class PostgresServer(Server):
    """Database "own", on TCP."""

    def __init__(self, postgres: Postgres) -> None:
        super().__init__()
        self._postgres = postgres
        self.empty()

    def make(self) -> PostgresBroker:
        return PostgresBroker("own")

    def end_connections(self) -> None:
        self.sql(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity "
            f"where datname = '{DATABASE}' and pid <> pg_backend_pid()"
        )

    def stop(self) -> None:
        self._postgres.stop()

    def start(self) -> None:
        self._postgres.start()

    def freeze(self) -> None:
        self._postgres.freeze()

    def thaw(self) -> None:
        self._postgres.thaw()

    def lose(self, count: int) -> None:
        self.sql(
            f"update tornjango_comet_head set last = last - {count};"
            "delete from tornjango_comet_message where number > (select last from tornjango_comet_head)"
        )

    def empty(self) -> None:
        self.sql(
            "truncate tornjango_comet_head, tornjango_comet_message, tornjango_comet_floor, tornjango_comet_trim"
        )

    def forget(self) -> None:
        self.age(120)
        broker = PostgresBroker("own")
        broker.trim(0)
        broker.close()

    def age(self, seconds: float) -> None:
        """Makes it as if so much time had gone by since what is there was published."""
        self.sql(
            f"update tornjango_comet_message set published = published - interval '{seconds} s',"
            f" expires = expires - interval '{seconds} s';"
            f"update tornjango_comet_floor set at = at - interval '{seconds} s';"
            f"update tornjango_comet_trim set at = at - interval '{seconds} s'"
        )

    def sql(self, sql: str) -> str:
        return self._postgres.psql(sql, DATABASE)
