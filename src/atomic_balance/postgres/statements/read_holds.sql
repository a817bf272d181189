-- Read the applied changes that are recorded under keys: of holds, and of what settled them. One element per key: $1 user_id, $2 key.
SELECT asked.position, found.amount, found.hold_amount, found.reference, found.balance, found.expires_at,
       found.expires_at <= clock_timestamp() AS overdue, found.payees
  FROM unnest($1::bigint[], $2::text[]) WITH ORDINALITY AS asked (user_id, key, position)
  -- Not a plain "=": planned while the journal was small, it would read all of the account's journal, or of everybody's.
  JOIN {schema}balance_changes AS found
    ON found.user_id = ANY (ARRAY[asked.user_id])
   AND found.idempotency_key = ANY (ARRAY[asked.key])
   AND found.version IS NOT NULL
