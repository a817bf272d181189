-- Read what an account had at a time: a search by halves for its last change up to then. It may be, because versions have no gaps and
-- rows are inserted in their order while the account's row is held.
-- $1 user_id, $2 the time.
-- Gives the balance and the version then, whether the account was open, and whether that time is over. No row: no such user.
WITH RECURSIVE search (low, high) AS (
    SELECT 0::bigint, version
      FROM {schema}users
     WHERE id = $1
     UNION ALL
    SELECT CASE WHEN created_at <= $2 THEN middle ELSE low END,
           CASE WHEN created_at <= $2 THEN high ELSE middle - 1 END
      FROM search,
           LATERAL (SELECT (low + high + 1) / 2) AS half (middle),
           -- With a limit it is no join: planned while the journal was small, that would read all of the account's.
           LATERAL (SELECT created_at FROM {schema}balance_changes WHERE user_id = $1 AND version = middle LIMIT 1) AS tried
     WHERE low < high
)
SELECT coalesce(last.balance, account.opening_balance), found.low,
       coalesce(account.opened_at <= $2, true), $2 <= clock_timestamp()
  FROM {schema}users AS account
  JOIN search AS found ON found.low = found.high
  LEFT JOIN {schema}balance_changes AS last ON last.user_id = ANY (ARRAY[$1]) AND last.version = ANY (ARRAY[found.low])
 WHERE account.id = $1
