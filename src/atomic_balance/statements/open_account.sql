-- Open an account where there is none.
-- $1 user_id, $2 opening balance.
-- Gives the account and whether this statement opened it. No row: another session opened it meanwhile, send again.
WITH opened AS (
    INSERT INTO users (id, balance, opening_balance)
    VALUES ($1, $2, $2)
    ON CONFLICT ON CONSTRAINT users_pkey DO NOTHING
    RETURNING balance, opening_balance
)
SELECT balance, opening_balance, true AS opened
  FROM opened
UNION ALL
SELECT balance, opening_balance, false
  FROM users
 WHERE id = $1
   AND NOT EXISTS (SELECT FROM opened)
