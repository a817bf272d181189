DROP FUNCTION apply_transfers_between_shards(
    bigint[], bigint[], bigint[], text[], bigint[], bigint[], text[], integer[], text[], text[], boolean[], text
);
