-- Count the open holds that should have been settled by now, because they expired over a second ago: up to $1 of them.
SELECT count(*)
  FROM (SELECT 1 FROM {schema}open_holds WHERE expires_at < (SELECT clock_timestamp() - interval '1 second') LIMIT $1) AS overdue
