-- Holds on Citus: open holds lie beside their account, and the function for one account's changes knows of them.
-- What apply_changes does, for the changes of one account: every statement names that account alone, so Citus runs it on the shard.
-- depends: 0002-distribute

SET LOCAL citus.multi_shard_modify_mode TO 'sequential';

SELECT create_distributed_table('open_holds', 'user_id', colocate_with := 'users');

CREATE FUNCTION apply_account_changes(
    account bigint, keys text[], amounts bigint[], hold_amounts bigint[], hold_ids text[], lasting integer[],
    texts text[], repeatables boolean[], lock_wait text,
    OUT "position" bigint, OUT user_id bigint, OUT applied boolean, OUT balance bigint, OUT held bigint, OUT minimum_balance bigint,
    OUT decided_at timestamptz, OUT amount bigint, OUT hold_amount bigint, OUT expires_at timestamptz, OUT payees bigint[],
    OUT reference text, OUT refusal text
) RETURNS SETOF record LANGUAGE plpgsql AS $$
DECLARE
    replayed bigint[] := '{}';
    steps bigint;
    moved bigint;
    holds bigint;
    lowest bigint;
    highest bigint;
    version_before bigint;
    now timestamptz := clock_timestamp();
    place bigint;
BEGIN
    PERFORM set_config('lock_timeout', lock_wait, true);
    user_id := account;
    IF repeatables IS NOT NULL THEN
        FOR "position", applied, balance, amount, hold_amount, expires_at, payees, reference, refusal IN
            SELECT sent.place, done.refusal IS NULL, done.balance, done.amount, done.hold_amount, done.expires_at, done.payees,
                   done.reference, done.refusal
              FROM unnest(keys, repeatables) WITH ORDINALITY AS sent (key, repeatable, place)
              JOIN balance_changes AS done ON done.idempotency_key = sent.key
             WHERE done.user_id = account
               AND sent.repeatable
        LOOP
            replayed := replayed || "position";
            RETURN NEXT;
        END LOOP;
        "position" := NULL; amount := NULL; hold_amount := NULL; expires_at := NULL; payees := NULL; reference := NULL; refusal := NULL;
    END IF;

    SELECT count(*), sum(sent.amount), coalesce(sum(sent.hold), 0), min(sent.freed), max(sent.moved)
      INTO steps, moved, holds, lowest, highest
      FROM (SELECT one.amount, one.hold, sum(one.amount) OVER so_far AS moved,
                   sum(one.amount - coalesce(one.hold, 0)) OVER so_far AS freed
              FROM unnest(amounts, hold_amounts) WITH ORDINALITY AS one (amount, hold, place)
             WHERE one.place <> ALL (replayed)
            WINDOW so_far AS (ORDER BY one.place)) AS sent;
    IF steps = 0 THEN
        RETURN;
    END IF;

    UPDATE users
       SET balance = users.balance + moved,
           held = users.held + holds,
           version = users.version + steps
     WHERE users.id = account
       AND users.balance - users.held + lowest >= users.minimum_balance
       AND users.balance + highest <= 9007199254740991
       AND users.held + holds >= 0
    RETURNING users.balance - moved, users.held - holds, users.minimum_balance, users.version - steps
      INTO balance, held, minimum_balance, version_before;
    applied := FOUND;
    IF applied AND cardinality(keys) = 1 THEN  -- the same as below, and the only INSERT that Citus sends straight on
        INSERT INTO balance_changes (user_id, idempotency_key, amount, balance, version, reference, hold_amount, expires_at)
        VALUES (account, keys[1], amounts[1], balance + moved, version_before + 1, texts[1], hold_amounts[1],
                now + make_interval(secs => lasting[1]));
    ELSIF applied THEN
        INSERT INTO balance_changes (user_id, idempotency_key, amount, balance, version, reference, hold_amount, expires_at)
        SELECT account, sent.key, sent.amount, balance + sum(sent.amount) OVER so_far,
               version_before + row_number() OVER so_far, sent.reference, sent.hold, now + make_interval(secs => sent.seconds)
          FROM unnest(keys, amounts, texts, hold_amounts, lasting)
               WITH ORDINALITY AS sent (key, amount, reference, hold, seconds, place)
         WHERE sent.place <> ALL (replayed)
        WINDOW so_far AS (ORDER BY sent.place);
    ELSE
        SELECT users.balance, users.held, users.minimum_balance
          INTO balance, held, minimum_balance
          FROM users
         WHERE users.id = account;
        IF FOUND THEN
            RETURN NEXT;
        END IF;
        RETURN;
    END IF;
    IF hold_amounts IS NOT NULL THEN
        FOR place IN SELECT generate_subscripts(keys, 1) LOOP
            IF hold_amounts[place] > 0 AND place <> ALL (replayed) THEN
                INSERT INTO open_holds (user_id, hold_id, amount, expires_at)
                VALUES (account, keys[place], hold_amounts[place], now + make_interval(secs => lasting[place]));
            ELSIF hold_amounts[place] < 0 AND place <> ALL (replayed) THEN
                DELETE FROM open_holds WHERE open_holds.user_id = account AND open_holds.hold_id = hold_ids[place];
            END IF;
        END LOOP;
    END IF;
    decided_at := now;
    RETURN NEXT;
END
$$;

SELECT create_distributed_function(
    'apply_account_changes(bigint, text[], bigint[], bigint[], text[], integer[], text[], boolean[], text)', 'account',
    colocate_with := 'users'
);
