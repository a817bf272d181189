-- Set an account's minimum balance where what is not held is not below it.
-- $1 user_id, $2 minimum balance.
-- Gives the account as it is and whether the minimum was set. No row: no such user.
WITH changed AS (
    UPDATE {schema}users
       SET minimum_balance = $2
     WHERE id = $1
       AND balance - held >= $2
    RETURNING balance, held, minimum_balance, version
)
SELECT balance, held, balance - held - minimum_balance AS available, minimum_balance, version, true AS changed
  FROM changed
UNION ALL
SELECT balance, held, balance - held - minimum_balance, minimum_balance, version, false
  FROM {schema}users
 WHERE id = $1
   AND NOT EXISTS (SELECT FROM changed)
