-- Read a page of an account's journal, newest first: applied changes alone, refused ones have no version. The opening is version 0.
-- $1 user_id, $2 the version before which the page begins (null: the newest), $3 how many rows at most. No row: no such user.
SELECT version, amount, hold_amount, balance, idempotency_key, reference, created_at, refusal, payees, payer
  FROM ((SELECT version, amount, hold_amount, balance, idempotency_key, reference, created_at, refusal, payees, payer
           FROM {schema}balance_changes
          WHERE user_id = $1
            AND version < coalesce($2, 9223372036854775807)
          ORDER BY version DESC
          LIMIT $3)
         UNION ALL
        SELECT 0, opening_balance, NULL, opening_balance, '', NULL, opened_at, NULL, NULL, NULL
          FROM {schema}users
         WHERE id = $1) AS entry
 ORDER BY version DESC
 LIMIT $3
