-- A batch of one shard: as a function that Citus sends to the shard's node in one round trip.
-- Every statement in it names the batch's accounts by themselves (= ANY (ids)), so that Citus finds the one shard; on plain PostgreSQL,
-- where it runs too, that would make other plans than apply_changes has. It takes the place of apply_account_changes too.
-- depends: 0004-own-schema

SET LOCAL citus.multi_shard_modify_mode TO 'sequential';

-- Apply a batch for accounts of one shard. It takes and gives what apply_changes does; account: any of them.
CREATE FUNCTION apply_shard_changes(
    account bigint, user_ids bigint[], keys text[], amounts bigint[], hold_amounts bigint[], hold_ids text[], lasting integer[],
    texts text[], repeatables boolean[], lock_wait text,
    OUT "position" bigint, OUT user_id bigint, OUT applied boolean, OUT balance bigint, OUT held bigint, OUT minimum_balance bigint,
    OUT decided_at timestamptz, OUT amount bigint, OUT hold_amount bigint, OUT expires_at timestamptz, OUT payees bigint[],
    OUT reference text, OUT refusal text
) RETURNS SETOF record LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    replays boolean[];  -- by position: true if the journal holds the change
    replayed bigint := 0;
    ids bigint[];       -- the accounts with other changes, and what these ask of each
    lowests bigint[];
    highests bigint[];
    moveds bigint[];
    holdings bigint[];
    steps bigint[];
    done bigint[];      -- those whose changes were applied
    balances bigint[];
    helds bigint[];
    minimums bigint[];
    versions bigint[];
    version bigint;
    now timestamptz := clock_timestamp();
BEGIN
    -- For this statement alone. No table is read as a whole, nor sorted: a plan that was made while one was empty would, long after.
    -- The price that this puts on such plans would have the others compiled.
    lock_wait := set_config('lock_timeout', lock_wait, true) || set_config('enable_seqscan', 'off', true)
                 || set_config('enable_sort', 'off', true) || set_config('jit', 'off', true);
    IF repeatables IS NOT NULL THEN
        replays := array_fill(false, ARRAY[cardinality(keys)]);
        FOR "position", user_id, applied, balance, amount, hold_amount, expires_at, payees, reference, refusal IN
            SELECT sent.place, found.user_id, found.refusal IS NULL, found.balance, found.amount, found.hold_amount,
                   found.expires_at, found.payees, found.reference, found.refusal
              FROM unnest(user_ids, keys, repeatables) WITH ORDINALITY AS sent (user_id, key, repeatable, place),
                   -- With a limit it is no join, and in this order it is the primary key that is searched, whatever the statistics say.
                   LATERAL (
                       SELECT *
                         FROM balance_changes
                        WHERE balance_changes.user_id = ANY (user_ids) AND balance_changes.user_id = sent.user_id
                          AND balance_changes.idempotency_key >= sent.key
                        ORDER BY balance_changes.user_id, balance_changes.idempotency_key
                        LIMIT 1
                   ) AS found
             WHERE sent.repeatable AND found.idempotency_key = sent.key
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

    IF cardinality(keys) = 1 THEN  -- what follows, for one change: statements that Citus sends straight on
        user_id := account;
        UPDATE users
           SET balance = users.balance + amounts[1],
               held = users.held + coalesce(hold_amounts[1], 0),
               version = users.version + 1
         WHERE users.id = account
           AND users.balance - users.held + amounts[1] - coalesce(hold_amounts[1], 0) >= users.minimum_balance
           AND users.balance + amounts[1] <= 9007199254740991
           AND users.held + coalesce(hold_amounts[1], 0) >= 0
        RETURNING users.balance - amounts[1], users.held - coalesce(hold_amounts[1], 0), users.minimum_balance, users.version
          INTO balance, held, minimum_balance, version;
        applied := FOUND;
        IF applied THEN
            INSERT INTO balance_changes (user_id, idempotency_key, amount, balance, version, reference, hold_amount, expires_at)
            VALUES (account, keys[1], amounts[1], balance + amounts[1], version, texts[1], hold_amounts[1],
                    now + make_interval(secs => lasting[1]));
            IF hold_amounts[1] > 0 THEN
                INSERT INTO open_holds (user_id, hold_id, amount, expires_at)
                VALUES (account, keys[1], hold_amounts[1], now + make_interval(secs => lasting[1]));
            ELSIF hold_amounts[1] < 0 THEN
                DELETE FROM open_holds WHERE open_holds.user_id = account AND open_holds.hold_id = hold_ids[1];
            END IF;
            decided_at := now;
            RETURN NEXT;
        ELSE
            SELECT users.balance, users.held, users.minimum_balance INTO balance, held, minimum_balance FROM users WHERE users.id = account;
            IF FOUND THEN RETURN NEXT; END IF;
        END IF;
        RETURN;
    END IF;

    SELECT array_agg(demand.user_id), array_agg(lowest), array_agg(highest), array_agg(moved), array_agg(holding), array_agg(count)
      INTO ids, lowests, highests, moveds, holdings, steps
      FROM (SELECT change.user_id, min(moved - holding)::bigint AS lowest, max(moved)::bigint AS highest, sum(change.amount)::bigint AS moved,
                   coalesce(sum(hold), 0)::bigint AS holding, count(*) AS count
              FROM (SELECT sent.*, sum(sent.amount) OVER so_far AS moved, coalesce(sum(sent.hold) OVER so_far, 0) AS holding
                      FROM unnest(user_ids, amounts, hold_amounts, replays) WITH ORDINALITY AS sent (user_id, amount, hold, replay, place)
                     WHERE sent.replay IS NOT TRUE
                    WINDOW so_far AS (PARTITION BY sent.user_id ORDER BY sent.place)) AS change
             GROUP BY change.user_id
             ORDER BY change.user_id) AS demand;

    WITH applied AS (
        UPDATE users
           SET balance = users.balance + demand.moved,
               held = users.held + demand.holding,
               version = users.version + demand.count
          FROM unnest(ids, lowests, highests, moveds, holdings, steps) AS demand (user_id, lowest, highest, moved, holding, count)
         -- Not a plain "=": that may be hashed, and rows taken in another order than demand's deadlock.
         WHERE users.id = ANY (ids) AND users.id = ANY (ARRAY[demand.user_id])
           AND users.balance - users.held + demand.lowest >= users.minimum_balance
           AND users.balance + demand.highest <= 9007199254740991
           AND users.held + demand.holding >= 0
        RETURNING users.id, users.balance, users.held, users.minimum_balance, users.version
    )
    SELECT coalesce(array_agg(id), '{}'), array_agg(applied.balance), array_agg(applied.held), array_agg(applied.minimum_balance),
           array_agg(applied.version)
      INTO done, balances, helds, minimums, versions
      FROM applied;

    INSERT INTO balance_changes (user_id, idempotency_key, amount, balance, version, reference, hold_amount, expires_at)
    SELECT sent.user_id, sent.key, sent.amount, account.balance - sum(sent.amount) OVER whole + sum(sent.amount) OVER so_far,
           account.version - count(*) OVER whole + row_number() OVER so_far, sent.reference, sent.hold,
           now + make_interval(secs => sent.seconds)
      FROM unnest(user_ids, keys, amounts, hold_amounts, lasting, texts, replays)
           WITH ORDINALITY AS sent (user_id, key, amount, hold, seconds, reference, replay, place)
      JOIN unnest(done, balances, versions) AS account (id, balance, version) ON account.id = sent.user_id
     WHERE sent.replay IS NOT TRUE
    WINDOW so_far AS (PARTITION BY sent.user_id ORDER BY sent.place), whole AS (PARTITION BY sent.user_id)
     ORDER BY sent.user_id, sent.place;  -- so that an account's rows have their times in its order

    RETURN QUERY
    SELECT NULL::bigint, account.id, true, account.balance - demand.moved, account.held - demand.holding, account.minimum,
           CASE WHEN hold_amounts IS NOT NULL THEN now END, NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::bigint[], NULL::text, NULL::text
      FROM unnest(done, balances, helds, minimums) AS account (id, balance, held, minimum)
      JOIN unnest(ids, moveds, holdings) AS demand (user_id, moved, holding) ON demand.user_id = account.id;
    IF cardinality(done) < cardinality(ids) THEN
        -- As they are now: on what this statement sees, which is younger than when it was sent.
        RETURN QUERY
        SELECT NULL::bigint, users.id, false, users.balance, users.held, users.minimum_balance, NULL::timestamptz,
               NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::bigint[], NULL::text, NULL::text
          FROM users
         WHERE users.id = ANY (ids) AND users.id <> ALL (done);
    END IF;

    IF hold_amounts IS NOT NULL THEN
        INSERT INTO open_holds (user_id, hold_id, amount, expires_at)
        SELECT sent.user_id, sent.key, sent.hold, now + make_interval(secs => sent.seconds)
          FROM unnest(user_ids, keys, hold_amounts, lasting, replays) AS sent (user_id, key, hold, seconds, replay)
         WHERE sent.hold > 0 AND sent.replay IS NOT TRUE AND sent.user_id IN (SELECT unnest(done));
        DELETE FROM open_holds
         USING unnest(user_ids, hold_amounts, hold_ids, replays) AS sent (user_id, hold, hold_id, replay)
         WHERE open_holds.user_id = ANY (ids)
           AND open_holds.user_id = ANY (ARRAY[sent.user_id]) AND open_holds.hold_id = ANY (ARRAY[sent.hold_id])
           AND sent.hold < 0 AND sent.replay IS NOT TRUE AND sent.user_id IN (SELECT unnest(done));
    END IF;
END
$$;

SELECT create_distributed_function(
    'apply_shard_changes(bigint, bigint[], text[], bigint[], bigint[], text[], integer[], text[], boolean[], text)', 'account',
    colocate_with := 'users'
);

-- In a schema of its own a function looks for its tables there, whatever the search path of its caller is.
DO $$
BEGIN
    IF current_schema() <> 'public' THEN
        EXECUTE format('ALTER FUNCTION apply_shard_changes SET search_path TO %I', current_schema());
    END IF;
END
$$;
