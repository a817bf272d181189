-- Stream the journal account by account, for the audit: the applied changes in order, then the refused ones. Times as seconds.
SELECT user_id, version, amount, balance, refusal, hold_amount, idempotency_key, extract(epoch FROM expires_at)::float8, payees
  FROM {schema}balance_changes
 ORDER BY user_id, version
