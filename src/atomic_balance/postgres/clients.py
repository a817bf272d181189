"""PostgreSQL's own programs, psql and pg_dump, on the database of the service."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from psycopg import pq

from atomic_balance.postgres.embedded.programs import find_programs

CLIENTS = {"psql": "PostgreSQL's shell on the database", "pg_dump": "PostgreSQL's backup of the database"}
"""The programs, and what each is for."""


def run_client(name: str, arguments: Sequence[str], database_url: str, bin_dir: Path | None) -> int:
    """Run the program `name` of CLIENTS with `arguments` on this terminal, and give its exit status.

    It is found where the embedded PostgreSQL's programs are. Raises EmbeddedPostgresError where it is not;
    psycopg.Error where `database_url` is no URL that libpq takes; OSError.
    """
    program = find_programs(bin_dir, (name,)) / name
    # The URL goes in the environment, because everybody on the machine may read arguments, a password among them.
    environment = os.environ | _environment(database_url)
    with _interrupts_left_to_child():
        return subprocess.run([program, *arguments], env=environment, check=False).returncode


def _environment(database_url: str) -> dict[str, str]:
    """What a URL says, as the variables that libpq reads."""
    options = pq.Conninfo.parse(database_url.encode())
    return {one.envvar.decode(): one.val.decode() for one in options if one.envvar and one.val}


@contextlib.contextmanager
def _interrupts_left_to_child() -> Iterator[None]:
    """Ctrl-C cancels a query of psql's, and must not end the process that keeps the server for it."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
