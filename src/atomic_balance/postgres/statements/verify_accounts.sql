-- Stream every account, for the audit.
SELECT id, opening_balance, balance, held, version
  FROM {schema}users
 ORDER BY id
