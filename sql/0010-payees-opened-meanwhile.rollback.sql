DO $migration$
DECLARE
    function text := pg_get_functiondef('apply_transfers'::regproc);
    twice text := $part$
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
$part$;
    once text := $part$
    unpayable := '{}';
    verdict := 'no payee';
    balance := NULL;
    FOR "set", user_id IN
        SELECT sent.no, sent.account
          FROM unnest(sets, owners, accounts) AS sent (no, owner, account)
         WHERE sent.account <> sent.owner AND sent.no <> ALL (replayed)
           AND NOT EXISTS (SELECT FROM users WHERE users.id = ANY (ARRAY[sent.account]))
    LOOP
        unpayable := unpayable || "set";
        RETURN NEXT;
    END LOOP;
$part$;
BEGIN
    EXECUTE replace(function, once, twice);
END
$migration$;
