-- Read an account.
-- $1 user_id.
SELECT balance
  FROM users
 WHERE id = $1
