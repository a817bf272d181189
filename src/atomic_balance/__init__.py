"""A balance per user in PostgreSQL that is never wrong, at any concurrency."""
