"""Several processes of the service on the same rows, beside one with as many connections in all."""

import contextlib

from benchmarking.entrants import Stage, check_journal, service, through_http, verify
from benchmarking.loads import FIFTY_ROWS
from benchmarking.processes import BenchmarkError
from benchmarking.results import Processes
from benchmarking.stores import journal_rows
from benchmarking.wrk import Counted

PROCESSES = 4
CONNECTIONS = 256

_DEADLOCK = "deadlock detected"
_LOCK_TIMEOUT = "due to lock timeout"  # shorter than deadlock_timeout, so that a deadlock may show as this


def measure_processes(seconds: int, stage: Stage) -> Processes:
    """Load one process, then several. Raises BenchmarkError."""
    one, *_ = _measure(1, seconds, stage)
    several, deadlocks, lock_timeouts = _measure(PROCESSES, seconds, stage)
    return Processes(
        processes=PROCESSES,
        connections=CONNECTIONS,
        seconds=seconds,
        rate_of_one=one.answers / one.seconds,
        rate_of_all=several.answers / several.seconds,
        p99_ms_of_one=one.p99_ms,
        p99_ms_of_all=several.p99_ms,
        deadlocks=deadlocks,
        lock_timeouts=lock_timeouts,
    )


def _measure(processes: int, seconds: int, stage: Stage) -> tuple[Counted, int, int]:
    """What was counted, the deadlocks and the lock timeouts.

    A thread of wrk loads one process, so there are as many threads, for one process too.
    """
    logged = stage.postgres.logged
    deadlocks, lock_timeouts = logged(_DEADLOCK), logged(_LOCK_TIMEOUT)
    with stage.postgres.service_database(f"processes-{processes}", FIFTY_ROWS.balance) as url:
        with contextlib.ExitStack() as running:
            servers = [running.enter_context(service(url, stage)) for _ in range(processes)]
            generate = through_http(FIFTY_ROWS, *servers * (PROCESSES // processes))
            generate(CONNECTIONS, 1)
            rows = journal_rows(url)
            counted = generate(CONNECTIONS, seconds)
        if counted.failures or set(counted.statuses) != {FIFTY_ROWS.status}:
            raise BenchmarkError(f"{processes} processes: expected {FIFTY_ROWS.status} alone, got {counted}")
        check_journal(journal_rows(url) - rows, counted, FIFTY_ROWS, CONNECTIONS)
        verify(url, stage)
    return counted, logged(_DEADLOCK) - deadlocks, logged(_LOCK_TIMEOUT) - lock_timeouts
