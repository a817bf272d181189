DROP TABLE balance_changes;

ALTER TABLE users
    DROP CONSTRAINT users_balance_at_least_minimum,
    DROP CONSTRAINT users_minimum_balance_in_range,
    DROP CONSTRAINT users_version_not_negative,
    DROP COLUMN version,
    DROP COLUMN minimum_balance,
    DROP COLUMN opening_minimum_balance,
    ADD CONSTRAINT users_balance_not_negative CHECK (balance >= 0);
