"""The schema of a test's database: with what Citus needs too, for its statement, on a PostgreSQL without Citus."""

import psycopg

from atomic_balance.postgres.migrations import migrate

STAND_IN = """
SET allow_system_table_mods = on;  -- Citus has its functions where every search path finds them
CREATE TABLE public.asked_of_citus (question text);
CREATE TABLE pg_catalog.pg_dist_shard (logicalrelid regclass, shardminvalue text);
CREATE FUNCTION pg_catalog.create_distributed_table(name regclass, distribution_column text,
    colocate_with text DEFAULT 'default', shard_count integer DEFAULT 8) RETURNS void LANGUAGE plpgsql
    AS $$
    BEGIN
        INSERT INTO public.asked_of_citus VALUES (format('%s by %s with %s', name, distribution_column, colocate_with));
        INSERT INTO pg_dist_shard
        SELECT name, -2147483648 + shard * (4294967296 / shard_count) FROM generate_series(0, shard_count - 1) AS shard;
        IF coalesce(current_setting('citus.multi_shard_modify_mode', true), '') <> 'sequential' THEN
            PERFORM set_config('tests.parallel', 'yes', true);
        END IF;
    END $$;
CREATE FUNCTION pg_catalog.create_distributed_function(name regprocedure, distribution_arg_name text,
    colocate_with text DEFAULT 'default') RETURNS void LANGUAGE plpgsql
    AS $$
    BEGIN
        IF current_setting('tests.parallel', true) = 'yes' THEN
            RAISE EXCEPTION 'cannot run function command because there was a parallel operation on a distributed table';
        END IF;
        INSERT INTO public.asked_of_citus
        VALUES (format('%s by %s with %s', name, distribution_arg_name, colocate_with));
    END $$;
"""
"""What the migrations ask of Citus: the questions are noted, and users is said to lie on eight shards.

As on a cluster, a function is not distributed in a transaction that has distributed a table, unless one by one.
"""


def make_schema(url: str) -> list[str]:
    """Make it in an empty database; gives the migrations that were applied."""
    with psycopg.connect(url) as connection:
        connection.execute(STAND_IN)
    return migrate(url, citus=True)
