-- Open the imported accounts that are not open; of an account that is there twice, the first. In the order of their ids, so
-- that two imports do not deadlock.
INSERT INTO {schema}users (id, balance, opening_balance, minimum_balance, opening_minimum_balance)
SELECT id, balance, balance, minimum_balance, minimum_balance
  FROM pg_temp.imported_accounts
 ORDER BY id, line
ON CONFLICT ON CONSTRAINT users_pkey DO NOTHING
