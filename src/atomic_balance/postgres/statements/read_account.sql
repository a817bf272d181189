-- Read an account.
-- $1 user_id.
SELECT balance, minimum_balance, version
  FROM users
 WHERE id = $1
