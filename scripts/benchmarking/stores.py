"""What keeps the balances: one PostgreSQL server with a database for each who uses it, and Redis."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
import psycopg
import redis

from atomic_balance.postgres.migrations import migrate
from benchmarking.loads import USERS
from benchmarking.processes import polling, running

_SETTLE_SECONDS = 0.1
_SHOWN_SETTINGS = (
    "fsync",
    "synchronous_commit",
    "full_page_writes",
    "wal_sync_method",
    "wal_level",
    "shared_buffers",
    "max_wal_size",
    "checkpoint_timeout",
)
_BARE_TABLE = """
    CREATE TABLE users (
        id      bigint PRIMARY KEY,
        balance bigint NOT NULL CHECK (balance >= 0)
    ) WITH (fillfactor = 50)
"""
_BARE_ACCOUNTS = "INSERT INTO users (id, balance) SELECT id, {0} FROM generate_series(1, {1}) AS id"
_ACCOUNTS = "INSERT INTO users (id, balance, opening_balance) SELECT id, {0}, {0} FROM generate_series(1, {1}) AS id"


class Postgres:
    """The PostgreSQL server at `url`, which logs to `log`. `pid` is the process that all of its others come from."""

    def __init__(self, url: str, log: Path) -> None:
        self._url = url
        self._log = log
        with psycopg.connect(url) as connection:
            self.pid = psutil.Process(connection.info.backend_pid).ppid()
            self.version = _value(connection, "SHOW server_version")
            self.settings: Mapping[str, str] = {name: _value(connection, f"SHOW {name}") for name in _SHOWN_SETTINGS}

    @contextlib.contextmanager
    def bare_database(self, name: str, balance: int) -> Iterator[str]:
        """Give the URL of a new database with users that have a balance and nothing else."""
        with self._database(name) as url:
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute(_BARE_TABLE)
            _open_accounts(url, _BARE_ACCOUNTS, balance)
            yield url

    @contextlib.contextmanager
    def service_database(self, name: str, balance: int) -> Iterator[str]:
        """Give the URL of a new database with the service's schema."""
        with self._database(name) as url:
            migrate(url)
            _open_accounts(url, _ACCOUNTS, balance)
            yield url

    def logged(self, text: str) -> int:
        """How many lines of the server's log hold `text`."""
        with self._log.open(errors="replace") as lines:
            return sum(text in line for line in lines)

    @contextlib.contextmanager
    def _database(self, name: str) -> Iterator[str]:
        with psycopg.connect(self._url, autocommit=True) as admin:
            admin.execute(f'CREATE DATABASE "{name}"'.encode())
        try:
            yield self._url.replace("/postgres?", f"/{name}?")
        finally:
            with psycopg.connect(self._url, autocommit=True) as admin:
                admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)'.encode())


def journal_rows(database_url: str) -> int:
    """How many applied changes the journal of a service holds, when those on their way have arrived."""
    before = -1
    with psycopg.connect(database_url, autocommit=True) as connection:
        while True:
            rows = int(_value(connection, "SELECT count(*) FROM balance_changes WHERE refusal IS NULL"))
            if rows == before:
                return rows
            before = rows
            time.sleep(_SETTLE_SECONDS)


def _open_accounts(url: str, insert: str, balance: int) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(insert.format(balance, USERS).encode())
        connection.execute("VACUUM ANALYZE users")  # a fresh table's statistics may say "one row"


def _value(connection: psycopg.Connection, statement: str) -> str:
    row = connection.execute(statement.encode()).fetchone()
    return str(row[0]) if row else ""


class Redis(NamedTuple):
    """A Redis server: its socket and its process."""

    socket: Path
    pid: int


@contextlib.contextmanager
def redis_server(appendfsync: str, balance: int, folder: Path, environment: Mapping[str, str]) -> Iterator[Redis]:
    """Run a Redis in an empty folder, with every user's balance in it and every change in its append-only file."""
    socket, log = folder / "socket", folder / "log"
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": appendfsync,
        "auto-aof-rewrite-percentage": "0",  # or a rewrite would fall into the rounds of others
        "save": "",
    }
    command = ["redis-server", *(word for name, value in options.items() for word in (f"--{name}", value))]
    with running(command, environment, log) as process, redis.Redis(unix_socket_path=str(socket)) as client:
        for _ in polling(process, log):
            with contextlib.suppress(redis.ConnectionError):
                client.mset(dict.fromkeys(map(str, range(1, USERS + 1)), balance))
                break
        yield Redis(socket, process.pid)
