-- The journal of changes; a version and a minimum balance per account. What an account holds now is what it opened with.
-- depends: 0001-users

ALTER TABLE users
    ADD COLUMN version bigint NOT NULL DEFAULT 0,
    ADD COLUMN minimum_balance bigint NOT NULL DEFAULT 0,
    ADD COLUMN opening_minimum_balance bigint NOT NULL DEFAULT 0,
    DROP CONSTRAINT users_balance_not_negative,
    ADD CONSTRAINT users_balance_at_least_minimum CHECK (balance >= minimum_balance),
    ADD CONSTRAINT users_minimum_balance_in_range
        CHECK (minimum_balance BETWEEN -9007199254740991 AND 9007199254740991),
    ADD CONSTRAINT users_version_not_negative CHECK (version >= 0);

UPDATE users SET opening_balance = balance;

-- Appended to, never updated, never deleted from. No foreign key: an applied row comes from an UPDATE of its user.
CREATE TABLE balance_changes (
    user_id         bigint NOT NULL,
    version         bigint,
    amount          bigint NOT NULL,
    balance         bigint NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    idempotency_key text COLLATE "C" NOT NULL,
    reference       text,
    refusal         text,
    CONSTRAINT balance_changes_pkey PRIMARY KEY (user_id, idempotency_key),
    CONSTRAINT balance_changes_version_key UNIQUE (user_id, version),
    CONSTRAINT balance_changes_version_unless_refused CHECK ((version IS NULL) = (refusal IS NOT NULL)),
    CONSTRAINT balance_changes_refusal_known CHECK (refusal IN ('insufficient_funds', 'balance_limit_exceeded'))
);

COMMENT ON COLUMN balance_changes.version IS 'which change of the account it was, from 1 without a gap; null if refused';
COMMENT ON COLUMN balance_changes.balance IS 'the balance after the change; if refused, the one that could not cover it';
COMMENT ON COLUMN balance_changes.idempotency_key IS 'the caller''s, or one that the service made, which begins with a space';
