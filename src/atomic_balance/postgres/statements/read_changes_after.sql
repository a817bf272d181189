-- Read a page of an account's journal, oldest first: applied changes alone.
-- $1 user_id, $2 the version after which the page begins, $3 how many rows at most.
SELECT version, amount, hold_amount, balance, idempotency_key, reference, created_at, refusal, payees, payer
  FROM {schema}balance_changes
 WHERE user_id = $1
   AND version > $2
 ORDER BY version
 LIMIT $3
