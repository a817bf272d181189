-- Read applied changes from before there was a feed, of all accounts, by user and version.
-- $1 user_id, $2 version after which the page begins, $3 how many rows at most.
SELECT feed_position, user_id, version, amount, hold_amount, balance, idempotency_key, reference, created_at, refusal, payees, payer
  FROM balance_changes
 WHERE feed_position = 0
   AND version IS NOT NULL
   AND (user_id, version) > ($1, $2)
 ORDER BY user_id, version
 LIMIT $3
