-- The feed: each row of the journal knows its transaction, so that all changes can be followed in an order in which none comes late.
-- A number drawn from a sequence is not enough: a reader that passes a gap loses what commits into it later. Rows below the oldest
-- transaction that is still running are complete.
-- The new column has a constant default for the rows that are there, so the table is not rewritten.
-- depends: 0005-transfers

SET LOCAL lock_timeout = '2s';  -- behind a long transaction, give up rather than hold up everybody

-- Which server feed positions are counted on: one row.
CREATE TABLE feed_server (
    only_one boolean NOT NULL DEFAULT true,
    name     text NOT NULL,
    CONSTRAINT feed_server_pkey PRIMARY KEY (only_one),
    CONSTRAINT feed_server_one_row CHECK (only_one)
);
INSERT INTO feed_server (name) VALUES ('none yet');

COMMENT ON COLUMN feed_server.name IS 'its system identifier and timeline: another one may count its transactions from a smaller number';

ALTER TABLE balance_changes ADD COLUMN feed_position bigint DEFAULT 0;

COMMENT ON COLUMN balance_changes.feed_position IS 'feed_offset() and the transaction''s id; 0 for rows from before there was a feed';

-- What is added to a transaction's id. A constant, which costs a row nothing; keep_feed_ascending puts another one in its place.
CREATE FUNCTION feed_offset() RETURNS bigint LANGUAGE sql STABLE AS 'SELECT 0::bigint';

-- See to it that the positions which this server gives are above all that were ever given, also after a restore or a fail-over.
-- Positions begin at the clock, in microseconds, and no server has a transaction each microsecond. So whoever begins later begins
-- higher, whatever became of the server before and of what its last transactions wrote.
-- For the owner of the tables to do, whoever calls it; without another server it changes nothing.
CREATE FUNCTION keep_feed_ascending() RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    server text := 'not known';
    next_id bigint := pg_snapshot_xmax(pg_current_snapshot())::text::bigint;
BEGIN
    IF pg_is_in_recovery() THEN
        RETURN;
    END IF;
    BEGIN
        server := (SELECT system_identifier FROM pg_control_system()) || ' ' || left(pg_walfile_name(pg_current_wal_lsn()), 8);
    EXCEPTION WHEN OTHERS THEN
        NULL;  -- a server that does not tell; there the positions in the journal tell alone
    END;
    IF EXISTS (SELECT FROM feed_server WHERE name = server)
       AND NOT EXISTS (SELECT FROM balance_changes WHERE feed_position >= feed_offset() + next_id AND version IS NOT NULL) THEN
        RETURN;
    END IF;
    PERFORM FROM feed_server FOR UPDATE;  -- one at a time
    next_id := pg_snapshot_xmax(pg_current_snapshot())::text::bigint;
    IF EXISTS (SELECT FROM feed_server WHERE name = server)
       AND NOT EXISTS (SELECT FROM balance_changes WHERE feed_position >= feed_offset() + next_id AND version IS NOT NULL) THEN
        RETURN;
    END IF;
    UPDATE feed_server SET name = server;
    EXECUTE format(
        'CREATE OR REPLACE FUNCTION feed_offset() RETURNS bigint LANGUAGE sql STABLE AS ''SELECT %s::bigint''',
        greatest(
            (extract(epoch FROM clock_timestamp()) * 1000000)::bigint,
            (SELECT max(feed_position) FROM balance_changes WHERE version IS NOT NULL) + 1
        ) - next_id
    );
END
$$;

-- On Citus there is no order over all nodes, and so no feed: new rows have no position there.
DO $$
BEGIN
    PERFORM keep_feed_ascending();
    IF EXISTS (SELECT FROM pg_extension WHERE extname = 'citus') THEN
        ALTER TABLE balance_changes ALTER COLUMN feed_position DROP DEFAULT;
    ELSE
        ALTER TABLE balance_changes ALTER COLUMN feed_position SET DEFAULT feed_offset() + pg_current_xact_id()::text::bigint;
    END IF;
END
$$;
