-- The sum of the balances of accounts with ids from $1 to $2, all as they are at one moment.
SELECT coalesce(sum(balance), 0)::bigint
  FROM {schema}users
 WHERE id BETWEEN $1 AND $2
