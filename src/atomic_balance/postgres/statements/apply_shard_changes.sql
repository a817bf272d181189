-- Apply a batch of one shard, as apply_changes.sql does: by a function that Citus runs on the shard. sql/citus/0005-apply-shard.sql has it.
-- The parameters, and what it gives, are those of apply_changes.sql.
SELECT position, user_id, applied, balance, held, minimum_balance, decided_at, amount, hold_amount, expires_at, payees, reference, refusal
  FROM {schema}apply_shard_changes($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
