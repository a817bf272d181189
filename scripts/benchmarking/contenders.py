"""The table of contenders: what each is, and how it is started, as processes with a store of its own, for a load."""

import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import redis

from benchmarking import loads
from benchmarking.handler import POSTGRES_CONNECTIONS
from benchmarking.loads import USERS, Load

_START_SECONDS = 60
_STOP_SECONDS = 30
_POLL_SECONDS = 0.02
_URL = r"http://127\.0\.0\.1:(\d+)\b"
_BARE_TABLE = """
    CREATE TABLE users (
        id      bigint PRIMARY KEY,
        balance bigint NOT NULL CHECK (balance >= 0)
    ) WITH (fillfactor = 50)
"""

_FILL_JOURNAL = """
    INSERT INTO balance_changes (user_id, idempotency_key, amount, balance, version)
    SELECT id, gen_random_uuid()::text, -1, {1} - number, number
      FROM generate_series({2}, {3}) AS number, generate_series(1, {0}) AS id
"""
_CHANGES_AT_ONCE = 100

_numbers = itertools.count(1)


class BenchmarkError(Exception):
    """The benchmark can't go on, or found something wrong; the text says what."""


class Stage(NamedTuple):
    """What contenders use: a folder, PostgreSQL - its URL, its process, its log -, and what ends them with the load."""

    folder: Path
    postgres_url: str
    postgres_pid: int
    postgres_log: Path
    stack: ExitStack


class Running(NamedTuple):
    """A contender that runs: its ports on 127.0.0.1, the processes that serve, the server that keeps the balances.

    `journal_url`: the service's database. `pgbench_url`: where the load goes if there are no ports. `users`: for how
    many the load is, if not for as many as it says. `journal_since`: the last position in the feed at the start.
    """

    ports: Sequence[str]
    pids: Sequence[int]
    store_pids: Sequence[int]
    journal_url: str = ""
    pgbench_url: str = ""
    users: int = 0
    journal_since: int = 0


def service(
    load: Load,
    stage: Stage,
    python: str = sys.executable,
    processes: int = 1,
    users: int = 0,
    changes_of_each: int = 0,
    **settings: str,
) -> Running:
    """The service that `python` has, in so many processes; when they have stopped, its audit looks at the database.

    `users`: how many there are, 0: as many as any load is for. `changes_of_each`: so many rows has the journal of each
    already; then it is not audited, which would take many minutes.
    """
    command, url = [python, "-m", "atomic_balance"], _database(stage)
    _run([*command, "migrate"], stage, url)
    opening = load.balance + changes_of_each
    columns, values = "id, balance, opening_balance, version", f"id, {load.balance}, {opening}, {changes_of_each}"
    _open_accounts(url, values, columns, users or USERS)
    for done in range(0, changes_of_each, _CHANGES_AT_ONCE):
        print(f"filling: {done * users:,} of {changes_of_each * users:,} rows", file=sys.stderr, flush=True)
        execute(url, _FILL_JOURNAL.format(users, opening, done + 1, min(done + _CHANGES_AT_ONCE, changes_of_each)))
    if changes_of_each:
        execute(url, "VACUUM ANALYZE", "CHECKPOINT")
    else:
        stage.stack.callback(_run, [*command, "verify"], stage, url)
    started = [_start(command, _URL, stage, DATABASE_URL=url, PORT="0", **settings) for _ in range(processes)]
    ports, pids = zip(*started, strict=True)
    (since,) = execute(url, "SELECT coalesce(max(feed_position), 0) FROM balance_changes WHERE version IS NOT NULL")
    return Running(ports, pids, [stage.postgres_pid], journal_url=url, users=users, journal_since=since)


Store = Callable[[Load, Stage], tuple[str, Sequence[int]]]
"""Starts what keeps the balances; gives the address for handler.py, and the server's process if there is one."""


def _handler(way: str, store: Store, load: Load, stage: Stage) -> Running:
    address, store_pids = store(load, stage)
    command = [sys.executable, str(Path(__file__).with_name("handler.py")), way, address]
    port, pid = _start(command, _URL, stage)
    return Running([port], [pid], store_pids)


def _nowhere(load: Load, _: Stage) -> tuple[str, Sequence[int]]:
    return str(load.balance), []


def _postgres(load: Load, stage: Stage) -> tuple[str, Sequence[int]]:
    """A database with users that have a balance and nothing else."""
    url = _database(stage)
    execute(url, _BARE_TABLE)
    _open_accounts(url, f"id, {load.balance}", "id, balance")
    return url, [stage.postgres_pid]


def _redis(appendfsync: str, load: Load, stage: Stage) -> tuple[str, Sequence[int]]:
    folder = tempfile.mkdtemp(dir=stage.folder)
    # A rewrite of the append-only file would fall into the rounds of others.
    options = f"--port 0 --unixsocket {folder}/socket --dir {folder} --appendonly yes --auto-aof-rewrite-percentage 0"
    command = ["redis-server", *options.split(), "--appendfsync", appendfsync, "--save", ""]
    _, pid = _start(command, "[Rr]eady to (accept) connections", stage)
    with redis.Redis(unix_socket_path=f"{folder}/socket") as client:
        client.mset(dict.fromkeys(map(str, range(1, USERS + 1)), load.balance))
    return f"{folder}/socket", [pid]


def _pgbench(load: Load, stage: Stage) -> Running:
    url, pids = _postgres(load, stage)
    return Running([], [], pids, pgbench_url=url)


class Contender(NamedTuple):
    """What it is, how it is started for a load, and the program that it needs."""

    what: str
    start: Callable[[Load, Stage], Running]
    needs: str = ""


CONTENDERS: Mapping[str, Contender] = {
    loads.NO_DATABASE: Contender(
        "the same handler, which answers at once: the limit",
        partial(_handler, "no-database", _nowhere),
    ),
    loads.SERVICE: Contender("this service, with its journal and keys", service),
    loads.TWO_WORKERS: Contender("the same, `WORKERS=2`", partial(service, WORKERS="2")),
    loads.FOUR_WORKERS: Contender("the same, `WORKERS=4`", partial(service, WORKERS="4")),
    loads.FOUR_PROCESSES: Contender("the same four times, each with a port of its own", partial(service, processes=4)),
    loads.BARE_UPDATE: Contender(
        "the handler, and `UPDATE ... WHERE balance >= ... RETURNING` for each request",
        partial(_handler, "bare-update", _postgres),
    ),
    loads.FOR_UPDATE: Contender(
        "the handler, and a transaction: `SELECT ... FOR UPDATE`, look, `UPDATE`; for a transfer both rows, by id",
        partial(_handler, "for-update", _postgres),
    ),
    loads.SERIALIZABLE: Contender(
        "the handler, and a serializable transaction: `SELECT`, look, `UPDATE`; again after a conflict",
        partial(_handler, "serializable", _postgres),
    ),
    loads.PGBENCH: Contender(
        f"the conditional statement alone, by up to {POSTGRES_CONNECTIONS} clients", _pgbench, needs="pgbench"
    ),
    loads.REDIS_ALWAYS: Contender(
        "the handler, and a Lua script in Redis, `appendfsync always`: as durable",
        partial(_handler, "redis", partial(_redis, "always")),
        needs="redis-server",
    ),
    loads.REDIS_EVERYSEC: Contender(
        "the same, `appendfsync everysec`: a crash may lose a second of what was answered",
        partial(_handler, "redis", partial(_redis, "everysec")),
        needs="redis-server",
    ),
}


def execute(url: str, *statements: str) -> tuple[Any, ...]:
    """Run statements, each in a transaction of its own; gives the first row of the last, () if it has none."""
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            cursor = connection.execute(statement.encode())
        return (cursor.fetchone() or ()) if cursor.description else ()


def _open_accounts(url: str, values: str, columns: str, users: int = USERS) -> None:
    insert = f"INSERT INTO users ({columns}) SELECT {values} FROM generate_series(1, {users}) AS id"  # noqa: S608
    execute(url, insert, "VACUUM ANALYZE users")  # a fresh table's statistics may say "one row"


def _database(stage: Stage) -> str:
    """Give the URL of a new, empty database, which is dropped at the end."""
    name = f"contender_{next(_numbers)}"
    execute(stage.postgres_url, f"CREATE DATABASE {name}")
    stage.stack.callback(execute, stage.postgres_url, f"DROP DATABASE {name} WITH (FORCE)")
    return stage.postgres_url.replace("/postgres?", f"/{name}?")


def _start(command: Sequence[str], ready: str, stage: Stage, **settings: str) -> tuple[str, int]:
    """Start a command, to be stopped at the end; gives the group of `ready`, once its output matches, and the pid."""
    log = stage.folder / f"{next(_numbers)}.log"
    environment = {"PATH": os.environ["PATH"], **settings}  # and no setting of whoever runs the benchmark
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, cwd=stage.folder, stdout=output, stderr=output)
    stage.stack.callback(_stop, process)
    give_up = time.monotonic() + _START_SECONDS
    while not (found := re.search(ready, log.read_text())):
        if process.poll() is not None or time.monotonic() > give_up:
            raise BenchmarkError(f"{' '.join(command)} did not start:\n{log.read_text()}")
        time.sleep(_POLL_SECONDS)
    return found[1], process.pid


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _run(command: Sequence[str], stage: Stage, database_url: str) -> None:
    environment = {"PATH": os.environ["PATH"], "DATABASE_URL": database_url}
    finished = subprocess.run(command, env=environment, cwd=stage.folder, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise BenchmarkError(f"{' '.join(command)}: {finished.stdout}{finished.stderr}")
