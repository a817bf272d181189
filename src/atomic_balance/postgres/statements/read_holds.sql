-- Read holds, and what became of each. A position that is missing has no hold: none was placed, or it was refused.
-- One element per hold: $1 user_id, $2 hold_id, $3 the key of its settlement.
SELECT asked.position, placed.hold_amount, placed.reference, placed.expires_at, placed.expires_at <= clock_timestamp() AS overdue,
       settled.version IS NOT NULL AS settled, settled.expires_at IS NOT NULL AS expired, -settled.amount AS captured, settled.balance
  FROM unnest($1::bigint[], $2::text[], $3::text[]) WITH ORDINALITY AS asked (user_id, hold_id, settlement_key, position)
  -- Not a plain "=": planned while the journal was small, it would read all of the account's journal, or of everybody's.
  JOIN balance_changes AS placed
    ON placed.user_id = ANY (ARRAY[asked.user_id])
   AND placed.idempotency_key = ANY (ARRAY[asked.hold_id])
   AND placed.hold_amount > 0
   AND placed.refusal IS NULL
  LEFT JOIN balance_changes AS settled
    ON settled.user_id = ANY (ARRAY[asked.user_id])
   AND settled.idempotency_key = ANY (ARRAY[asked.settlement_key])
