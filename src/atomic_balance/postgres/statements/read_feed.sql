-- Read a page of the feed: applied changes of all accounts. sql/0007-feed.sql has the function, and says in which order.
-- $1 feed_position, $2 user_id, $3 version after which the page begins, $4 how many rows at most.
SELECT feed_position, user_id, version, amount, hold_amount, balance, idempotency_key, reference, created_at, refusal, payees, payer
  FROM {schema}read_feed($1, $2, $3, $4)
