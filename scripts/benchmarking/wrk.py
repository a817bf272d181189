"""wrk, the load generator: one run of it, and what it counted."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from benchmarking.loads import Load

_SCRIPT = Path(__file__).with_suffix(".lua")
_TIMEOUT_SECONDS = 10


class Counted(msgspec.Struct, frozen=True):
    """Answers by status, how many of them were replays, connections that failed, the time, and latencies."""

    statuses: Mapping[int, int]
    replays: int
    failures: int
    seconds: float
    p50_ms: float
    p99_ms: float

    @property
    def answers(self) -> int:
        """Answers of any status."""
        return sum(self.statuses.values())


def run_wrk(load: Load, ports: Sequence[int], connections: int, seconds: int, run_number: int) -> Counted:
    """Put `load` on the servers at `ports` of 127.0.0.1, by a thread for each.

    They share the `connections`. No two runs on a server may have the same number: its keys are made of it.
    """
    path = "/api/balance/updates" if load.updates > 1 else "/api/balance/update"
    percent = "none" if load.replay_percent is None else str(load.replay_percent)
    finished = subprocess.run(
        [
            *("wrk", "--threads", str(len(ports)), "--connections", str(connections)),
            *("--duration", f"{seconds}s", "--timeout", f"{_TIMEOUT_SECONDS}s", "--script", str(_SCRIPT)),
            f"http://127.0.0.1:{ports[0]}{path}",
            *("--", str(load.users), str(load.updates), percent, str(run_number)),
        ],
        env={"PATH": os.environ["PATH"], "PORTS": " ".join(map(str, ports))},
        stdout=subprocess.PIPE,
        check=True,
    )
    return msgspec.json.decode(finished.stdout.splitlines()[-1], type=Counted)
