-- The imported accounts that were opened with other values, in the file or before: by line, the first $1 of them.
SELECT line, id
  FROM imported_accounts AS imported
  JOIN {schema}users AS account USING (id)
 WHERE (account.opening_balance, account.opening_minimum_balance) <> (imported.balance, imported.minimum_balance)
 ORDER BY line
 LIMIT $1
