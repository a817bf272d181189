-- Holds: a part of the balance that is set aside, in `users.held`; each hold's row and its settlement's in the journal; a list of open ones.
-- The function apply_changes carries updates and holds alike, in one statement per batch.
-- The new columns have constant defaults or none, so no table is rewritten; 0004 checks the rows that are there without a long lock.
-- depends: 0002-journal

SET LOCAL lock_timeout = '2s';  -- behind a long transaction, give up rather than hold up everybody

-- A process that knows no holds can't spend what is held: the constraint stops it.
ALTER TABLE users
    ADD COLUMN held bigint NOT NULL DEFAULT 0,
    DROP CONSTRAINT users_balance_at_least_minimum,
    ADD CONSTRAINT users_held_not_negative CHECK (held >= 0) NOT VALID,
    ADD CONSTRAINT users_available_not_negative CHECK (balance - held >= minimum_balance) NOT VALID;

ALTER TABLE balance_changes
    ADD COLUMN hold_amount bigint,
    ADD COLUMN expires_at timestamptz,
    ADD COLUMN payees bigint[];

COMMENT ON COLUMN balance_changes.hold_amount IS 'what the change adds to what is held: positive for a hold, negative for its settlement, null if it touches none';
COMMENT ON COLUMN balance_changes.expires_at IS 'of a hold: until when it lasts; of a settlement: set if it was the expiry';
COMMENT ON COLUMN balance_changes.payees IS 'of a transfer: whom it pays, and how much; null for what moves one account';

-- Holds that are not settled. The journal has all that ever were.
CREATE TABLE open_holds (
    user_id    bigint NOT NULL,
    hold_id    text COLLATE "C" NOT NULL,
    amount     bigint NOT NULL,
    expires_at timestamptz NOT NULL,
    CONSTRAINT open_holds_pkey PRIMARY KEY (user_id, hold_id)
);
CREATE INDEX open_holds_expires_at ON open_holds (expires_at);

-- Whose turn it is to settle what has expired, and until when: one row.
CREATE TABLE expiry_turn (
    only_one boolean NOT NULL DEFAULT true,
    holder   text NOT NULL,
    until    timestamptz NOT NULL,
    CONSTRAINT expiry_turn_pkey PRIMARY KEY (only_one),
    CONSTRAINT expiry_turn_one_row CHECK (only_one)
);
INSERT INTO expiry_turn (holder, until) VALUES ('', '-infinity');

-- Apply a batch: for each account all of its changes or none, and their journal rows with them.
-- One element per change, an account's changes in arrival order, at most 1,000 (so that no sum leaves bigint). An array of which
-- no change of the batch makes use may be null.
-- account: any of the batch (Citus routes by it). keys and amounts are never null; a hold's amount is 0.
-- hold_amounts: positive holds under the change's key; negative settles the hold that hold_ids names, at most once in a batch.
-- lasting: for how many seconds a hold lasts; for a settlement, not null if it is the expiry. repeatables: the journal may hold the key.
-- Gives a row for each change that the journal holds ("position" set), and one for each account with any other change: applied at
-- decided_at, with the balance and what was held before them; or not, as they are now. No row: no such user.
CREATE FUNCTION apply_changes(
    account bigint, user_ids bigint[], keys text[], amounts bigint[], hold_amounts bigint[], hold_ids text[], lasting integer[],
    texts text[], repeatables boolean[], lock_wait text,
    OUT "position" bigint, OUT user_id bigint, OUT applied boolean, OUT balance bigint, OUT held bigint, OUT minimum_balance bigint,
    OUT decided_at timestamptz, OUT amount bigint, OUT hold_amount bigint, OUT expires_at timestamptz, OUT payees bigint[],
    OUT reference text, OUT refusal text
) RETURNS SETOF record LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    replayed bigint[] := '{}';
    done bigint[] := '{}';  -- accounts whose changes were applied
    rest bigint[];          -- accounts that are there, and whose changes were not
    balances bigint[];
    helds bigint[];
    minimums bigint[];
    now timestamptz := clock_timestamp();
    one record;
BEGIN
    PERFORM set_config('lock_timeout', lock_wait, true);  -- for this statement alone
    IF repeatables IS NOT NULL THEN
        FOR "position", user_id, applied, balance, amount, hold_amount, expires_at, payees, reference, refusal IN
            SELECT sent.place, done.user_id, done.refusal IS NULL, done.balance, done.amount, done.hold_amount,
                   done.expires_at, done.payees, done.reference, done.refusal
              FROM unnest(user_ids, keys, repeatables) WITH ORDINALITY AS sent (user_id, key, repeatable, place)
              JOIN balance_changes AS done ON done.user_id = sent.user_id AND done.idempotency_key = sent.key
             WHERE sent.repeatable
        LOOP
            replayed := replayed || "position";
            RETURN NEXT;
        END LOOP;
        IF cardinality(replayed) = cardinality(keys) THEN
            RETURN;
        END IF;
        "position" := NULL; amount := NULL; hold_amount := NULL; expires_at := NULL; payees := NULL; reference := NULL; refusal := NULL;
    END IF;

    IF cardinality(keys) = 1 THEN  -- what follows, for one change: a fifth of the work to start
        user_id := user_ids[1];
        UPDATE users
           SET balance = users.balance + amounts[1],
               held = users.held + coalesce(hold_amounts[1], 0),
               version = users.version + 1
         WHERE users.id = user_ids[1]
           AND users.balance - users.held + amounts[1] - coalesce(hold_amounts[1], 0) >= users.minimum_balance
           AND users.balance + amounts[1] <= 9007199254740991
           AND users.held + coalesce(hold_amounts[1], 0) >= 0  -- or another session has just settled the hold: send again
        RETURNING users.balance, users.held, users.minimum_balance, users.version INTO one;
        applied := FOUND;
        IF applied THEN
            INSERT INTO balance_changes (user_id, idempotency_key, amount, balance, version, reference, hold_amount, expires_at)
            VALUES (user_ids[1], keys[1], amounts[1], one.balance, one.version, texts[1], hold_amounts[1],
                    now + make_interval(secs => lasting[1]));
            done := user_ids;
            balance := one.balance - amounts[1]; held := one.held - coalesce(hold_amounts[1], 0); minimum_balance := one.minimum_balance;
            decided_at := now;
            RETURN NEXT;
        ELSE
            SELECT users.balance, users.held, users.minimum_balance INTO balance, held, minimum_balance FROM users WHERE users.id = user_ids[1];
            IF FOUND THEN RETURN NEXT; END IF;
        END IF;
    ELSE
        WITH change AS (
            SELECT sent.*, sum(sent.amount) OVER so_far AS moved, sum(sent.amount - coalesce(sent.hold, 0)) OVER so_far AS freed
              FROM unnest(user_ids, keys, amounts, hold_amounts, lasting, texts)
                   WITH ORDINALITY AS sent (user_id, key, amount, hold, seconds, reference, place)
             WHERE sent.place <> ALL (replayed)
            WINDOW so_far AS (PARTITION BY sent.user_id ORDER BY sent.place)
             ORDER BY user_id, place
        ), demand AS MATERIALIZED (
            SELECT user_id, min(freed)::bigint AS lowest, max(moved)::bigint AS highest, sum(change.amount)::bigint AS moved,
                   coalesce(sum(hold), 0)::bigint AS holds, count(*) AS steps, array_agg(key) AS keys,
                   array_agg(change.amount) AS amounts, array_agg(change.moved::bigint) AS moves, array_agg(hold) AS hold_amounts,
                   array_agg(seconds) AS lasting, array_agg(change.reference) AS texts
              FROM change
             GROUP BY user_id
             ORDER BY user_id
        ), applied AS (
            UPDATE users
               SET balance = users.balance + demand.moved,
                   held = users.held + demand.holds,
                   version = users.version + demand.steps
              FROM demand
             -- Not a plain "=": that may be hashed, and rows taken in another order than demand's deadlock.
             WHERE users.id = ANY (ARRAY[demand.user_id])
               AND users.balance - users.held + demand.lowest >= users.minimum_balance
               AND users.balance + demand.highest <= 9007199254740991
               AND users.held + demand.holds >= 0
            RETURNING demand.*, users.minimum_balance, users.balance - demand.moved AS balance,
                      users.held - demand.holds AS held, users.version - demand.steps AS version
        ), journal AS (
            INSERT INTO balance_changes (user_id, idempotency_key, amount, balance, version, reference, hold_amount, expires_at)
            SELECT user_id, change.key, change.amount, balance + change.moved, version + change.step, change.reference,
                   change.hold, now + make_interval(secs => change.seconds)
              FROM applied,
                   unnest(keys, amounts, moves, applied.hold_amounts, applied.lasting, texts)
                   WITH ORDINALITY AS change (key, amount, moved, hold, seconds, reference, step)
        )
        SELECT coalesce(array_agg(user_id), '{}'), array_agg(balance), array_agg(held), array_agg(minimum_balance)
          INTO done, balances, helds, minimums
          FROM applied;
        RETURN QUERY
        SELECT NULL::bigint, line.*, now, NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::bigint[], NULL::text, NULL::text
          FROM unnest(done, array_fill(true, ARRAY[cardinality(done)]), balances, helds, minimums) AS line;
        -- Those that are left, as they are now: on what this statement sees, which is younger than when it was sent.
        SELECT array_agg(DISTINCT sent.user_id)
          INTO rest
          FROM unnest(user_ids) WITH ORDINALITY AS sent (user_id, place)
         WHERE sent.place <> ALL (replayed) AND NOT EXISTS (SELECT FROM unnest(done) AS id WHERE id = sent.user_id);
        IF rest IS NOT NULL THEN
            RETURN QUERY
            SELECT NULL::bigint, users.id, false, users.balance, users.held, users.minimum_balance, NULL::timestamptz,
                   NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::bigint[], NULL::text, NULL::text
              FROM users
             WHERE users.id = ANY (rest);
        END IF;
    END IF;

    IF hold_amounts IS NOT NULL THEN
        INSERT INTO open_holds (user_id, hold_id, amount, expires_at)
        SELECT sent.user_id, sent.key, sent.hold, now + make_interval(secs => sent.seconds)
          FROM unnest(user_ids, keys, hold_amounts, lasting) WITH ORDINALITY AS sent (user_id, key, hold, seconds, place)
         WHERE sent.hold > 0 AND sent.place <> ALL (replayed) AND EXISTS (SELECT FROM unnest(done) AS id WHERE id = sent.user_id);
        DELETE FROM open_holds
         USING unnest(user_ids, hold_amounts, hold_ids) WITH ORDINALITY AS sent (user_id, hold, hold_id, place)
         WHERE sent.hold < 0 AND open_holds.user_id = sent.user_id AND open_holds.hold_id = sent.hold_id
           AND sent.place <> ALL (replayed) AND EXISTS (SELECT FROM unnest(done) AS id WHERE id = sent.user_id);
    END IF;
END
$$;
