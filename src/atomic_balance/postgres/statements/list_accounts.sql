-- Read a page of accounts, by id.
-- $1 the id after which the page begins (0: the first), $2 how many at most.
SELECT id, balance, held, balance - held - minimum_balance AS available, minimum_balance, version
  FROM {schema}users
 WHERE id > $1
 ORDER BY id
 LIMIT $2
