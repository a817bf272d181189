-- The feed: each row of the journal knows its transaction, so that all changes can be followed in an order in which none comes late.
-- A number drawn from a sequence is not enough: a reader that passes a gap loses what commits into it later. Rows below the oldest
-- transaction that is still running are complete.
-- The new column has a constant default for the rows that are there, so the table is neither rewritten nor read.
-- depends: 0006-openings

SET LOCAL lock_timeout = '2s';  -- behind a long transaction, give up rather than hold up everybody

-- The server and the database that feed positions are counted on: elsewhere the next transaction may have a smaller number.
-- System identifier, timeline and the database's oid; a server that does not tell them is not known.
CREATE FUNCTION feed_server_name() RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    RETURN concat_ws(
        ' ',
        (SELECT system_identifier FROM pg_control_system()),
        left(pg_walfile_name(pg_current_wal_lsn()), 8),
        (SELECT oid FROM pg_database WHERE datname = current_database())
    );
EXCEPTION WHEN OTHERS THEN
    RETURN 'not known';
END
$$;

-- The one that they were last counted on: one row.
CREATE TABLE feed_server (
    only_one boolean NOT NULL DEFAULT true,
    name     text NOT NULL,
    CONSTRAINT feed_server_pkey PRIMARY KEY (only_one),
    CONSTRAINT feed_server_one_row CHECK (only_one)
);
INSERT INTO feed_server (name) VALUES (feed_server_name());

-- What is added to a transaction's id to make its feed position: a constant, which costs a row nothing. Positions begin at the clock,
-- in microseconds.
DO $$
BEGIN
    EXECUTE format(
        'CREATE FUNCTION feed_offset() RETURNS bigint LANGUAGE sql STABLE AS ''SELECT %s::bigint''',
        (extract(epoch FROM clock_timestamp()) * 1000000)::bigint - pg_snapshot_xmax(pg_current_snapshot())::text::bigint
    );
END
$$;

-- See to it that the positions which this server gives are above all that were ever given, also after a restore or a fail-over.
-- On another server they begin at the clock again, and no server has a transaction each microsecond. So whoever begins later begins
-- higher, whatever became of the server before and of what its last transactions wrote.
-- It does so as the owner of the tables, whoever calls it; on the server that it knows it changes nothing.
CREATE FUNCTION keep_feed_ascending() RETURNS void LANGUAGE plpgsql SECURITY DEFINER
SET enable_seqscan = off SET enable_bitmapscan = off  -- so that the index is asked, whatever the statistics say
AS $$
DECLARE
    server text;
    next_id bigint;
BEGIN
    IF pg_is_in_recovery() THEN
        RETURN;
    END IF;
    server := feed_server_name();
    FOR look IN 1..2 LOOP
        next_id := pg_snapshot_xmax(pg_current_snapshot())::text::bigint;
        IF EXISTS (SELECT FROM feed_server WHERE name = server)
           AND NOT EXISTS (SELECT FROM balance_changes WHERE feed_position >= feed_offset() + next_id AND version IS NOT NULL) THEN
            RETURN;
        END IF;
        PERFORM FROM feed_server FOR UPDATE;  -- one at a time: another session may have done it meanwhile
    END LOOP;
    -- What is being written has its positions from before: a reader who has seen higher ones would never see it. Reads go on.
    LOCK TABLE balance_changes IN SHARE MODE;
    next_id := pg_snapshot_xmax(pg_current_snapshot())::text::bigint;
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

-- Read applied changes of all accounts: those from before there was a feed by user and version, then by transaction, user and version,
-- as far as that is complete: no row below the oldest transaction that is still running can come later.
-- The page begins after the row with this position, user and version, all 0 for the beginning, and has count_max rows at most.
CREATE FUNCTION read_feed(after_position bigint, after_user bigint, after_version bigint, count_max bigint)
RETURNS TABLE (
    feed_position bigint, user_id bigint, version bigint, amount bigint, hold_amount bigint, balance bigint, idempotency_key text,
    reference text, created_at timestamptz, refusal text, payees bigint[], payer bigint
) LANGUAGE plpgsql STABLE
-- Whatever the statistics say, a page is read from an index in its order: anything else would read all that is to come.
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off
AS $$
#variable_conflict use_column
DECLARE
    found_count bigint := 0;
BEGIN
    IF after_position = 0 THEN
        RETURN QUERY
        SELECT feed_position, user_id, version, amount, hold_amount, balance, idempotency_key, reference, created_at, refusal, payees, payer
          FROM balance_changes
         WHERE feed_position = 0
           AND version IS NOT NULL
           AND (user_id, version) > (after_user, after_version)
         ORDER BY user_id, version
         LIMIT count_max;
        GET DIAGNOSTICS found_count = ROW_COUNT;
        after_position := 1;
        after_user := 0;
        after_version := 0;
    END IF;
    RETURN QUERY
    SELECT page.*
      FROM (SELECT feed_position, user_id, version, amount, hold_amount, balance, idempotency_key, reference, created_at, refusal, payees, payer
              FROM balance_changes
             WHERE feed_position >= after_position
               AND feed_position < (SELECT feed_offset() + pg_snapshot_xmin(pg_current_snapshot())::text::bigint)
               AND version IS NOT NULL
               AND (feed_position, user_id, version) > (after_position, after_user, after_version)
             ORDER BY feed_position
             -- The index has the rows of a transaction, a thousand at most, in no order: all of the last one's are read.
             FETCH FIRST (count_max - found_count) ROWS WITH TIES) AS page
     ORDER BY page.feed_position, page.user_id, page.version
     LIMIT count_max - found_count;
END
$$;

-- How far the feed goes: the position of its newest row, 0 if it has none; and for how many seconds the oldest row has waited that is
-- committed and can't be read yet, because an older transaction is still running: 0 if there is none.
CREATE FUNCTION read_feed_head(OUT head bigint, OUT lag_seconds float8) LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off
AS $$
DECLARE
    complete bigint := feed_offset() + pg_snapshot_xmin(pg_current_snapshot())::text::bigint;
BEGIN
    head := coalesce((SELECT max(feed_position) FROM balance_changes WHERE feed_position < complete AND version IS NOT NULL), 0);
    lag_seconds := coalesce(
        (SELECT greatest(0, extract(epoch FROM clock_timestamp() - created_at))
           FROM balance_changes
          WHERE feed_position >= complete AND version IS NOT NULL
          ORDER BY feed_position
          LIMIT 1),
        0
    );
END
$$;

ALTER TABLE balance_changes ADD COLUMN feed_position bigint DEFAULT 0;

COMMENT ON COLUMN balance_changes.feed_position IS 'feed_offset() and the transaction''s id; 0 for rows from before there was a feed';

DO $$
BEGIN
    -- What it names is here, and not what the caller has made in a schema of its own.
    EXECUTE format('ALTER FUNCTION keep_feed_ascending() SET search_path = %I, pg_temp', current_schema());
    -- On Citus there is no order over all nodes, and so no feed: new rows have no position there.
    IF EXISTS (SELECT FROM pg_extension WHERE extname = 'citus') THEN
        ALTER TABLE balance_changes ALTER COLUMN feed_position DROP DEFAULT;
    ELSE
        ALTER TABLE balance_changes ALTER COLUMN feed_position SET DEFAULT feed_offset() + pg_current_xact_id()::text::bigint;
    END IF;
END
$$;
