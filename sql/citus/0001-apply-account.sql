-- What statements/apply_changes.sql does, for the changes of one account: as a function Citus sends it to the shard of the
-- account in one round trip, where a statement that inserts in a CTE is broken into steps. It runs on any PostgreSQL.
-- Its arrays are the account's changes in arrival order; it gives what apply_changes.sql gives.

CREATE FUNCTION apply_account(
    account bigint, keys text[], amounts bigint[], texts text[], repeatables boolean[], lock_wait text,
    OUT "position" bigint, OUT user_id bigint, OUT applied boolean, OUT balance bigint,
    OUT minimum_balance bigint, OUT amount bigint, OUT reference text, OUT refusal text
) RETURNS SETOF record LANGUAGE plpgsql AS $$
DECLARE
    replayed bigint[] := '{}';
    steps bigint;
    moved bigint;
    lowest bigint;
    highest bigint;
    version_before bigint;
BEGIN
    PERFORM set_config('lock_timeout', lock_wait, true);
    user_id := account;
    IF true = ANY (repeatables) THEN
        FOR "position", applied, balance, amount, reference, refusal IN
            SELECT sent.place, done.refusal IS NULL, done.balance, done.amount, done.reference, done.refusal
              FROM unnest(keys, repeatables) WITH ORDINALITY AS sent (key, repeatable, place)
              JOIN balance_changes AS done ON done.idempotency_key = sent.key
             WHERE done.user_id = account
               AND sent.repeatable
        LOOP
            replayed := replayed || "position";
            RETURN NEXT;
        END LOOP;
        "position" := NULL; amount := NULL; reference := NULL; refusal := NULL;
    END IF;

    SELECT count(*), sum(sent.amount), min(sent.running), max(sent.running)
      INTO steps, moved, lowest, highest
      FROM (SELECT one.amount, sum(one.amount) OVER (ORDER BY one.place) AS running
              FROM unnest(amounts) WITH ORDINALITY AS one (amount, place)
             WHERE one.place <> ALL (replayed)) AS sent;
    IF steps = 0 THEN
        RETURN;
    END IF;

    UPDATE users
       SET balance = users.balance + moved,
           version = users.version + steps
     WHERE users.id = account
       AND users.balance + lowest >= users.minimum_balance
       AND users.balance + highest <= 9007199254740991
    RETURNING users.balance - moved, users.minimum_balance, users.version - steps
      INTO balance, minimum_balance, version_before;
    applied := FOUND;
    IF applied AND cardinality(keys) = 1 THEN  -- the same as below, and the only INSERT that Citus sends straight on
        INSERT INTO balance_changes (user_id, idempotency_key, amount, balance, version, reference)
        VALUES (account, keys[1], amounts[1], balance + moved, version_before + 1, texts[1]);
    ELSIF applied THEN
        INSERT INTO balance_changes (user_id, idempotency_key, amount, balance, version, reference)
        SELECT account, sent.key, sent.amount, balance + sum(sent.amount) OVER so_far,
               version_before + row_number() OVER so_far, sent.reference
          FROM unnest(keys, amounts, texts) WITH ORDINALITY AS sent (key, amount, reference, place)
         WHERE sent.place <> ALL (replayed)
        WINDOW so_far AS (ORDER BY sent.place);
    ELSE
        SELECT users.balance, users.minimum_balance
          INTO balance, minimum_balance
          FROM users
         WHERE users.id = account;
        IF NOT FOUND THEN
            RETURN;
        END IF;
    END IF;
    RETURN NEXT;
END
$$;
