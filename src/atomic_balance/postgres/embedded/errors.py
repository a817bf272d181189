"""What the embedded PostgreSQL raises."""


class EmbeddedPostgresError(Exception):
    """There can be no embedded PostgreSQL; the text says why and what helps."""
