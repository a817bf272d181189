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
-- decided_at (told where the batch has to do with holds), with the balance and what was held before them; or not, as they are now. No row: no such user.
CREATE FUNCTION apply_changes(
    account bigint, user_ids bigint[], keys text[], amounts bigint[], hold_amounts bigint[], hold_ids text[], lasting integer[],
    texts text[], repeatables boolean[], lock_wait text,
    OUT "position" bigint, OUT user_id bigint, OUT applied boolean, OUT balance bigint, OUT held bigint, OUT minimum_balance bigint,
    OUT decided_at timestamptz, OUT amount bigint, OUT hold_amount bigint, OUT expires_at timestamptz, OUT payees bigint[],
    OUT reference text, OUT refusal text
) RETURNS SETOF record LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    replays boolean[];  -- by position: true if the journal holds the change; null if none was looked for
    replayed bigint := 0;
    accounts bigint;    -- how many have other changes
    done bigint[];      -- those whose changes were applied
    rest bigint[] := '{}';  -- those whose changes were not
    balances bigint[];
    helds bigint[];
    minimums bigint[];
    version bigint;
    now timestamptz := clock_timestamp();
BEGIN
    -- For this statement alone. No table is read as a whole: a plan that was made while one was empty would, long after.
    lock_wait := set_config('lock_timeout', lock_wait, true) || set_config('enable_seqscan', 'off', true);
    IF repeatables IS NOT NULL THEN
        replays := array_fill(false, ARRAY[cardinality(keys)]);
        FOR "position", user_id, applied, balance, amount, hold_amount, expires_at, payees, reference, refusal IN
            SELECT sent.place, done.user_id, done.refusal IS NULL, done.balance, done.amount, done.hold_amount,
                   done.expires_at, done.payees, done.reference, done.refusal
              FROM unnest(user_ids, keys, repeatables) WITH ORDINALITY AS sent (user_id, key, repeatable, place)
              -- Not a plain "=": planned while the journal was small, it would read all of the journal.
              JOIN balance_changes AS done
                ON done.user_id = ANY (ARRAY[sent.user_id]) AND done.idempotency_key = ANY (ARRAY[sent.key])
             WHERE sent.repeatable
        LOOP
            replays["position"] := true;
            replayed := replayed + 1;
            RETURN NEXT;
        END LOOP;
        IF replayed = cardinality(keys) THEN
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
        RETURNING users.balance - amounts[1], users.held - coalesce(hold_amounts[1], 0), users.minimum_balance, users.version
          INTO balance, held, minimum_balance, version;
        applied := FOUND;
        IF applied THEN
            INSERT INTO balance_changes (user_id, idempotency_key, amount, balance, version, reference, hold_amount, expires_at)
            VALUES (user_ids[1], keys[1], amounts[1], balance + amounts[1], version, texts[1], hold_amounts[1],
                    now + make_interval(secs => lasting[1]));
            IF hold_amounts[1] > 0 THEN
                INSERT INTO open_holds (user_id, hold_id, amount, expires_at)
                VALUES (user_ids[1], keys[1], hold_amounts[1], now + make_interval(secs => lasting[1]));
            ELSIF hold_amounts[1] < 0 THEN
                DELETE FROM open_holds WHERE open_holds.user_id = user_ids[1] AND open_holds.hold_id = hold_ids[1];
            END IF;
            decided_at := now;
            RETURN NEXT;
        ELSE
            SELECT users.balance, users.held, users.minimum_balance INTO balance, held, minimum_balance FROM users WHERE users.id = user_ids[1];
            IF FOUND THEN RETURN NEXT; END IF;
        END IF;
        RETURN;
    END IF;

    WITH change AS (
        SELECT sent.*, (sum(sent.amount) OVER so_far)::bigint AS moved, coalesce(sum(sent.hold) OVER so_far, 0)::bigint AS holding
          FROM unnest(user_ids, keys, amounts, hold_amounts, lasting, texts, replays)
               WITH ORDINALITY AS sent (user_id, key, amount, hold, seconds, reference, replay, place)
         WHERE sent.replay IS NOT TRUE
        WINDOW so_far AS (PARTITION BY sent.user_id ORDER BY sent.place)
         ORDER BY user_id, place
    ), demand AS MATERIALIZED (
        -- The arrays of what no change has are not made.
        SELECT user_id, min(moved - holding) AS lowest, max(moved) AS highest, array_agg(key) AS keys,
               array_agg(change.amount) AS amounts, array_agg(moved) AS moves,
               array_agg(hold) FILTER (WHERE hold_amounts IS NOT NULL) AS hold_amounts,
               coalesce(sum(hold), 0)::bigint AS holds,
               array_agg(seconds) FILTER (WHERE lasting IS NOT NULL) AS lasting,
               array_agg(change.reference) FILTER (WHERE texts IS NOT NULL) AS texts
          FROM change
         GROUP BY user_id
         ORDER BY user_id
    ), applied AS (
        UPDATE users
           SET balance = users.balance + moves[cardinality(moves)],
               held = users.held + demand.holds,
               version = users.version + cardinality(moves)
          FROM demand
         -- Not a plain "=": that may be hashed, and rows taken in another order than demand's deadlock.
         WHERE users.id = ANY (ARRAY[demand.user_id])
           AND users.balance - users.held + demand.lowest >= users.minimum_balance
           AND users.balance + demand.highest <= 9007199254740991
           AND users.held + demand.holds >= 0
        RETURNING demand.*, users.minimum_balance, users.balance - moves[cardinality(moves)] AS balance,
                  users.held - demand.holds AS held, users.version - cardinality(moves) AS version
    ), journal AS (
        INSERT INTO balance_changes (user_id, idempotency_key, amount, balance, version, reference, hold_amount, expires_at)
        SELECT user_id, change.key, change.amount, balance + change.moved, version + change.step, change.reference,
               change.hold, now + make_interval(secs => change.seconds)
          FROM applied,
               unnest(keys, amounts, moves, applied.hold_amounts, applied.lasting, texts)
               WITH ORDINALITY AS change (key, amount, moved, hold, seconds, reference, step)
    )
    SELECT (SELECT count(*) FROM demand), coalesce(array_agg(user_id), '{}'), array_agg(balance), array_agg(held), array_agg(minimum_balance)
      INTO accounts, done, balances, helds, minimums
      FROM applied;
    RETURN QUERY
    SELECT NULL::bigint, line.*, CASE WHEN hold_amounts IS NOT NULL THEN now END, NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::bigint[], NULL::text, NULL::text
      FROM unnest(done, array_fill(true, ARRAY[cardinality(done)]), balances, helds, minimums) AS line;
    IF cardinality(done) < accounts THEN
        rest := ARRAY(
            SELECT sent.user_id FROM unnest(user_ids, replays) AS sent (user_id, replay) WHERE sent.replay IS NOT TRUE
            EXCEPT SELECT unnest(done)
        );
        -- As they are now: on what this statement sees, which is younger than when it was sent.
        RETURN QUERY
        SELECT NULL::bigint, users.id, false, users.balance, users.held, users.minimum_balance, NULL::timestamptz,
               NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::bigint[], NULL::text, NULL::text
          FROM users
         WHERE users.id = ANY (rest);
    END IF;

    IF hold_amounts IS NOT NULL THEN
        INSERT INTO open_holds (user_id, hold_id, amount, expires_at)
        SELECT sent.user_id, sent.key, sent.hold, now + make_interval(secs => sent.seconds)
          FROM unnest(user_ids, keys, hold_amounts, lasting, replays) AS sent (user_id, key, hold, seconds, replay)
         WHERE sent.hold > 0 AND sent.replay IS NOT TRUE AND sent.user_id NOT IN (SELECT unnest(rest));
        DELETE FROM open_holds
         USING unnest(user_ids, hold_amounts, hold_ids, replays) AS sent (user_id, hold, hold_id, replay)
         -- Not a plain "=", as above.
         WHERE open_holds.user_id = ANY (ARRAY[sent.user_id]) AND open_holds.hold_id = ANY (ARRAY[sent.hold_id])
           AND sent.hold < 0 AND sent.replay IS NOT TRUE AND sent.user_id NOT IN (SELECT unnest(rest));
    END IF;
END
$$;
