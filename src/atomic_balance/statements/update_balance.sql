-- Change one balance where the result stays within 0 and the limit.
-- $1 user_id, $2 amount (signed).
-- Gives the new balance and true; or, not applied, the balance in this statement's snapshot and false. No row: no such user.
WITH applied AS (
    UPDATE users
       SET balance = balance + $2
     WHERE id = $1
       AND balance + $2 >= 0
       AND balance + $2 <= 9007199254740991
    RETURNING balance
)
SELECT balance, true AS applied
  FROM applied
UNION ALL
SELECT balance, false
  FROM users
 WHERE id = $1
   AND NOT EXISTS (SELECT FROM applied)
