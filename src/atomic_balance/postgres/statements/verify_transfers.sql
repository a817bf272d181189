-- The legs that applied transfers owe and nobody has, and the credits that no applied transfer owes, for the audit: the first $1.
-- Counted leg by leg, however many there are: a hash or a sort that the server puts on disk when it is large.
SELECT sum(count) > 0 AS owed, payer, payee, amount, min(version)
  FROM (SELECT 1 AS count, user_id AS payer, payees[2 * place - 1] AS payee, ' ' || user_id || ' ' || idempotency_key AS key,
               payees[2 * place] AS amount, reference, true AS applied, version
          FROM {schema}balance_changes, generate_series(1, (cardinality(payees) + 1) / 2) AS place
         WHERE payees IS NOT NULL AND version IS NOT NULL
         UNION ALL
        SELECT -1, payer, user_id, idempotency_key, amount, reference, version IS NOT NULL, version
          FROM {schema}balance_changes
         WHERE payer IS NOT NULL) AS leg
 GROUP BY payer, payee, key, amount, reference, applied
HAVING sum(count) <> 0
 ORDER BY payer, payee, key, owed DESC
 LIMIT $1
