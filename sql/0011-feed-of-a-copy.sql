-- A copy of a server's files that is just started, as a snapshot of its disk is, can't be told from it by identifier and timeline; but
-- its transactions are numbered on from an earlier one. So positions begin at the clock again whenever a server has been started.
-- And what is compared with a transaction's number is read in one snapshot: else it may have been written in between.
-- depends: 0010-payees-opened-meanwhile

UPDATE feed_server
   SET name = concat_ws(' ', name, extract(epoch FROM pg_postmaster_start_time()))
 WHERE name = feed_server_name();  -- by what it was until now: where nothing else has changed nothing begins anew

-- As 0007 has it, and when the server was started.
CREATE OR REPLACE FUNCTION feed_server_name() RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    RETURN concat_ws(
        ' ',
        (SELECT system_identifier FROM pg_control_system()),
        left(pg_walfile_name(pg_current_wal_lsn()), 8),
        (SELECT oid FROM pg_database WHERE datname = current_database()),
        extract(epoch FROM pg_postmaster_start_time())
    );
EXCEPTION WHEN OTHERS THEN
    RETURN 'not known';
END
$$;

-- See to it that the positions which this server gives are above all that were ever given. 0007 says how, and for what.
CREATE OR REPLACE FUNCTION keep_feed_ascending() RETURNS void LANGUAGE plpgsql SECURITY DEFINER
SET enable_seqscan = off SET enable_bitmapscan = off  -- so that the index is asked, whatever the statistics say
AS $$
DECLARE
    server text;
BEGIN
    IF pg_is_in_recovery() THEN
        RETURN;
    END IF;
    server := feed_server_name();
    FOR look IN 1..2 LOOP
        IF EXISTS (SELECT FROM feed_server WHERE name = server)
           AND NOT EXISTS (
               SELECT FROM balance_changes
                WHERE feed_position >= feed_offset() + pg_snapshot_xmax(pg_current_snapshot())::text::bigint AND version IS NOT NULL
           ) THEN
            RETURN;
        END IF;
        PERFORM FROM feed_server FOR UPDATE;  -- one at a time: another session may have done it meanwhile
    END LOOP;
    -- What is being written has its positions from before: a reader who has seen higher ones would never see it. Reads go on.
    LOCK TABLE balance_changes IN SHARE MODE;
    UPDATE feed_server SET name = server;
    EXECUTE format(
        'CREATE OR REPLACE FUNCTION feed_offset() RETURNS bigint LANGUAGE sql STABLE AS ''SELECT %s::bigint''',
        greatest(
            (extract(epoch FROM clock_timestamp()) * 1000000)::bigint - pg_snapshot_xmax(pg_current_snapshot())::text::bigint,
            -- Those that run and have written nothing yet are to be above it too.
            (SELECT max(feed_position) FROM balance_changes WHERE version IS NOT NULL) + 1 - pg_snapshot_xmin(pg_current_snapshot())::text::bigint
        )
    );
END
$$;

DO $$
BEGIN
    -- What it names is here, and not what the caller has made in a schema of its own.
    EXECUTE format('ALTER FUNCTION keep_feed_ascending() SET search_path = %I, pg_temp', current_schema());
END
$$;
