-- How many accounts the lines of a file name.
SELECT count(DISTINCT id)
  FROM pg_temp.imported_accounts
