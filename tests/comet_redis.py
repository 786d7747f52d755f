from __future__ import annotations

from tests.comet_brokers import Server
from tests.redis_server import Redis
from tornjango.comet.brokers.redis import RedisBroker

PREFIX = "tests"
HEAD, TAIL, LASTS = (f"{{{PREFIX}}}:{name}" for name in ("head", "tail", "lasts"))


class RedisServer(Server):
    def __init__(self, redis: Redis) -> None:
        super().__init__()
        self._redis = redis
        self.empty()

    def make(self) -> RedisBroker:
        return RedisBroker(self._redis.url, PREFIX)

    def end_connections(self) -> None:
        self._redis.client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    def stop(self) -> None:
        self._redis.stop()

    def start(self) -> None:
        self._redis.start()

    def freeze(self) -> None:
        self._redis.freeze()

    def thaw(self) -> None:
        self._redis.thaw()

    def lose(self, count: int) -> None:
        """Of one channel, which has all of them."""
        client = self._redis.client
        for id, fields in client.xrevrange(TAIL, count=count):
            channel = fields[b"channel"].decode()
            number = int(id.partition(b"-")[2])
            log = f"{{{PREFIX}}}:log:{channel}"
            [(_, kept)] = client.xrange(log, f"{number}-0", f"{number}-0")
            client.xdel(TAIL, id)
            client.xdel(log, f"{number}-0")
            client.zadd(LASTS, {channel: int(kept[b"after"])})
            client.hset(HEAD, mapping={"last": number - 1, "mark": fields[b"previous"]})

    def empty(self) -> None:
        self._redis.client.flushall()

    def forget(self) -> None:
        """It always does so at once."""
