-- All money, for the audit: what the accounts have, what they were opened with, and what came and went but by transfers;
-- and how many changes were applied.
SELECT balance, opening_balance, moved, changes
  FROM (SELECT coalesce(sum(balance), 0), coalesce(sum(opening_balance), 0), coalesce(sum(version), 0) FROM {schema}users)
       AS account (balance, opening_balance, changes),
       (SELECT coalesce(sum(amount), 0) FROM {schema}balance_changes WHERE version IS NOT NULL AND payees IS NULL AND payer IS NULL)
       AS change (moved)
