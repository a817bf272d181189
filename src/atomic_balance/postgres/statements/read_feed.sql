-- Read applied changes of all accounts in the order of their transactions, as far as it is complete: no row below the oldest
-- transaction that is still running can come later.
-- $1 feed_position, $2 user_id, $3 version after which the page begins, $4 how many rows at most.
-- The index gives the rows of a transaction, of which there are a thousand at most, in no order: all of the last one's are read.
SELECT *
  FROM (SELECT feed_position, user_id, version, amount, hold_amount, balance, idempotency_key, reference, created_at, refusal, payees, payer
          FROM balance_changes
         WHERE feed_position >= $1
           AND feed_position < (SELECT feed_offset() + pg_snapshot_xmin(pg_current_snapshot())::text::bigint)
           AND version IS NOT NULL
           AND (feed_position, user_id, version) > ($1, $2, $3)
         ORDER BY feed_position
         FETCH FIRST ($4) ROWS WITH TIES) AS page
 ORDER BY feed_position, user_id, version
 LIMIT $4
