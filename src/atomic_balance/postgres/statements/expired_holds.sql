-- Open holds that have expired, those first that expired first.
-- The page begins after $1 expires_at, $2 user_id, $3 hold_id (nulls: at the first); $4 users to leave out; $5 how many at most.
SELECT user_id, hold_id, amount, expires_at
  FROM open_holds
 WHERE expires_at <= clock_timestamp()
   AND ($1::timestamptz IS NULL OR (expires_at, user_id, hold_id) > ($1, $2::bigint, $3::text))
   AND user_id <> ALL ($4::bigint[])
 ORDER BY expires_at, user_id, hold_id
 LIMIT $5
