-- Transfers on a cluster: what apply_transfers does, in statements that Citus runs from the coordinator, each on the shards of the batch alone.
-- depends: 0005-apply-shard

-- It takes and gives what apply_transfers does.
CREATE FUNCTION apply_transfers_between_shards(
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
    known bigint[];             -- accounts that exist
    ids bigint[];               -- those that are to be moved, and what is asked of each
    lowests bigint[];
    highests bigint[];
    moveds bigint[];
    holdings bigint[];
    steps bigint[];
    moved bigint[];             -- those whose condition held, and what they have then
    balances bigint[];
    helds bigint[];
    minimums bigint[];
    versions bigint[];
    failed bigint[] := '{}';    -- owners of whom nothing is applied
    now timestamptz := clock_timestamp();
BEGIN
    -- It reaches this node; the others have that of the role.
    lock_wait := set_config('lock_timeout', lock_wait, true) || set_config('jit', 'off', true);
    IF repeatables IS NOT NULL THEN
        FOR "set", user_id, balance, amount, hold_amount, expires_at, payees, reference, refusal IN
            SELECT sent.no, found.user_id, found.balance, found.amount, found.hold_amount, found.expires_at, found.payees, found.reference,
                   found.refusal
              FROM unnest(sets, accounts, keys, repeatables) AS sent (no, account, key, repeatable)
              JOIN balance_changes AS found
                ON found.user_id = ANY (ARRAY[sent.account]) AND found.idempotency_key = ANY (ARRAY[sent.key])
             WHERE sent.repeatable AND found.user_id = ANY (owners)
        LOOP
            replayed := replayed || "set";
            verdict := 'replayed';
            RETURN NEXT;
        END LOOP;
        "set" := NULL; amount := NULL; hold_amount := NULL; expires_at := NULL; payees := NULL; reference := NULL; refusal := NULL;
        IF replayed <> '{}' THEN
            RETURN QUERY
            SELECT sent.no, sent.account, 'credited', found.balance, NULL::bigint, NULL::bigint, NULL::timestamptz,
                   NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::bigint[], NULL::text, NULL::text
              FROM unnest(sets, owners, accounts, keys) AS sent (no, owner, account, key)
              JOIN balance_changes AS found
                ON found.user_id = ANY (ARRAY[sent.account]) AND found.idempotency_key = ANY (ARRAY[sent.key])
             WHERE sent.no = ANY (replayed) AND sent.account <> sent.owner AND found.user_id = ANY (accounts);
        END IF;
    END IF;

    -- Accounts are never closed, so what is missing can be left out before anything is locked.
    known := ARRAY(SELECT users.id FROM users WHERE users.id = ANY (accounts));
    unpayable := ARRAY(
        SELECT sent.no
          FROM unnest(sets, owners, accounts) AS sent (no, owner, account)
         WHERE sent.account <> sent.owner AND sent.account NOT IN (SELECT unnest(known))
    );
    RETURN QUERY
    SELECT sent.no, sent.account, 'no payee', NULL::bigint, NULL::bigint, NULL::bigint, NULL::timestamptz,
           NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::bigint[], NULL::text, NULL::text
      FROM unnest(sets, owners, accounts) AS sent (no, owner, account)
     WHERE sent.no = ANY (unpayable) AND sent.no <> ALL (replayed)
       AND sent.account <> sent.owner AND sent.account NOT IN (SELECT unnest(known));
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

    SELECT array_agg(account), array_agg(lowest), array_agg(highest), array_agg(total), array_agg(holding), array_agg(count)
      INTO ids, lowests, highests, moveds, holdings, steps
      FROM (SELECT account, min(freed)::bigint AS lowest, max(upto)::bigint AS highest, sum(leg.amount)::bigint AS total,
                   coalesce(sum(hold), 0)::bigint AS holding, count(*) AS count
              FROM (SELECT sent.*, sum(sent.amount) OVER so_far AS upto, sum(sent.amount - coalesce(sent.hold, 0)) OVER so_far AS freed
                      FROM unnest(accounts, amounts, hold_amounts) WITH ORDINALITY AS sent (account, amount, hold, place)
                    WINDOW so_far AS (PARTITION BY sent.account ORDER BY sent.place)) AS leg
             GROUP BY account
             ORDER BY account) AS demand;
    WITH done AS (
        UPDATE users
           SET balance = users.balance + demand.total,
               held = users.held + demand.holding,
               version = users.version + demand.count
          FROM unnest(ids, lowests, highests, moveds, holdings, steps) AS demand (account, lowest, highest, total, holding, count)
         -- Not a plain "=": that may be hashed, and rows taken in another order than demand's deadlock.
         WHERE users.id = ANY (ids) AND users.id = ANY (ARRAY[demand.account])
           AND users.balance - users.held + demand.lowest >= users.minimum_balance
           AND users.balance + demand.highest <= 9007199254740991
           AND users.held + demand.holding >= 0  -- or another session has just settled a hold: send again
        RETURNING users.id, users.balance, users.held, users.minimum_balance, users.version
    )
    SELECT coalesce(array_agg(id), '{}'), array_agg(done.balance), array_agg(done.held), array_agg(done.minimum_balance), array_agg(done.version)
      INTO moved, balances, helds, minimums, versions
      FROM done;

    IF cardinality(moved) < cardinality(ids) THEN
        failed := ARRAY(
            SELECT DISTINCT owner
              FROM unnest(owners, accounts) AS sent (owner, account)
             WHERE account NOT IN (SELECT unnest(moved))
        );
        -- Take back what their sets did to accounts that this transaction has changed, and so holds: nobody has seen it.
        SELECT array_agg(account), array_agg(total), array_agg(holding), array_agg(count)
          INTO ids, moveds, holdings, steps
          FROM (SELECT account, sum(sent.amount)::bigint AS total, coalesce(sum(hold), 0)::bigint AS holding, count(*) AS count
                  FROM unnest(owners, accounts, amounts, hold_amounts) AS sent (owner, account, amount, hold)
                 WHERE owner IN (SELECT unnest(failed)) AND account IN (SELECT unnest(moved))
                 GROUP BY account) AS back;
        IF ids IS NOT NULL THEN
            UPDATE users
               SET balance = users.balance - back.total,
                   held = users.held - back.holding,
                   version = users.version - back.count
              FROM unnest(ids, moveds, holdings, steps) AS back (account, total, holding, count)
             WHERE users.id = ANY (ids) AND users.id = ANY (ARRAY[back.account]);
        END IF;
        SELECT array_agg(users.id), array_agg(users.balance), array_agg(users.held), array_agg(users.minimum_balance), array_agg(users.version)
          INTO known, balances, helds, minimums, versions
          FROM users
         WHERE users.id = ANY (accounts);
        RETURN QUERY
        SELECT NULL::bigint, account.id, 'not applied', account.balance, account.held, account.minimum, NULL::timestamptz,
               NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::bigint[], NULL::text, NULL::text
          FROM unnest(known, balances, helds, minimums) AS account (id, balance, held, minimum)
         WHERE account.id IN (SELECT unnest(failed));
        RETURN QUERY
        SELECT sent.no, account.id, 'payee full', account.balance, NULL::bigint, NULL::bigint, NULL::timestamptz,
               NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::bigint[], NULL::text, NULL::text
          FROM unnest(sets, owners, accounts) AS sent (no, owner, account)
          JOIN unnest(known, balances) AS account (id, balance) ON account.id = sent.account
         WHERE sent.account <> sent.owner AND sent.account NOT IN (SELECT unnest(moved));
        moved := known;
    END IF;

    INSERT INTO balance_changes (user_id, idempotency_key, amount, balance, version, reference, hold_amount, expires_at, payees, payer)
    SELECT sent.account, sent.key, sent.amount, account.balance - sum(sent.amount) OVER whole + sum(sent.amount) OVER so_far,
           account.version - count(*) OVER whole + row_number() OVER so_far, sent.reference, sent.hold,
           now + make_interval(secs => sent.seconds), sent.pay::bigint[], CASE WHEN sent.account <> sent.owner THEN sent.owner END
      FROM unnest(owners, accounts, keys, amounts, hold_amounts, lasting, texts, pays)
           WITH ORDINALITY AS sent (owner, account, key, amount, hold, seconds, reference, pay, place)
      JOIN unnest(moved, balances, versions) AS account (id, balance, version) ON account.id = sent.account
     WHERE sent.owner NOT IN (SELECT unnest(failed))
    WINDOW so_far AS (PARTITION BY sent.account ORDER BY sent.place), whole AS (PARTITION BY sent.account)
     ORDER BY sent.account, sent.place;  -- so that an account's rows have their times in its order

    RETURN QUERY
    SELECT CASE WHEN leg.account <> leg.owner THEN leg.no END, leg.account,
           CASE WHEN leg.account = leg.owner THEN 'applied' ELSE 'credited' END,
           (leg.balance - leg.total + CASE WHEN leg.account = leg.owner THEN 0 ELSE leg.upto END)::bigint,
           (leg.held - leg.holding)::bigint, leg.minimum, CASE WHEN hold_amounts IS NOT NULL THEN now END,
           NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::bigint[], NULL::text, NULL::text
      FROM (SELECT sent.no, sent.owner, sent.account, account.balance, account.held, account.minimum, row_number() OVER so_far AS step,
                   sum(sent.amount) OVER so_far AS upto, sum(sent.amount) OVER whole AS total, coalesce(sum(sent.hold) OVER whole, 0) AS holding
              FROM unnest(sets, owners, accounts, amounts, hold_amounts) WITH ORDINALITY AS sent (no, owner, account, amount, hold, place)
              JOIN unnest(moved, balances, helds, minimums) AS account (id, balance, held, minimum) ON account.id = sent.account
             WHERE sent.owner NOT IN (SELECT unnest(failed))
            WINDOW so_far AS (PARTITION BY sent.account ORDER BY sent.place), whole AS (PARTITION BY sent.account)) AS leg
     WHERE leg.step = 1 OR leg.account <> leg.owner;

    IF hold_amounts IS NOT NULL THEN
        INSERT INTO open_holds (user_id, hold_id, amount, expires_at)
        SELECT sent.account, sent.key, sent.hold, now + make_interval(secs => sent.seconds)
          FROM unnest(owners, accounts, keys, hold_amounts, lasting) AS sent (owner, account, key, hold, seconds)
         WHERE sent.hold > 0 AND sent.owner NOT IN (SELECT unnest(failed));
        DELETE FROM open_holds
         USING unnest(owners, accounts, hold_amounts, hold_ids) AS sent (owner, account, hold, hold_id)
         WHERE open_holds.user_id = ANY (accounts)
           AND open_holds.user_id = ANY (ARRAY[sent.account]) AND open_holds.hold_id = ANY (ARRAY[sent.hold_id])
           AND sent.hold < 0 AND sent.owner NOT IN (SELECT unnest(failed));
    END IF;
END
$$;

-- In a schema of its own a function looks for its tables there, whatever the search path of its caller is.
DO $$
BEGIN
    IF current_schema() <> 'public' THEN
        EXECUTE format('ALTER FUNCTION apply_transfers_between_shards SET search_path TO %I', current_schema());
    END IF;
END
$$;
