-- Read an account.
-- $1 user_id.
SELECT balance, held, balance - held - minimum_balance AS available, minimum_balance, version
  FROM {schema}users
 WHERE id = $1
