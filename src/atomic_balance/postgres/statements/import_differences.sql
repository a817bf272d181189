-- The imported lines whose account is in an earlier line, or was opened, with other values: by line, the first $1 of them.
-- Gives of each the line, the id, the earlier line if there is one that differs, what the account was opened with, and how
-- many such lines there are in all.
WITH lines AS (
    SELECT line, id, balance, minimum_balance, first_value(line) OVER same_id AS first_line,
           (balance, minimum_balance) <> (first_value(balance) OVER same_id, first_value(minimum_balance) OVER same_id) AS differs
      FROM pg_temp.imported_accounts
    WINDOW same_id AS (PARTITION BY id ORDER BY line)
)
SELECT line, id, CASE WHEN differs THEN first_line END, account.opening_balance, account.opening_minimum_balance, count(*) OVER ()
  FROM lines
  LEFT JOIN {schema}users AS account USING (id)
 WHERE differs
    OR (account.opening_balance, account.opening_minimum_balance) <> (lines.balance, lines.minimum_balance)
 ORDER BY line
 LIMIT $1
