-- Which of these accounts have their row locked by a transaction that has not ended, as the row's header tells (xmax).
-- $1 user_ids.
-- xmax has 32 bits of a transaction's number: it is made whole by the number that comes next. What seems to lie ahead of that has just
-- begun. A row that several transactions share may be missed, or named too often: its xmax is no transaction's number.
SELECT id
  FROM {schema}users,
       (SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint) AS snapshot (upcoming),
       LATERAL (SELECT (upcoming - xmax::text::bigint) & 4294967295) AS header (age)
 WHERE id = ANY ($1::bigint[])
   AND xmax <> 0
   AND (age = 0
        OR age > 2147483648
        OR pg_xact_status((upcoming - age)::text::xid8) = 'in progress')
