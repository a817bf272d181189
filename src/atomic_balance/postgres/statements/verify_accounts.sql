-- Stream every account, for the audit.
SELECT id, opening_balance, balance, held, version
  FROM users
 ORDER BY id
