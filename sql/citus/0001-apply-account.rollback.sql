DROP FUNCTION apply_account(bigint, text[], bigint[], text[], boolean[], text);
