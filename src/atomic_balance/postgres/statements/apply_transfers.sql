-- Apply a batch with transfers: of each owner all or nothing. sql/0005-transfers.sql has the function, and says what it takes and gives.
-- One element per leg: $1 set, $2 owner, $3 account, $4 key, $5 amount (signed), $6 hold_amount (signed), $7 hold_id,
-- $8 seconds that it lasts, $9 reference, $10 whom it pays, $11 repeatable; $12 lock_timeout.
SELECT set, user_id, verdict, balance, held, minimum_balance, decided_at, amount, hold_amount, expires_at, payees, reference, refusal
  FROM {schema}apply_transfers($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
