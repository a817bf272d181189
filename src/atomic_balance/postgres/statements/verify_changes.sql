-- Stream the journal account by account, for the audit: the applied changes in order, then the refused ones.
SELECT user_id, version, amount, balance, refusal, hold_amount, idempotency_key
  FROM balance_changes
 ORDER BY user_id, version
