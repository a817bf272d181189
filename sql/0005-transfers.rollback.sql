DROP FUNCTION apply_transfers(bigint[], bigint[], bigint[], text[], bigint[], bigint[], text[], integer[], text[], text[], boolean[], text);

ALTER TABLE balance_changes DROP COLUMN payer;
