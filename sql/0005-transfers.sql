-- Transfers: a change of one account, its payer, that credits others, its payees, in the same statement.
-- The payer's row of the journal says whom it paid (payees), each payee's row by whom (payer). Batches without a transfer go on taking apply_changes.
-- depends: 0004-holds-checked

SET LOCAL lock_timeout = '2s';  -- behind a long transaction, give up rather than hold up everybody

ALTER TABLE balance_changes ADD COLUMN payer bigint;

COMMENT ON COLUMN balance_changes.payees IS 'of a payer''s row: each payee''s id and amount, by id, one after the other; null for what moves one account';
COMMENT ON COLUMN balance_changes.payer IS 'of a payee''s row: who paid; its idempotency_key is made of the payer and the payer''s key';

-- Apply a batch with transfers: of each owner all of its sets or none. A set is a change of its owner, and its credits of others.
-- One element per leg: a set's own first, then its credits; an owner's sets in arrival order, at most 1,000 legs. An account that is
-- credited owns nothing in the same batch (the caller sees to that), so that no debit counts on a credit that may be taken back.
-- sets: which legs belong together, from 1 on; owners: whose set it is; accounts: whom the leg moves. keys: of a credit, made of the payer
-- and its key. pays: of an owner's leg, whom its set credits, as the journal has it (as text: arrays of arrays can't be unnested).
-- repeatables: of an owner's leg, if the journal may hold its key. An array of which no leg makes use may be null. The rest as
-- apply_changes takes it.
-- Gives a row for each set that the journal holds ('replayed', with what was recorded); for each owner of whom everything else was applied
-- ('applied', with the balance and what was held before, at decided_at), or nothing ('not applied', as they are now; no row: no such
-- user); for each credit that was applied, now or then ('credited', with the payee's balance right after it); and for each that kept its
-- set from being applied: 'no payee', or 'payee full' if not all that the batch brings fits (with the balance: judge each by itself on that).
CREATE FUNCTION apply_transfers(
    sets bigint[], owners bigint[], accounts bigint[], keys text[], amounts bigint[], hold_amounts bigint[], hold_ids text[],
    lasting integer[], texts text[], pays text[], repeatables boolean[], lock_wait text,
    OUT "set" bigint, OUT user_id bigint, OUT verdict text, OUT balance bigint, OUT held bigint, OUT minimum_balance bigint,
    OUT decided_at timestamptz, OUT amount bigint, OUT hold_amount bigint, OUT expires_at timestamptz, OUT payees bigint[],
    OUT reference text, OUT refusal text
) RETURNS SETOF record LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    replayed bigint[] := '{}';  -- sets
    unpayable bigint[];         -- sets with a payee that does not exist
    wanted bigint;              -- how many accounts are to be moved
    moved bigint[];             -- those whose condition held
    failed bigint[] := '{}';    -- owners of whom nothing is applied
    now timestamptz := clock_timestamp();
BEGIN
    -- For this statement alone. No table is read as a whole: a plan that was made while one was empty would, long after.
    lock_wait := set_config('lock_timeout', lock_wait, true) || set_config('enable_seqscan', 'off', true)
                 || set_config('plan_cache_mode', 'force_generic_plan', true);  -- for a lone transfer planning would take most of the time
    IF repeatables IS NOT NULL THEN
        FOR "set", user_id, balance, amount, hold_amount, expires_at, payees, reference, refusal IN
            SELECT sent.no, done.user_id, done.balance, done.amount, done.hold_amount, done.expires_at, done.payees, done.reference, done.refusal
              FROM unnest(sets, accounts, keys, repeatables) AS sent (no, account, key, repeatable)
              -- Not a plain "=": planned while the journal was small, it would read all of the journal.
              JOIN balance_changes AS done
                ON done.user_id = ANY (ARRAY[sent.account]) AND done.idempotency_key = ANY (ARRAY[sent.key])
             WHERE sent.repeatable
        LOOP
            replayed := replayed || "set";
            verdict := 'replayed';
            RETURN NEXT;
        END LOOP;
        "set" := NULL; amount := NULL; hold_amount := NULL; expires_at := NULL; payees := NULL; reference := NULL; refusal := NULL;
        IF replayed <> '{}' THEN
            RETURN QUERY
            SELECT sent.no, sent.account, 'credited', done.balance, NULL::bigint, NULL::bigint, NULL::timestamptz,
                   NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::bigint[], NULL::text, NULL::text
              FROM unnest(sets, owners, accounts, keys) AS sent (no, owner, account, key)
              JOIN balance_changes AS done
                ON done.user_id = ANY (ARRAY[sent.account]) AND done.idempotency_key = ANY (ARRAY[sent.key])
             WHERE sent.no IN (SELECT unnest(replayed)) AND sent.account <> sent.owner;
        END IF;
    END IF;

    -- Accounts are never closed, so what is missing can be left out before anything is locked.
    unpayable := ARRAY(
        SELECT sent.no
          FROM unnest(sets, owners, accounts) AS sent (no, owner, account)
         WHERE sent.account <> sent.owner AND NOT EXISTS (SELECT FROM users WHERE users.id = ANY (ARRAY[sent.account]))
    );
    IF unpayable <> '{}' THEN
        RETURN QUERY
        SELECT sent.no, sent.account, 'no payee', NULL::bigint, NULL::bigint, NULL::bigint, NULL::timestamptz,
               NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::bigint[], NULL::text, NULL::text
          FROM unnest(sets, owners, accounts) AS sent (no, owner, account)
         WHERE sent.no IN (SELECT unnest(unpayable) EXCEPT SELECT unnest(replayed))
           AND sent.account <> sent.owner AND NOT EXISTS (SELECT FROM users WHERE users.id = ANY (ARRAY[sent.account]));
    END IF;
    IF replayed || unpayable <> '{}' THEN  -- go on with the others
        SELECT array_agg(no ORDER BY place), array_agg(owner ORDER BY place), array_agg(account ORDER BY place), array_agg(key ORDER BY place),
               array_agg(sent.amount ORDER BY place), array_agg(hold ORDER BY place) FILTER (WHERE hold_amounts IS NOT NULL),
               array_agg(hold_id ORDER BY place), array_agg(seconds ORDER BY place), array_agg(sent.reference ORDER BY place),
               array_agg(pay ORDER BY place)
          INTO sets, owners, accounts, keys, amounts, hold_amounts, hold_ids, lasting, texts, pays
          FROM unnest(sets, owners, accounts, keys, amounts, hold_amounts, hold_ids, lasting, texts, pays)
               WITH ORDINALITY AS sent (no, owner, account, key, amount, hold, hold_id, seconds, reference, pay, place)
         WHERE no NOT IN (SELECT unnest(replayed || unpayable));
        IF sets IS NULL THEN
            RETURN;
        END IF;
    END IF;

    WITH leg AS (
        SELECT sent.*, sum(sent.amount) OVER so_far AS moved, sum(sent.amount - coalesce(sent.hold, 0)) OVER so_far AS freed
          FROM unnest(accounts, amounts, hold_amounts) WITH ORDINALITY AS sent (account, amount, hold, place)
        WINDOW so_far AS (PARTITION BY sent.account ORDER BY sent.place)
         ORDER BY account, place
    ), demand AS MATERIALIZED (
        SELECT account, min(freed)::bigint AS lowest, max(moved)::bigint AS highest, sum(leg.amount)::bigint AS moved,
               coalesce(sum(hold), 0)::bigint AS holds, count(*) AS steps
          FROM leg
         GROUP BY account
         ORDER BY account
    ), done AS (
        UPDATE users
           SET balance = users.balance + demand.moved,
               held = users.held + demand.holds,
               version = users.version + demand.steps
          FROM demand
         -- Not a plain "=": that may be hashed, and rows taken in another order than demand's deadlock.
         WHERE users.id = ANY (ARRAY[demand.account])
           AND users.balance - users.held + demand.lowest >= users.minimum_balance
           AND users.balance + demand.highest <= 9007199254740991
           AND users.held + demand.holds >= 0  -- or another session has just settled a hold: send again
        RETURNING users.id
    )
    SELECT (SELECT count(*) FROM demand), coalesce(array_agg(id), '{}') INTO wanted, moved FROM done;

    IF cardinality(moved) < wanted THEN
        failed := ARRAY(
            SELECT DISTINCT owner
              FROM unnest(owners, accounts) AS sent (owner, account)
             WHERE account NOT IN (SELECT unnest(moved))
        );
        -- Take back what their sets did to accounts that this transaction has changed, and so holds: nobody has seen it.
        UPDATE users
           SET balance = users.balance - back.moved,
               held = users.held - back.holds,
               version = users.version - back.steps
          FROM (SELECT account, sum(sent.amount)::bigint AS moved, coalesce(sum(hold), 0)::bigint AS holds, count(*) AS steps
                  FROM unnest(owners, accounts, amounts, hold_amounts) AS sent (owner, account, amount, hold)
                 WHERE owner IN (SELECT unnest(failed)) AND account IN (SELECT unnest(moved))
                 GROUP BY account) AS back
         WHERE users.id = ANY (ARRAY[back.account]);
        RETURN QUERY
        SELECT NULL::bigint, users.id, 'not applied', users.balance, users.held, users.minimum_balance, NULL::timestamptz,
               NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::bigint[], NULL::text, NULL::text
          FROM users
         WHERE users.id = ANY (failed);
        RETURN QUERY
        SELECT sent.no, users.id, 'payee full', users.balance, NULL::bigint, NULL::bigint, NULL::timestamptz,
               NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::bigint[], NULL::text, NULL::text
          FROM unnest(sets, owners, accounts) AS sent (no, owner, account)
          JOIN users ON users.id = ANY (ARRAY[sent.account])
         WHERE sent.account <> sent.owner AND sent.account NOT IN (SELECT unnest(moved));
    END IF;

    RETURN QUERY
    WITH leg AS MATERIALIZED (
        SELECT sent.*, sum(sent.amount) OVER so_far AS upto, row_number() OVER so_far AS step, sum(sent.amount) OVER whole AS total,
               count(*) OVER whole AS steps, coalesce(sum(sent.hold) OVER whole, 0) AS holds
          FROM unnest(sets, owners, accounts, keys, amounts, hold_amounts, lasting, texts, pays)
               WITH ORDINALITY AS sent (no, owner, account, key, amount, hold, seconds, reference, pay, place)
         WHERE sent.owner NOT IN (SELECT unnest(failed))
        WINDOW so_far AS (PARTITION BY sent.account ORDER BY sent.place), whole AS (PARTITION BY sent.account)
    ), journal AS (
        INSERT INTO balance_changes (user_id, idempotency_key, amount, balance, version, reference, hold_amount, expires_at, payees, payer)
        SELECT leg.account, leg.key, leg.amount, users.balance - leg.total + leg.upto, users.version - leg.steps + leg.step,
               leg.reference, leg.hold, now + make_interval(secs => leg.seconds),
               leg.pay::bigint[], CASE WHEN leg.account <> leg.owner THEN leg.owner END
          FROM leg
          JOIN users ON users.id = ANY (ARRAY[leg.account])
         ORDER BY leg.account, leg.place  -- so that an account's rows have their times in its order
    )
    SELECT CASE WHEN leg.account <> leg.owner THEN leg.no END, leg.account,
           CASE WHEN leg.account = leg.owner THEN 'applied' ELSE 'credited' END,
           (users.balance - leg.total + CASE WHEN leg.account = leg.owner THEN 0 ELSE leg.upto END)::bigint,
           (users.held - leg.holds)::bigint, users.minimum_balance, CASE WHEN hold_amounts IS NOT NULL THEN now END,
           NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::bigint[], NULL::text, NULL::text
      FROM leg
      JOIN users ON users.id = ANY (ARRAY[leg.account])
     WHERE leg.step = 1 OR leg.account <> leg.owner;

    IF hold_amounts IS NOT NULL THEN
        INSERT INTO open_holds (user_id, hold_id, amount, expires_at)
        SELECT sent.account, sent.key, sent.hold, now + make_interval(secs => sent.seconds)
          FROM unnest(owners, accounts, keys, hold_amounts, lasting) AS sent (owner, account, key, hold, seconds)
         WHERE sent.hold > 0 AND sent.owner NOT IN (SELECT unnest(failed));
        DELETE FROM open_holds
         USING unnest(owners, accounts, hold_amounts, hold_ids) AS sent (owner, account, hold, hold_id)
         -- Not a plain "=", as above.
         WHERE open_holds.user_id = ANY (ARRAY[sent.account]) AND open_holds.hold_id = ANY (ARRAY[sent.hold_id])
           AND sent.hold < 0 AND sent.owner NOT IN (SELECT unnest(failed));
    END IF;
END
$$;
