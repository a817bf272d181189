-- Apply the changes of one account, all or none, as apply_changes.sql does: by a function that Citus runs on the account's shard.
-- $1 account; one element per change: $2 key, $3 amount (signed), $4 hold_amount (signed), $5 hold_id, $6 seconds that it lasts,
-- $7 reference, $8 repeatable; $9 lock_timeout. Gives what apply_changes.sql gives.
SELECT position, user_id, applied, balance, held, minimum_balance, decided_at, amount, hold_amount, expires_at, payees, reference, refusal
  FROM {schema}apply_account_changes($1, $2, $3, $4, $5, $6, $7, $8, $9)
