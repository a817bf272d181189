"""The schema of a test's database: with what Citus needs too, for its statement, on a PostgreSQL without Citus."""

import psycopg

from atomic_balance.postgres.migrations import migrate

# What the migrations ask of Citus; here the questions are only noted.
_CITUS = """
CREATE TABLE asked_of_citus (question text);
CREATE FUNCTION create_distributed_table(name regclass, distribution_column text,
    colocate_with text DEFAULT 'default', shard_count integer DEFAULT NULL) RETURNS void LANGUAGE sql
    AS $$ INSERT INTO asked_of_citus VALUES (format('%s by %s with %s', name, distribution_column, colocate_with)) $$;
CREATE FUNCTION create_distributed_function(name regprocedure, distribution_arg_name text,
    colocate_with text DEFAULT 'default') RETURNS void LANGUAGE sql
    AS $$ INSERT INTO asked_of_citus VALUES (format('%s by %s with %s', name, distribution_arg_name, colocate_with)) $$;
"""


def make_schema(url: str) -> list[str]:
    """Make it in an empty database; gives the migrations that were applied."""
    with psycopg.connect(url) as connection:
        connection.execute(_CITUS)
    return migrate(url, citus=True)
