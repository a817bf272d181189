-- Open the imported accounts that are not open; of an account that is there twice, the first.
INSERT INTO {schema}users (id, balance, opening_balance, minimum_balance, opening_minimum_balance)
SELECT DISTINCT ON (id) id, balance, balance, minimum_balance, minimum_balance
  FROM imported_accounts
 ORDER BY id, line
ON CONFLICT ON CONSTRAINT users_pkey DO NOTHING
