-- Count the open holds, what they hold together, and those that should have been settled by now: they expired over a second ago.
SELECT count(*), coalesce(sum(amount), 0)::float8, count(*) FILTER (WHERE expires_at < clock_timestamp() - interval '1 second')
  FROM open_holds
