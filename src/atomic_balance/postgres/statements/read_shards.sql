-- The shards of users, by the least hash that lies on each.
SELECT shardminvalue::integer
  FROM pg_catalog.pg_dist_shard
 WHERE logicalrelid = '{schema}users'::regclass
 ORDER BY 1
