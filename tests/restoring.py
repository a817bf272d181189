"""A backup and its restore, by PostgreSQL's own programs."""

import subprocess

from atomic_balance.postgres.embedded.programs import find_programs


def dump(url: str) -> bytes:
    """What pg_dump gives of a database."""
    command = (find_programs(None) / "pg_dump", "--dbname", url)
    return subprocess.run(command, capture_output=True, check=True).stdout


def restore(dumped: bytes, url: str) -> None:
    """Put what `dump` gave into an empty database."""
    command = (find_programs(None) / "psql", "--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1", "--dbname", url)
    done = subprocess.run(command, input=dumped, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
