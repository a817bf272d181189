-- Open an account where there is none.
-- $1 user_id, $2 opening balance, $3 opening minimum balance.
-- Gives the account as it is, as it was opened, and whether this statement opened it.
-- No row: another session opened it meanwhile, send again.
WITH opened AS (
    INSERT INTO {schema}users (id, balance, opening_balance, minimum_balance, opening_minimum_balance)
    VALUES ($1, $2, $2, $3, $3)
    ON CONFLICT ON CONSTRAINT users_pkey DO NOTHING
    RETURNING balance, held, minimum_balance, version, opening_balance, opening_minimum_balance
)
SELECT balance, held, balance - held - minimum_balance AS available, minimum_balance, version,
       opening_balance, opening_minimum_balance, true AS opened
  FROM opened
UNION ALL
SELECT balance, held, balance - held - minimum_balance, minimum_balance, version, opening_balance, opening_minimum_balance, false
  FROM {schema}users
 WHERE id = $1
   AND NOT EXISTS (SELECT FROM opened)
