-- Count the open holds, and what they hold together.
SELECT count(*), coalesce(sum(amount), 0)::float8
  FROM {schema}open_holds
