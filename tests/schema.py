"""The schema of a test's database: with what Citus needs too, for its statement, on a PostgreSQL without Citus."""

import psycopg

from atomic_balance.postgres.migrations import migrate

STAND_IN = """
SET allow_system_table_mods = on;  -- Citus has its functions where every search path finds them
CREATE TABLE public.asked_of_citus (question text);
CREATE FUNCTION pg_catalog.create_distributed_table(name regclass, distribution_column text,
    colocate_with text DEFAULT 'default', shard_count integer DEFAULT NULL) RETURNS void LANGUAGE sql
    AS $$
    INSERT INTO public.asked_of_citus VALUES (format('%s by %s with %s', name, distribution_column, colocate_with));
    $$;
CREATE FUNCTION pg_catalog.create_distributed_function(name regprocedure, distribution_arg_name text,
    colocate_with text DEFAULT 'default') RETURNS void LANGUAGE sql
    AS $$
    INSERT INTO public.asked_of_citus VALUES (format('%s by %s with %s', name, distribution_arg_name, colocate_with));
    $$;
"""
"""What the migrations ask of Citus; here the questions are only noted."""


def make_schema(url: str) -> list[str]:
    """Make it in an empty database; gives the migrations that were applied."""
    with psycopg.connect(url) as connection:
        connection.execute(STAND_IN)
    return migrate(url, citus=True)
