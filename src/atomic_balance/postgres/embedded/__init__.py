"""A private, real PostgreSQL for when no DATABASE_URL is given.

The server listens on a unix socket alone, which is in the directory of its data. It dies with the process that started
it (Linux), so no server is ever left behind; its data stay. Several processes share one server, and when it has gone,
the first of them to notice starts it again.
"""

from atomic_balance.postgres.embedded.errors import EmbeddedPostgresError
from atomic_balance.postgres.embedded.keeper import embedded_postgres
from atomic_balance.postgres.embedded.programs import find_programs

__all__ = ["EmbeddedPostgresError", "embedded_postgres", "find_programs"]
