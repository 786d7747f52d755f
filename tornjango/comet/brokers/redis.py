"""A broker on Redis, from 6.2 on, or Valkey: streams, written by one script, so that all of a batch is there or nothing.

These keys have one hash tag, so that a cluster keeps them together:

- ``{prefix}:head``, a hash: the epoch, the ``last`` number, and what else there is one of.
- ``{prefix}:tail``, a stream: the newest messages of all channels, which every process follows. An entry's id is
  ``<epoch>-<number>``. It is bounded by TAIL and TAIL_BYTES: who was away for longer asks channel by channel.
- ``{prefix}:log:<channel>``, a stream: the channel's messages within its limits; it expires with the last of them. Each
  entry has the number of the one before it, ``after``, so that what is trimmed or evicted leaves a hole to be seen.
- ``{prefix}:lasts``, a sorted set: each channel's last number, also when its log has expired, for a day. What is dropped
  from here is below the head's ``floor``. A member "" tells that the set was not evicted and begun again.
- ``{prefix}:batch:<hex>``: where a batch has been stored, for BATCH_MEMORY.

An epoch is the microsecond in which it began, by Redis' clock, and later than any that is known: so positions have an
order, whatever becomes of the data, and whoever knows a later one than Redis does knows that Redis has lost something.
A replica that was behind may have been given other messages under the numbers that it did not know of. So each message
has a mark that no other has, and knows the one before: nobody goes on after a message that is not the one they had.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import redis
from redis.backoff import NoBackoff
from redis.connection import UnixDomainSocketConnection, parse_url
from redis.retry import Retry

from tornjango.comet.brokers.base import Broker, Draft, Sink
from tornjango.comet.log import EPOCH_BYTES, Audience, Backlog, Channel, Message, Position
from tornjango.exceptions import BrokerUnavailable, ConfigurationError

# What the tail keeps: seconds of heavy traffic, for processes that follow it and were away for a moment.
TAIL = 10_000
TAIL_BYTES = 64 * 1024 * 1024

# Messages in one look at the tail.
LOOK = 500

# Seconds for which a batch is known again.
BATCH_MEMORY = 120

# Seconds that the tail waits for a message before it looks whether it is to stop, and whether the log still is the same.
WAIT = 0.25

DAY = 24 * 3600

# Seconds for which a channel's log is kept longer than need be: another process may have just been told of a longer TTL.
MARGIN = 60

_COMMON = """
local head, tail, lasts = KEYS[1], KEYS[2], KEYS[3]
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]

-- Lua itself would write large numbers as 1.7e+15.
local function text(number) return string.format('%.0f', number) end
local function id(epoch, offset) return text(epoch) .. '-' .. text(offset) end

local function renew(epoch)
  epoch = math.max(now, epoch + 1)
  -- First of all what Redis refuses when its memory is full: a script that has written something is let go on.
  redis.call('HSET', head, 'epoch', text(epoch), 'last', 0, 'bytes', 0, 'mark', '',
    'floor', 0, 'floor1', 0, 'floor2', 0, 'noted', text(now))
  redis.call('DEL', tail, lasts)
  redis.call('ZADD', lasts, 0, '')
  return epoch, 0
end

-- The log's end; of a new epoch, if there is no log, or none that reaches up to what is known.
local function present(epoch, offset)
  -- A year ahead: no epoch of Redis', but another broker's, which is random.
  if epoch > now + 31536000 * 1000000 then epoch, offset = 0, 0 end
  local here = redis.call('HMGET', head, 'epoch', 'last')
  if not here[1] then return renew(epoch) end
  local begun, last = tonumber(here[1]), tonumber(here[2])
  if epoch > begun or (epoch == begun and offset > last) then return renew(epoch) end
  return begun, last
end
"""

# epoch, offset: the newest that the caller knows; fork: "1" if another message stands there now.
_PRESENT = (
    _COMMON
    + """
local epoch, offset = tonumber(ARGV[1]), tonumber(ARGV[2])
local begun, last = present(epoch, offset)
if ARGV[3] == '1' and begun == epoch then begun, last = renew(epoch) end
return id(begun, last)
"""
)

# after, most: an entry's id, and how many after it. Not a transaction: that would be refused when the memory is full.
_LOOK = """
-- Changes nothing, but a replica refuses it, as it should: it may be behind.
redis.call('PERSIST', KEYS[1])
return {
  redis.call('HMGET', KEYS[1], 'epoch', 'last', 'mark'),
  redis.call('XRANGE', KEYS[2], '(' .. ARGV[1], '+', 'COUNT', ARGV[2]),
  redis.call('TIME'),
}
"""

# channel, most
_BACKLOG = """
return {
  redis.call('HMGET', KEYS[1], 'epoch', 'last', 'floor'),
  redis.call('ZSCORE', KEYS[2], ''),
  redis.call('ZSCORE', KEYS[2], ARGV[1]),
  redis.call('XREVRANGE', KEYS[3], '+', '-', 'COUNT', ARGV[2]),
  redis.call('TIME'),
}
"""

# batch, its memory in ms, TAIL, TAIL_BYTES, MARGIN in us, and the newest known epoch and offset; then of each message
# the channel, body, audience, and the limits: messages, bytes, us. Keys: batch, and of each message the channel's log.
_APPEND = (
    _COMMON
    + """
local batch, memory, tail_most, tail_bytes, margin = unpack(ARGV, 1, 5)
local half_day = 43200 * 1000000

local stored = redis.call('GET', KEYS[4])
if stored then return stored end

local epoch, last = present(tonumber(ARGV[6]), tonumber(ARGV[7]))
local count = #KEYS - 4
-- First of all, too; and if the script should fail half-way, there is a hole in the numbers, and no number twice.
redis.call('HSET', head, 'last', text(last + count))

local kept = redis.call('HMGET', head, 'bytes', 'mark', 'noted', 'floor', 'floor1', 'floor2')
local bytes, mark, noted, floor = tonumber(kept[1]), kept[2], tonumber(kept[3]), tonumber(kept[4])

-- The set was evicted: of channels that are not in it from now on, nothing up to here is known.
if not redis.call('ZSCORE', lasts, '') then
  redis.call('ZADD', lasts, 0, '')
  floor = last
  redis.call('HSET', head, 'floor', text(last), 'floor1', text(last), 'floor2', text(last))
elseif now - noted >= half_day then
  floor = tonumber(kept[5])
  redis.call('HSET', head, 'floor', kept[5], 'floor1', kept[6], 'floor2', text(last), 'noted', text(now))
end

-- Drops from the front of a stream what makes it more than ``most`` bytes, of ``total`` ever, and what is from before ``since``.
local function trim(stream, most, total, since)
  while true do
    local oldest = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
    if not oldest then return end
    local published, before = tonumber(oldest[2][2]), tonumber(oldest[2][4])
    if total - before <= most and published > since then return end
    redis.call('XDEL', stream, oldest[1])
  end
end

local function keep(log, name, body, audience, most, most_bytes, ttl)
  local before, after = 0, redis.call('ZSCORE', lasts, name)
  if after then
    local newest = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1]
    if newest then before = tonumber(newest[2][4]) + #newest[2][6] end
  else
    -- What may be there is of another epoch, or older than a day.
    redis.call('DEL', log)
    after = floor
  end
  redis.call('XADD', log, 'MAXLEN', most, text(last) .. '-0',
    'time', text(now), 'before', text(before), 'body', body, 'audience', audience, 'after', text(tonumber(after)))
  trim(log, tonumber(most_bytes), before + #body, now - ttl)
  redis.call('PEXPIRE', log, text((ttl + margin) / 1000))
  redis.call('ZADD', lasts, text(last), name)
end

for n = 1, count do
  local name, body, audience, most, most_bytes, ttl = unpack(ARGV, 2 + 6 * n, 7 + 6 * n)
  local previous = mark
  last, mark = last + 1, batch .. n
  redis.call('XADD', tail, 'MAXLEN', '~', tail_most, id(epoch, last),
    'time', text(now), 'before', text(bytes), 'body', body, 'audience', audience,
    'channel', name, 'mark', mark, 'previous', previous)
  bytes = bytes + #body
  keep(KEYS[4 + n], name, body, audience, most, most_bytes, tonumber(ttl))
end
trim(tail, tonumber(tail_bytes), bytes, 0)

-- A few at each time, and more than may be added.
local old = redis.call('ZRANGEBYSCORE', lasts, '(0', text(floor), 'LIMIT', 0, 2 * count)
if #old > 0 then redis.call('ZREM', lasts, unpack(old)) end

redis.call('HSET', head, 'bytes', text(bytes), 'mark', mark)
redis.call('SET', KEYS[4], id(epoch, last), 'PX', memory)
return id(epoch, last)
"""
)


class _Entry(NamedTuple):
    """Of the tail. ``mark`` is the message's own, ``previous`` that of the one before."""

    message: Message
    mark: bytes
    previous: bytes


class _Look(NamedTuple):
    """The log's end, if there is a log, with the last message's mark, and the entries of the tail after some position."""

    end: Position | None
    mark: bytes
    entries: list[_Entry]


class RedisBroker(Broker):
    """``url`` as redis-py takes it: ``redis://``, ``rediss://`` (TLS) or ``unix://``. Raises ConfigurationError for another.

    Its calls take their connections from one pool, and none is made twice by redis-py: it is the outbox that calls again.

    Where Redis evicts keys (``maxmemory-policy``), a reader that misses a message for that reason is told of a gap. With
    "noeviction" and the memory full, publishing fails with what Redis says.
    """

    name = "redis"

    def __init__(self, url: str, prefix: str) -> None:
        if not prefix or "}" in prefix:
            raise ConfigurationError(
                f'TORNJANGO["COMET"]["PREFIX"] is {prefix!r}: it has to have characters, and none of them a "}}".'
            )
        self._prefix = f"{{{prefix}}}"
        self._pool = _make_pool(url, self.TIMEOUT)
        self.server = _name_server(self._pool.connection_kwargs)
        self._client: Any = redis.Redis(connection_pool=self._pool)
        self._present = self._client.register_script(_PRESENT)
        self._append = self._client.register_script(_APPEND)
        self._look = self._client.register_script(_LOOK)
        self._backlog = self._client.register_script(_BACKLOG)
        self._log_keys = [self._key("head"), self._key("tail"), self._key("lasts")]
        # The append's own: a process that has just published something may not have seen it come yet.
        self._stored: Position | None = None
        self._closed = False
        # The tail's own: the position and the mark of the last message that it has delivered.
        self._mark: tuple[Position, bytes] | None = None
        self._last = self._behind = 0

    def append(self, batch: bytes, drafts: Sequence[Draft], known: Position | None) -> Position:
        newest = max((one for one in (known, self._stored) if one is not None), default=None)
        keys = [*self._log_keys, self._key(f"batch:{batch.hex()}")]
        keys += [self._log_key(draft.channel) for draft in drafts]
        bounds = [BATCH_MEMORY * 1000, TAIL, TAIL_BYTES, MARGIN * 10**6]
        arguments: list[str | bytes | int] = [batch, *bounds, *_numbers(newest)]
        for draft in drafts:
            arguments += _arguments(draft)
        with self._calling():
            end = _position(self._append(keys, arguments))
        self._stored = end
        return end

    def tail(self, sink: Sink) -> None:
        end = self._find_end(sink.end)
        if sink.end is None or sink.end.epoch != end.epoch:
            self._begin(sink, end)
        sink.connected()
        while not sink.stopped:
            if not self._catch_up(sink):
                self._wait(sink)

    def _catch_up(self, sink: Sink) -> bool:
        """Delivers what there is, or begins anew; whether there may be more at once."""
        end = sink.end
        assert end is not None
        look = self._look_after(end)
        if look.end is None or look.end < end:
            self._begin(sink, self._find_end(end))
        elif look.end.epoch != end.epoch:
            self._begin(sink, look.end)
        elif self._is_fork(look, end):
            self._begin(sink, self._find_end(end, fork=True))
        elif look.end > end:
            self._deliver(sink, look, end)
        else:
            self._mark = end, look.mark
            self._behind = 0
        return self._behind > 0

    def _is_fork(self, look: _Look, end: Position) -> bool:
        """Whether the message that was the last one here is not the one that has its number now."""
        if self._mark is None or self._mark[0] != end:
            return False
        if look.end == end:
            return look.mark != self._mark[1]
        following = look.entries[0] if look.entries else None
        return (
            following is not None
            and following.message.offset == end.offset + 1
            and following.previous != self._mark[1]
        )

    def _deliver(self, sink: Sink, look: _Look, end: Position) -> None:
        assert look.end is not None
        entries = list(_contiguous(look.entries, end.offset))
        if not entries:
            self._begin(sink, look.end)
            return
        last = Position(end.epoch, entries[-1].message.offset)
        sink.deliver([entry.message for entry in entries])
        self._mark = last, entries[-1].mark
        self._last = look.end.offset
        self._behind = look.end.offset - last.offset

    def _begin(self, sink: Sink, end: Position) -> None:
        sink.begin(end)
        self._mark = None
        self._last, self._behind = end.offset, 0

    def _look_after(self, end: Position) -> _Look:
        with self._calling():
            (epoch, last, mark), found, clock = self._look(self._log_keys[:2], [_id(end), LOOK])
        if epoch is None:
            return _Look(None, b"", [])
        now = _microseconds(clock)
        entries = [_entry(id, _fields(pairs), now) for id, pairs in found]
        return _Look(_position(epoch + b"-" + last), mark, entries)

    def _find_end(self, known: Position | None, *, fork: bool = False) -> Position:
        """The log's end, of a new epoch where the log does not reach up to what is known, or says something else."""
        with self._calling():
            return _position(self._present(self._log_keys, [*_numbers(known), int(fork)]))

    def _wait(self, sink: Sink) -> None:
        """Until there is a message after the sink's, or for WAIT."""
        assert sink.end is not None
        wait = int(min(WAIT, self.TIMEOUT / 2) * 1000)
        with self._calling():
            self._client.xread({self._key("tail"): _id(sink.end)}, count=1, block=wait)

    def backlog(self, channel: Channel) -> Backlog:
        keys = [self._key("head"), self._key("lasts"), self._log_key(channel)]
        arguments: list[str | int] = [channel.name, channel.limits.history]
        with self._calling():
            (epoch, end, floor), complete, last, found, clock = self._backlog(keys, arguments)
        if epoch is None:
            return Backlog([], 0, b"")
        epoch = _epoch(epoch)
        if complete is None:  # The set was evicted.
            return Backlog([], int(end), epoch)
        if last is None:
            return Backlog([], int(floor), epoch)
        messages, begin = _within(channel, int(last), found, _microseconds(clock))
        return Backlog(messages, begin, epoch)

    def head(self) -> Position:
        return self._find_end(None)

    def status(self) -> dict[str, int | float | str]:
        """``last`` is the newest message's number, and ``behind`` how many have not come yet, at the last look."""
        return {"server": self.server, "last": self._last, "behind": self._behind}

    def close(self) -> None:
        self._closed = True
        self._pool.disconnect()

    def _key(self, name: str) -> str:
        return f"{self._prefix}:{name}"

    def _log_key(self, channel: Channel) -> str:
        return self._key(f"log:{channel.name}")

    @contextmanager
    def _calling(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Whose connection is closed by another thread, redis-py may fail in any way.
            if not (self._closed or isinstance(error, (redis.RedisError, OSError))):
                raise
            if isinstance(error, redis.ReadOnlyError):
                # It is a replica now. Where the name leads to is asked again only for a new connection.
                self._pool.disconnect(inuse_connections=False)
            raise BrokerUnavailable(f"Redis at {self.server}: {error}") from error


def _make_pool(url: str, timeout: float) -> redis.ConnectionPool:
    try:
        options = parse_url(url)  # type: ignore[no-untyped-call]
        options |= {
            # One answer, whatever redis-py's default is.
            "protocol": 2,
            "decode_responses": False,
            "socket_timeout": timeout,
            "retry": Retry(NoBackoff(), 0),
            "retry_on_timeout": False,
        }
        if options.get("connection_class") is not UnixDomainSocketConnection:
            options["socket_connect_timeout"] = timeout
        pool = redis.ConnectionPool(**options)
        # Does not connect, but refuses options that there are not.
        pool.connection_class(**pool.connection_kwargs)
    except (TypeError, ValueError, redis.RedisError):
        # What they say may quote the password.
        raise ConfigurationError(
            'TORNJANGO["COMET"]["REDIS"] is no URL that redis-py takes, such as '
            "redis://:password@host:6379/0, rediss://host:6379/0 or unix:///path/to/redis.sock."
        ) from None
    return pool


def _name_server(options: dict[str, Any]) -> str:
    """For people: without user, password and what else the URL says."""
    if "path" in options:
        return f"unix://{options['path']}"
    return f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"


def _numbers(position: Position | None) -> tuple[int, int]:
    if position is None:
        return 0, 0
    return int.from_bytes(position.epoch, "big"), position.offset


def _id(position: Position) -> str:
    """As a stream's: the newer the greater."""
    return f"{int.from_bytes(position.epoch, 'big')}-{position.offset}"


def _position(id: bytes) -> Position:
    epoch, _, offset = id.partition(b"-")
    return Position(_epoch(epoch), int(offset))


def _epoch(number: bytes) -> bytes:
    return int(number).to_bytes(EPOCH_BYTES, "big")


def _arguments(draft: Draft) -> list[str | bytes | int]:
    limits = draft.channel.limits
    ttl = int(min(limits.ttl, DAY) * 10**6)
    audience = b"" if draft.audience is None else _encode_audience(draft.audience)
    return [draft.channel.name, draft.body, audience, limits.history, limits.max_bytes, ttl]


def _encode_audience(audience: Audience) -> bytes:
    return json.dumps([sorted(audience.users), sorted(audience.groups)]).encode()


def _decode_audience(text: bytes) -> Audience | None:
    if not text:
        return None
    users, groups = json.loads(text)
    return Audience(frozenset(users), frozenset(groups))


def _microseconds(clock: Sequence[bytes]) -> int:
    seconds, microseconds = clock
    return int(seconds) * 10**6 + int(microseconds)


def _fields(pairs: Sequence[bytes]) -> dict[bytes, bytes]:
    return dict(zip(pairs[::2], pairs[1::2], strict=True))


def _message(channel: str, offset: int, fields: dict[bytes, bytes], now: int) -> Message:
    age = max(0, now - int(fields[b"time"])) / 10**6
    return Message(
        channel,
        offset,
        time.monotonic() - age,
        fields[b"body"],
        _decode_audience(fields[b"audience"]),
    )


def _entry(id: bytes, fields: dict[bytes, bytes], now: int) -> _Entry:
    message = _message(fields[b"channel"].decode(), _position(id).offset, fields, now)
    return _Entry(message, fields[b"mark"], fields[b"previous"])


def _contiguous(entries: Iterable[_Entry], offset: int) -> Iterator[_Entry]:
    """The entries after ``offset``, up to the first hole."""
    for entry in entries:
        offset += 1
        if entry.message.offset != offset:
            return
        yield entry


def _within(
    channel: Channel, last: int, newest_first: Iterable[tuple[bytes, Sequence[bytes]]], now: int
) -> tuple[list[Message], int]:
    """The channel's messages within its limits, oldest first, and the number after which they are all there were."""
    oldest = now - int(min(channel.limits.ttl, DAY) * 10**6)
    size = 0
    messages: list[Message] = []
    for id, pairs in newest_first:
        fields = _fields(pairs)
        size += len(fields[b"body"])
        if size > channel.limits.max_bytes or int(fields[b"time"]) <= oldest:
            break
        if id != b"%d-0" % last:  # Somebody else has removed one.
            break
        messages.append(_message(channel.name, last, fields, now))
        last = int(fields[b"after"])
    messages.reverse()
    return messages, last
