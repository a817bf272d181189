-- Take in lines of a file, with their numbers.
COPY pg_temp.imported_accounts (line, id, balance, minimum_balance) FROM STDIN
