-- When an account was opened, for what it held at a time. Of those from before it is not known: null, as if it had always been there.
-- depends: 0005-transfers

SET LOCAL lock_timeout = '2s';  -- behind a long transaction, give up rather than hold up everybody

ALTER TABLE users ADD COLUMN opened_at timestamptz;  -- its default comes after: here it would count for those from before too
ALTER TABLE users ALTER COLUMN opened_at SET DEFAULT clock_timestamp();
