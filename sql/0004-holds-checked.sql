-- Check the accounts that were there before 0003 against its constraints: one pass, beside changes that go on.
-- depends: 0003-holds

ALTER TABLE users
    VALIDATE CONSTRAINT users_held_not_negative,
    VALIDATE CONSTRAINT users_available_not_negative;
