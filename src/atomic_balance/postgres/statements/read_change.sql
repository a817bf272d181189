-- Read what is bound to a key: a change that was applied, or one that was refused.
-- $1 user_id, $2 idempotency_key.
SELECT version, amount, hold_amount, balance, idempotency_key, reference, created_at, refusal, payees, payer
  FROM {schema}balance_changes
 WHERE user_id = $1
   AND idempotency_key = $2
