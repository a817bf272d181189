-- Stream every applied change, account by account, in order, for the audit.
SELECT user_id, version, amount, balance
  FROM balance_changes
 WHERE version IS NOT NULL
 ORDER BY user_id, version
