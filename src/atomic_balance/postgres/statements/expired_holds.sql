-- Open holds that have expired, those first that expired first.
-- The page begins after $1 expires_at, $2 user_id, $3 hold_id ('-infinity', 0, '': at the first); $4 users to leave out; $5 how many at
-- most. The clock is read once, or the index could not be searched by it.
SELECT user_id, hold_id, amount, expires_at
  FROM {schema}open_holds
 WHERE expires_at <= (SELECT clock_timestamp())
   AND (expires_at, user_id, hold_id) > ($1, $2, $3)
   AND user_id <> ALL ($4::bigint[])
 ORDER BY expires_at, user_id, hold_id
 LIMIT $5
