-- All accounts as they are, as the CSV that can be imported.
COPY (SELECT id AS "userId", balance, minimum_balance AS "minimumBalance" FROM {schema}users ORDER BY id) TO STDOUT (FORMAT csv, HEADER)
