"""The statements of the PostgreSQL broker; its tables are made in ``tornjango/migrations/0001_comet.py``.

Each is a transaction of its own, in READ COMMITTED: one round trip, and no lock outlives it, whatever becomes of the client.
"""

from __future__ import annotations

#: What `APPEND` notifies, and a tail listens to.
NOTIFICATIONS = "tornjango_comet"

#: Seconds for which every message is kept, whatever its channel's limits: for a process to come back and go on where it was.
GRACE = 60

#: Seconds after which a channel's floor may be forgotten.
FLOOR_KEPT = 24 * 3600

# Updating the one row of the head locks it until the commit, so numbers have no holes, and in the order of the numbers the
# messages become visible. A batch that is there already violates the unique index, and then nothing was done. Whoever waited
# for the lock sees the row as it is then. The time is taken after that: by number, messages are in its order.
APPEND = f"""
WITH head AS (
    UPDATE tornjango_comet_head SET
        epoch = CASE WHEN epoch = %(known_epoch)s AND last < %(known)s THEN %(fresh)s ELSE epoch END,
        last = last + %(count)s
    WHERE id = 1
    RETURNING epoch, last
), message AS (
    INSERT INTO tornjango_comet_message
        (number, channel, body, audience, published, expires, history, max_bytes, batch)
    SELECT
        head.last - %(count)s + draft.n, draft.channel, draft.body, draft.audience, clock_timestamp(),
        clock_timestamp() + make_interval(secs => greatest(draft.ttl, {GRACE})), draft.history, draft.max_bytes,
        CASE draft.n WHEN 1 THEN %(batch)s::uuid END
    FROM head, unnest(
        %(channels)s::text[], %(bodies)s::text[], %(audiences)s::text[],
        %(ttls)s::float8[], %(histories)s::integer[], %(sizes)s::bigint[]
    ) WITH ORDINALITY AS draft (channel, body, audience, ttl, history, max_bytes, n)
)
SELECT epoch, last, pg_notify('{NOTIFICATIONS}', '')::text FROM head
"""

#: Where the batch ends that is there already.
APPENDED = """
SELECT head.epoch, message.number + %(count)s - 1
FROM tornjango_comet_head AS head, tornjango_comet_message AS message
WHERE message.batch = %(batch)s::uuid
"""

HEAD = "SELECT epoch, last FROM tornjango_comet_head"

LISTEN = f"LISTEN {NOTIFICATIONS}"

LISTENING = f"SELECT 1 FROM pg_listening_channels() AS name WHERE name = '{NOTIFICATIONS}'"

#: Numbers grow by one: what is missing between the rows was removed.
FETCH = """
SELECT
    head.epoch, head.last, message.number, message.channel, message.body, message.audience,
    extract(epoch FROM clock_timestamp() - message.published)::float8
FROM tornjango_comet_head AS head
LEFT JOIN (
    SELECT * FROM tornjango_comet_message WHERE number > %(end)s ORDER BY number LIMIT %(rows)s
) AS message ON true
ORDER BY message.number
"""

#: The newest messages, and one that is beyond the limits, if there is one; newest first. One row without a message, if none is.
BACKLOG = """
SELECT
    head.epoch,
    coalesce(
        floor.number,
        -- A floor that is forgotten was below what is left, and is not above the head's.
        least(head.floor, (SELECT min(number) - 1 FROM tornjango_comet_message WHERE channel = %(channel)s))
    ),
    message.number, message.body, message.audience,
    extract(epoch FROM clock_timestamp() - message.published)::float8,
    message.total::bigint
FROM tornjango_comet_head AS head
LEFT JOIN tornjango_comet_floor AS floor ON floor.channel = %(channel)s
LEFT JOIN LATERAL (
    SELECT * FROM (
        SELECT
            number, body, audience, published, size,
            sum(size) OVER (ORDER BY number DESC ROWS UNBOUNDED PRECEDING) AS total
        FROM tornjango_comet_message WHERE channel = %(channel)s
        ORDER BY number DESC LIMIT %(history)s + 1
    ) AS newest
    WHERE total - size <= %(max_bytes)s
) AS message ON true
ORDER BY message.number DESC
"""

# The log's identity

#: The cluster, the database and the table: a dump that is restored elsewhere has another one.
HOME = """
SELECT concat_ws(
    '/',
    CASE WHEN has_function_privilege('pg_control_system()', 'execute')
    THEN (SELECT system_identifier FROM pg_control_system()) END,
    (SELECT oid FROM pg_database WHERE datname = current_database()),
    'tornjango_comet_head'::regclass::oid
)
"""

#: A server that was promoted, or recovered to some point in time, writes a new one: it may lack the end of the log.
TIMELINE = "SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8)"

#: Makes the head where there is none, and a new epoch where the log has moved, or somebody has put the head back.
ADOPT = """
INSERT INTO tornjango_comet_head AS head (id, epoch, home, last, floor)
SELECT 1, %(fresh)s, %(home)s, coalesce(max(number), 0), coalesce(max(number), 0)
FROM (
    (SELECT number FROM tornjango_comet_message ORDER BY number DESC LIMIT 1)
    UNION ALL
    SELECT max(number) FROM tornjango_comet_floor
) AS known
ON CONFLICT (id) DO UPDATE SET
    epoch = excluded.epoch, home = excluded.home, last = greatest(head.last, excluded.last)
WHERE head.home <> excluded.home OR head.last < excluded.last
"""

#: A row, where there is nothing to adopt.
AT_HOME = """
SELECT 1 FROM tornjango_comet_head
WHERE home = %(home)s AND last >= coalesce((SELECT max(number) FROM tornjango_comet_message), 0)
"""

#: The log ends before what this process has seen of it.
RENEW = """
UPDATE tornjango_comet_head SET epoch = %(fresh)s WHERE epoch = %(known_epoch)s AND last < %(known)s
"""

# Trimming

#: Whose turn it is, of all processes: the number up to which messages were looked at before. No row: nobody's, yet.
TRIM = """
INSERT INTO tornjango_comet_trim AS trim (id, examined, at) VALUES (1, 0, statement_timestamp())
ON CONFLICT (id) DO UPDATE SET at = excluded.at
WHERE trim.at < excluded.at - make_interval(secs => %(pause)s)
RETURNING CASE WHEN examined <= (SELECT last FROM tornjango_comet_head) THEN examined ELSE 0 END
"""

_REMEMBER_FLOORS = """
    INSERT INTO tornjango_comet_floor AS floor (channel, number, at)
    SELECT channel, max(number), statement_timestamp() FROM removed GROUP BY channel ORDER BY channel
    ON CONFLICT (channel) DO UPDATE SET number = greatest(floor.number, excluded.number), at = excluded.at
"""

# Only a channel that has had messages can have too many of them: so the next messages are looked at, of those that are old
# enough to be removed, and the channels they are in. To walk through what a channel keeps, at each message of it, would cost
# hundreds of rows; so that is done by chance, the more probable the more came, about once for each tenth of what it may keep.
# A channel's limits are those of its newest message.
TRIM_TO_LIMITS = f"""
WITH span AS MATERIALIZED (
    SELECT number, channel, size FROM (
        SELECT number, channel, size, published FROM tornjango_comet_message
        WHERE number > %(examined)s ORDER BY number LIMIT %(rows)s
    ) AS message
    WHERE published < statement_timestamp() - interval '{GRACE} seconds'
), due AS MATERIALIZED (
    SELECT changed.channel, newest.history, newest.max_bytes
    FROM (SELECT channel, count(*) AS messages, sum(size) AS bytes FROM span GROUP BY channel) AS changed
    CROSS JOIN LATERAL (
        SELECT history, max_bytes FROM tornjango_comet_message AS message
        WHERE message.channel = changed.channel ORDER BY number DESC LIMIT 1
    ) AS newest
    WHERE random() < 10 * greatest(messages::float8 / history, bytes::float8 / max_bytes)
), beyond AS MATERIALIZED (
    SELECT due.channel, oldest.number
    FROM due
    CROSS JOIN LATERAL (
        SELECT number FROM (
            SELECT
                number,
                row_number() OVER newest_first AS rank,
                sum(size) OVER newest_first AS total
            FROM tornjango_comet_message AS message
            WHERE message.channel = due.channel AND number <= (SELECT max(number) FROM span)
            WINDOW newest_first AS (ORDER BY number DESC ROWS UNBOUNDED PRECEDING)
        ) AS ranked
        WHERE rank > due.history OR total > due.max_bytes
        ORDER BY number DESC LIMIT 1
    ) AS oldest
), removed AS (
    DELETE FROM tornjango_comet_message AS message USING beyond
    WHERE message.channel = beyond.channel AND message.number <= beyond.number
        AND message.published < statement_timestamp() - interval '{GRACE} seconds'
    RETURNING message.channel, message.number
), floors AS ({_REMEMBER_FLOORS}), examined AS (
    UPDATE tornjango_comet_trim SET examined = span.number, at = statement_timestamp()
    FROM (SELECT max(number) AS number FROM span) AS span WHERE span.number IS NOT NULL
)
SELECT (SELECT max(number) FROM span), (SELECT count(*) FROM span), (SELECT count(*) FROM removed)
"""

TRIM_EXPIRED = f"""
WITH removed AS (
    DELETE FROM tornjango_comet_message WHERE number = ANY (ARRAY(
        SELECT number FROM tornjango_comet_message
        WHERE expires <= statement_timestamp() ORDER BY expires LIMIT %(rows)s
    ))
    RETURNING channel, number
), floors AS ({_REMEMBER_FLOORS})
SELECT count(*) FROM removed
"""

TRIM_FLOORS = f"""
WITH removed AS (
    DELETE FROM tornjango_comet_floor WHERE channel = ANY (ARRAY(
        SELECT channel FROM tornjango_comet_floor
        WHERE at <= statement_timestamp() - interval '{FLOOR_KEPT} seconds' ORDER BY at LIMIT %(rows)s
    ))
    RETURNING number
), raised AS (
    UPDATE tornjango_comet_head AS head SET floor = greatest(head.floor, removed.highest)
    FROM (SELECT max(number) AS highest FROM removed) AS removed WHERE removed.highest IS NOT NULL
)
SELECT count(*) FROM removed
"""
