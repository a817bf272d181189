-- Both tables are sharded by user, so that an account and its journal lie on one node, and the function runs beside them.
-- Eight shards suit two to four workers: a batch of many accounts costs a step per shard. For more workers choose more, here
-- or later with alter_distributed_table('users', shard_count := 32, cascade_to_colocated := true).
-- depends: 0001-apply-account

SET LOCAL citus.multi_shard_modify_mode TO 'sequential';  -- or the function, made after the tables, is refused

SELECT create_distributed_table('users', 'id', shard_count := 8);

SELECT create_distributed_table('balance_changes', 'user_id', colocate_with := 'users');

SELECT create_distributed_function(
    'apply_account(bigint, text[], bigint[], text[], boolean[], text)', 'account', colocate_with := 'users'
);
