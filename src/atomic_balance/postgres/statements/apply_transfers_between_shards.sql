-- Apply a batch with transfers on a cluster. sql/citus/0006-transfers-between-shards.sql has the function.
-- The parameters, and what it gives, are those of apply_transfers.sql.
SELECT set, user_id, verdict, balance, held, minimum_balance, decided_at, amount, hold_amount, expires_at, payees, reference, refusal
  FROM {schema}apply_transfers_between_shards($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
