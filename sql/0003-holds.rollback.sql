DROP FUNCTION apply_changes(bigint, bigint[], text[], bigint[], bigint[], text[], integer[], text[], boolean[], text);

DROP TABLE expiry_turn;

DROP TABLE open_holds;

ALTER TABLE balance_changes
    DROP COLUMN hold_amount,
    DROP COLUMN expires_at,
    DROP COLUMN payees;

ALTER TABLE users
    DROP CONSTRAINT users_available_not_negative,
    DROP CONSTRAINT users_held_not_negative,
    DROP COLUMN held,
    ADD CONSTRAINT users_balance_at_least_minimum CHECK (balance >= minimum_balance);
