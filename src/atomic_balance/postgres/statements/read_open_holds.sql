-- Read a page of an account's open holds, by id.
-- $1 user_id, $2 the id after which the page begins ('': the first), $3 how many at most.
SELECT hold.hold_id, hold.amount, placed.reference, hold.expires_at
  FROM {schema}open_holds AS hold
  JOIN {schema}balance_changes AS placed ON placed.user_id = hold.user_id AND placed.idempotency_key = hold.hold_id
 WHERE hold.user_id = $1
   AND hold.hold_id > $2
 ORDER BY hold.hold_id
 LIMIT $3
