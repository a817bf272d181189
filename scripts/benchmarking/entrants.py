"""The contenders as the benchmark runs them: started with their stores for one load, measured, checked."""

import contextlib
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarking import loads
from benchmarking.contenders import POSTGRES_CONNECTIONS
from benchmarking.loads import Load
from benchmarking.pgbench import run_pgbench
from benchmarking.processes import BenchmarkError, Server, cpu_seconds, http_server
from benchmarking.results import Measurement
from benchmarking.stores import Postgres, journal_rows, redis_server
from benchmarking.wrk import Counted, run_wrk

_POSTGRES_HANDLERS = {
    loads.BARE_STATEMENT: "bare-statement",
    loads.FOR_UPDATE: "for-update",
    loads.SERIALIZABLE: "serializable",
}
_APPENDFSYNC = {loads.REDIS_ALWAYS: "always", loads.REDIS_EVERYSEC: "everysec"}

_run_numbers = itertools.count(1)


class Stage(NamedTuple):
    """What every contender needs: a folder of this run, the PostgreSQL server, the environment of a process."""

    folder: Path
    postgres: Postgres
    environment: Mapping[str, str]


class Entrant(NamedTuple):
    """A contender that is running.

    `generate` puts the load on it, from so many connections for so many seconds. `pids`: of the process that serves and
    of the server that keeps the balances. `journal_url`: the database of the service, None for the others.
    """

    contender: str
    load: Load
    generate: Callable[[int, int], Counted]
    pids: tuple[int | None, int | None]
    journal_url: str | None = None

    def measure(self, connections: int, seconds: int, round_number: int) -> Measurement:
        """Load it, and check what it answered and wrote. Raises BenchmarkError."""
        rows = journal_rows(self.journal_url) if self.journal_url else 0
        before = [cpu_seconds(pid) if pid else None for pid in self.pids]
        counted = self.generate(connections, seconds)
        after = [cpu_seconds(pid) if pid else None for pid in self.pids]
        if counted.failures or set(counted.statuses) != {self.load.status}:
            raise BenchmarkError(
                f"{self.contender}, {self.load.title}, {connections} connections: expected answers with "
                f"{self.load.status} and no other, got {counted}"
            )
        if self.journal_url:
            check_journal(journal_rows(self.journal_url) - rows, counted, self.load, connections)
        service_cpu_us, store_cpu_us = (
            None if start is None or end is None else (end - start) * 1e6 / counted.answers
            for start, end in zip(before, after, strict=True)
        )
        return Measurement(
            load=self.load.title,
            connections=connections,
            contender=self.contender,
            round=round_number,
            requests=counted.answers,
            updates=self.load.updates,
            seconds=counted.seconds,
            p50_ms=counted.p50_ms,
            p99_ms=counted.p99_ms,
            service_cpu_us=service_cpu_us,
            store_cpu_us=store_cpu_us,
        )


@contextlib.contextmanager
def entered(contender: str, load: Load, stage: Stage) -> Iterator[Entrant]:
    """Run a contender with every balance as `load` wants it; the service's database is verified at the end."""
    name = re.sub(r"\W+", "_", contender.lower())
    if contender == loads.NO_DATABASE:
        with _handler("no-database", str(load.balance), stage) as server:
            yield Entrant(contender, load, through_http(load, server), (server.pid, None))
    elif contender == loads.SERVICE:
        with stage.postgres.service_database(name, load.balance) as url:
            with service(url, stage) as server:
                yield Entrant(contender, load, through_http(load, server), (server.pid, stage.postgres.pid), url)
            verify(url, stage)
    elif contender == loads.POSTGRES_ALONE:
        with stage.postgres.bare_database(name, load.balance) as url:

            def generate(connections: int, seconds: int) -> Counted:
                return run_pgbench(load, url, min(connections, POSTGRES_CONNECTIONS), seconds)

            yield Entrant(contender, load, generate, (None, stage.postgres.pid))
    elif contender in _APPENDFSYNC:
        with (
            tempfile.TemporaryDirectory(dir=stage.folder) as folder,
            redis_server(_APPENDFSYNC[contender], load.balance, Path(folder), stage.environment) as redis,
            _handler("redis", str(redis.socket), stage) as server,
        ):
            yield Entrant(contender, load, through_http(load, server), (server.pid, redis.pid))
    else:
        with (
            stage.postgres.bare_database(name, load.balance) as url,
            _handler(_POSTGRES_HANDLERS[contender], url, stage) as server,
        ):
            yield Entrant(contender, load, through_http(load, server), (server.pid, stage.postgres.pid))


def service(database_url: str, stage: Stage) -> contextlib.AbstractContextManager[Server]:
    """Run the service on a database."""
    environment = {**stage.environment, "DATABASE_URL": database_url, "PORT": "0"}
    return http_server([sys.executable, "-m", "atomic_balance"], environment, _log(stage))


def verify(database_url: str, stage: Stage) -> None:
    """Have the service's own audit look at a database. Raises BenchmarkError where it finds something."""
    finished = subprocess.run(
        [sys.executable, "-m", "atomic_balance", "verify"],
        env={**stage.environment, "DATABASE_URL": database_url},
        cwd=stage.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise BenchmarkError(f"verify: {finished.stdout}{finished.stderr}")


def through_http(load: Load, *servers: Server) -> Callable[[int, int], Counted]:
    """What puts `load` on servers."""

    def generate(connections: int, seconds: int) -> Counted:
        return run_wrk(load, [server.port for server in servers], connections, seconds, next(_run_numbers))

    return generate


def check_journal(rows: int, counted: Counted, load: Load, connections: int) -> None:
    """Compare the rows that the journal has gained with what was answered. Raises BenchmarkError.

    wrk leaves when its time is up, with up to one request on its way in each connection: those may be applied too, and
    nobody counts their answers. Nothing else may be more, and nothing may be less.
    """
    answered = (counted.statuses.get(200, 0) - counted.replays) * load.updates
    if not answered <= rows <= answered + connections * load.updates or (rows and load.status != 200):
        raise BenchmarkError(f"{load.title}: {answered} updates were answered with 200, the journal has {rows} more")


def _handler(name: str, address: str, stage: Stage) -> contextlib.AbstractContextManager[Server]:
    command = [sys.executable, "-m", "benchmarking.contenders", name, address]
    return http_server(command, stage.environment, _log(stage))


def _log(stage: Stage) -> Path:
    return stage.folder / f"server-{next(_run_numbers)}.log"
