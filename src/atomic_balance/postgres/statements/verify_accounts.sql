-- Stream every account, for the audit.
SELECT id, opening_balance, balance, version
  FROM users
 ORDER BY id
