-- Stream the list of open holds, account by account, for the audit. Times as seconds.
SELECT user_id, hold_id, amount, extract(epoch FROM expires_at)::float8
  FROM {schema}open_holds
 ORDER BY user_id, hold_id
