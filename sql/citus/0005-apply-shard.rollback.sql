DROP FUNCTION apply_shard_changes(bigint, bigint[], text[], bigint[], bigint[], text[], integer[], text[], boolean[], text);
