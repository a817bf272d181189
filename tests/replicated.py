"""A PostgreSQL server and a streaming standby of it, each with a URL of its own, to be promoted when the first dies."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict

from atomic_balance.postgres.embedded import embedded_postgres
from tests.killable import KillableServer, killable_server, sockets_for_the_servers_user


class Pair:
    """A primary to be killed, and its standby. `url` names both, and asks for the one that takes changes."""

    def __init__(self, primary: KillableServer, standby_url: str) -> None:
        self.primary = primary
        self.standby_url = standby_url
        sockets = [conninfo_to_dict(url)["host"] for url in (primary.url, standby_url)]
        self.url = f"postgresql://postgres@/postgres?host={','.join(map(str, sockets))}&target_session_attrs=read-write"

    def promote(self) -> None:
        """Kill the primary, for good, and let the standby take its place."""
        self.primary.kill()
        with psycopg.connect(self.standby_url, autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")


@contextlib.contextmanager
def replicated(directory: Path, synchronous: bool) -> Iterator[Pair]:
    """Run the pair, with the current schema; `synchronous`: a commit is answered when the standby has it on disk."""
    with killable_server(directory / "primary") as primary:
        _copy(primary.url, directory)
        with embedded_postgres(directory / "standby") as standby_url:
            with psycopg.connect(primary.url, autocommit=True) as connection:
                if synchronous:
                    connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
                    connection.execute("SELECT pg_reload_conf()")
                wanted = "sync" if synchronous else "async"
                while connection.execute("SELECT sync_state FROM pg_stat_replication").fetchall() != [(wanted,)]:
                    connection.execute("SELECT pg_sleep(0.05)")
            yield Pair(primary, standby_url)


def _copy(url: str, directory: Path) -> None:
    """Take a base backup (PostgreSQL's low-level way: no program has to be run as the server's user) of a standby."""
    (cluster,) = (directory / "primary").glob("postgres-*/")
    copy = directory / "standby" / cluster.name
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SELECT pg_backup_start('standby', fast => true)")
        shutil.copytree(cluster, copy, ignore=shutil.ignore_patterns("postmaster.*", ".s.PGSQL.*"))
        label = connection.execute("SELECT labelfile FROM pg_backup_stop()").fetchone()
    assert label
    (copy / "backup_label").write_text(label[0])
    (copy / "standby.signal").touch()
    with (copy / "postgresql.auto.conf").open("a") as settings:
        settings.write(f"primary_conninfo = 'user=postgres host={sockets_for_the_servers_user(url)}'\n")
    owner = cluster.stat()
    copy.chmod(0o700)
    for path in (copy, *copy.rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid)
