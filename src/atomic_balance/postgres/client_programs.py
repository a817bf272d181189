"""PostgreSQL's own client programs, run on the database of the service."""

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from psycopg.pq import Conninfo

from atomic_balance.postgres.embedded import EmbeddedPostgresError, find_programs


def run_client_program(
    name: str, arguments: Sequence[str], database_url: str, schema: str | None, bin_dir: Path | None
) -> int:
    """Run `psql` or `pg_dump` to its end, and give its exit status.

    It is that of the embedded PostgreSQL, or of `bin_dir`, if there is one, or else the one on PATH. It connects to
    `database_url` unless its arguments say otherwise. `schema`: where psql looks first, and all that pg_dump dumps.
    Raises EmbeddedPostgresError if there is no such program.
    """
    program = _find(name, bin_dir)
    if name == "pg_dump" and schema:
        arguments = [f"--schema={schema}", *arguments]
    before = signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the program
    try:
        return subprocess.run(
            [program, *arguments], env={**os.environ, **_environment(database_url, schema)}, check=False
        ).returncode
    finally:
        signal.signal(signal.SIGINT, before)


def _find(name: str, bin_dir: Path | None) -> str:
    try:
        places = [str(find_programs(bin_dir))]
    except EmbeddedPostgresError:
        places = []
    program = shutil.which(name, path=os.pathsep.join([*places, os.environ.get("PATH", "")]))
    if program is None:
        raise EmbeddedPostgresError(f"{name} is not there (Debian: apt-get install postgresql-client)")
    return program


def _environment(database_url: str, schema: str | None) -> Mapping[str, str]:
    """The variables in which libpq is told what `database_url` says: an argument could be read by other users."""
    given = {
        option.envvar.decode(): option.val.decode()
        for option in Conninfo.parse(database_url.encode())
        if option.envvar and option.val
    }
    return {**given, "PGOPTIONS": f"-c search_path={schema}"} if schema else given
