"""A Citus cluster that somebody runs for the tests: CITUS_TEST_URL names a database on its coordinator.

CITUS_TEST_NODES names a program that kills and starts its nodes: it is called as `PROGRAM kill PORT` and `PROGRAM start
PORT`, with the port of a worker as the coordinator knows it. Without these, tests that need them are not collected.
"""

import contextlib
import itertools
import os
import subprocess
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

import psycopg

from atomic_balance.postgres.migrations import migrate

URL = os.environ.get("CITUS_TEST_URL", "")
NODES = os.environ.get("CITUS_TEST_NODES", "")

_TRIES = 20

_numbers = itertools.count(1)


class Node(NamedTuple):
    """A worker, as the coordinator knows it."""

    host: str
    port: int

    def kill(self) -> None:
        """End it at once, as by a loss of power."""
        subprocess.run([NODES, "kill", str(self.port)], check=True)

    def start(self) -> None:
        """Bring it back, and wait until it answers."""
        subprocess.run([NODES, "start", str(self.port)], check=True)


def workers() -> list[Node]:
    """The workers that hold shards."""
    with psycopg.connect(URL) as coordinator:
        rows = coordinator.execute(
            "SELECT nodename, nodeport FROM pg_dist_node WHERE shouldhaveshards AND isactive ORDER BY nodeport"
        ).fetchall()
    return [Node(*row) for row in rows]


def fresh_database() -> Iterator[str]:
    """The URL of a database on the whole cluster, with the current schema; it is gone at the end."""
    name = f"atomic_balance_test_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(URL) as coordinator:
        ((host, port),) = coordinator.execute(
            "SELECT nodename, nodeport FROM pg_dist_node WHERE groupid = 0"
        ).fetchall() or [(urlsplit(URL).hostname, urlsplit(URL).port or 5432)]
    servers = [Node(host, port), *workers()]
    for server in servers:
        with psycopg.connect(_url(server), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        with psycopg.connect(_url(server, name), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION citus")
    url = _url(servers[0], name)
    with psycopg.connect(url, autocommit=True) as coordinator:
        coordinator.execute("SELECT citus_set_coordinator_host(%s, %s)", servers[0])
        for server in servers[1:]:
            coordinator.execute("SELECT citus_add_node(%s, %s)", server)
    try:
        migrate(url, citus=True)
        yield url
    finally:
        for server in servers:
            with psycopg.connect(_url(server), autocommit=True) as connection:
                _drop(connection, name)


def _drop(connection: psycopg.Connection, name: str) -> None:
    """Drop a database; Citus's own sessions in it may come back while it goes."""
    for _ in range(_TRIES - 1):
        with contextlib.suppress(psycopg.errors.ObjectInUse):
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
            return
    connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def _url(server: Node, database: str = "postgres") -> str:
    parts = urlsplit(URL)
    sign_in = parts.netloc.rpartition("@")[0]
    place = f"{server.host}:{server.port}"
    return urlunsplit(parts._replace(netloc=f"{sign_in}@{place}" if sign_in else place, path=f"/{database}"))
