-- What read_holds does, for Citus: it names the accounts by themselves, so that no other shards are asked. On plain PostgreSQL that
-- would have each of many accounts looked up as often as there are accounts.
-- One element per key: $1 user_id, $2 key.
SELECT asked.position, found.amount, found.hold_amount, found.reference, found.balance, found.expires_at,
       found.expires_at <= clock_timestamp() AS overdue, found.payees
  FROM unnest($1::bigint[], $2::text[]) WITH ORDINALITY AS asked (user_id, key, position)
  JOIN {schema}balance_changes AS found
    ON found.user_id = ANY ($1::bigint[])
   AND found.user_id = ANY (ARRAY[asked.user_id])
   AND found.idempotency_key = ANY (ARRAY[asked.key])
   AND found.version IS NOT NULL
