-- Read how far the feed goes: the position of its newest row, 0 if it has none; and for how many seconds the oldest row has waited
-- that is committed and can't be read yet, because an older transaction is still running: 0 if there is none.
SELECT coalesce((SELECT feed_position
                   FROM balance_changes
                  WHERE feed_position < complete.until AND version IS NOT NULL
                  ORDER BY feed_position DESC
                  LIMIT 1), 0) AS head,
       coalesce((SELECT greatest(0, extract(epoch FROM clock_timestamp() - created_at))::float8
                   FROM balance_changes
                  WHERE feed_position >= complete.until AND version IS NOT NULL
                  ORDER BY feed_position
                  LIMIT 1), 0) AS lag_seconds
  FROM (SELECT feed_offset() + pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS until) AS complete
