CREATE OR REPLACE FUNCTION feed_server_name() RETURNS text LANGUAGE plpgsql AS $$
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

CREATE OR REPLACE FUNCTION keep_feed_ascending() RETURNS void LANGUAGE plpgsql SECURITY DEFINER
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

DO $$
BEGIN
    -- What it names is here, and not what the caller has made in a schema of its own.
    EXECUTE format('ALTER FUNCTION keep_feed_ascending() SET search_path = %I, pg_temp', current_schema());
END
$$;

UPDATE feed_server SET name = feed_server_name();
