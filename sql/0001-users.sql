-- An account per user: its balance, in minor units, and the balance it was opened with.

CREATE TABLE users (
    id              bigint NOT NULL,
    balance         bigint NOT NULL,
    opening_balance bigint NOT NULL,
    CONSTRAINT users_pkey PRIMARY KEY (id),
    CONSTRAINT users_id_in_range CHECK (id BETWEEN 1 AND 9007199254740991),
    CONSTRAINT users_balance_not_negative CHECK (balance >= 0),
    CONSTRAINT users_balance_within_limit CHECK (balance <= 9007199254740991)
) WITH (fillfactor = 50);  -- room on the page, so that an update touches no index (HOT)
