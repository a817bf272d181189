-- Apply the changes of one account, all or none, as apply_changes.sql does: by a function that Citus runs on its shard.
-- $1 user_id; one element per change, in arrival order: $2 idempotency_key, $3 amount (signed), $4 reference, $5 repeatable;
-- $6 lock_timeout. Gives what apply_changes.sql gives.
SELECT position, user_id, applied, balance, minimum_balance, amount, reference, refusal
  FROM apply_account($1, $2, $3, $4, $5, $6)
