"""The tables of COMET's PostgreSQL broker, ``tornjango.comet.brokers.postgres``; in other databases it does nothing."""

from __future__ import annotations

from django.db import migrations
from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.migrations.state import ProjectState

TABLES = """
-- One row: the number of the last message, and what was before the floor and is forgotten.
-- "home" is where the log lives: a copy that is restored elsewhere is another log.
CREATE TABLE tornjango_comet_head (
    id smallint PRIMARY KEY CHECK (id = 1),
    epoch bytea NOT NULL,
    home text NOT NULL,
    last bigint NOT NULL,
    floor bigint NOT NULL
);
-- It is changed with each batch: room for the new row beside the old one keeps its index as it is.
ALTER TABLE tornjango_comet_head SET (fillfactor = 10, autovacuum_vacuum_threshold = 1000);

CREATE TABLE tornjango_comet_message (
    number bigint PRIMARY KEY,
    channel text NOT NULL,
    body text NOT NULL,
    size integer GENERATED ALWAYS AS (octet_length(body)) STORED,
    audience text,
    published timestamptz NOT NULL,
    expires timestamptz NOT NULL,
    history integer NOT NULL,
    max_bytes bigint NOT NULL,
    batch uuid
);
CREATE INDEX tornjango_comet_message_channel ON tornjango_comet_message (channel, number) INCLUDE (size);
CREATE INDEX tornjango_comet_message_expires ON tornjango_comet_message (expires);
CREATE UNIQUE INDEX tornjango_comet_message_batch ON tornjango_comet_message (batch) WHERE batch IS NOT NULL;

-- The highest number of each channel whose message was removed, and when that was.
CREATE TABLE tornjango_comet_floor (
    channel text PRIMARY KEY,
    number bigint NOT NULL,
    at timestamptz NOT NULL
);
CREATE INDEX tornjango_comet_floor_at ON tornjango_comet_floor (at);

-- One row: when a process last removed what is beyond the limits, and up to which number it has looked.
CREATE TABLE tornjango_comet_trim (
    id smallint PRIMARY KEY CHECK (id = 1),
    examined bigint NOT NULL,
    at timestamptz NOT NULL
);
"""

NO_TABLES = """
DROP TABLE tornjango_comet_head;
DROP TABLE tornjango_comet_message;
DROP TABLE tornjango_comet_floor;
DROP TABLE tornjango_comet_trim;
"""


class RunPostgresSQL(migrations.RunSQL):
    """As RunSQL, also in that a database router may forbid it; where the database is no PostgreSQL, nothing."""

    def database_forwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        if schema_editor.connection.vendor == "postgresql":
            super().database_forwards(app_label, schema_editor, from_state, to_state)

    def database_backwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        if schema_editor.connection.vendor == "postgresql":
            super().database_backwards(app_label, schema_editor, from_state, to_state)


class Migration(migrations.Migration):
    initial = True
    dependencies = []
    operations = [RunPostgresSQL(TABLES, NO_TABLES)]
