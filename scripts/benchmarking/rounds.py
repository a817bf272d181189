"""Load after load, in rounds in which all contenders take turns; each turn is measured and checked."""

import os
import re
import resource
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress

import psutil

from benchmarking.contenders import BenchmarkError, Contender, Running, Stage, execute
from benchmarking.generators import Counted, run_pgbench, run_wrk
from benchmarking.handler import POSTGRES_CONNECTIONS
from benchmarking.loads import BEFORE, SERVICE, WORKERS, Load
from benchmarking.results import Figures, Key

_WARM_UP_CONNECTIONS = 16
_WARM_UP_SECONDS = 1
_SETTLE_SECONDS = 0.1
_APPLIED = "SELECT count(*) FROM balance_changes WHERE version IS NOT NULL AND feed_position > {}"
_WRITTEN = "SELECT pg_current_wal_insert_lsn() - '0/0', pg_total_relation_size('balance_changes')"
_LOCK_FAILURE = re.compile("deadlock detected|due to lock timeout")


def measure(
    loads: Mapping[str, Load], contenders: Mapping[str, Contender], rounds: int, seconds: int, stage: Stage
) -> Iterator[tuple[Key, Figures]]:
    """Measure the contenders that meet each load. Raises BenchmarkError.

    In each round all contenders have their turn with every number of connections, and another one begins.
    """
    for label, load in loads.items():
        turns = {
            connections: [name for name in contenders if (SERVICE if name == BEFORE else name) in names]
            for connections, names in load.contenders.items()
        }
        with ExitStack() as stack:
            stage = stage._replace(stack=stack)
            started = {
                name: contender.start(load, stage)
                for name, contender in contenders.items()
                if any(name in names for names in turns.values())
            }
            for running in started.values():
                _prepare(running, load, _WARM_UP_CONNECTIONS, _WARM_UP_SECONDS)
                _generate(running, load, _WARM_UP_CONNECTIONS, _WARM_UP_SECONDS)
            for number in range(rounds):
                print(f"{load.title}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
                for connections, names in turns.items():
                    for name in rotated(names, number):
                        figures = _turn(load, connections, name, started[name], seconds, stage)
                        yield (label, connections, name), figures


def rotated(names: Sequence[str], places: int) -> Sequence[str]:
    """The names, beginning so many places further on."""
    places %= len(names) or 1
    return [*names[places:], *names[:places]]


def check_answers(who: str, load: Load, connections: int, counted: Counted, journal_rows: float | None) -> None:
    """Compare what was answered with `load`, and with the rows that a journal has gained. Raises BenchmarkError.

    wrk leaves when its time is up, with up to one request on its way in each connection: those may be applied too, and
    nobody counts their answers. Nothing else may be more, and nothing may be less.
    """
    if counted.failures or set(counted.statuses) != {load.status}:
        raise BenchmarkError(f"{who}, {load.title}: expected answers with {load.status} and no others, got {counted}")
    answered = (counted.answers - counted.replays) * load.rows
    if journal_rows is not None and not answered <= journal_rows <= answered + connections * load.rows:
        raise BenchmarkError(f"{who}, {load.title}: {answered} changes answered, {journal_rows:.0f} in the journal")


def _turn(load: Load, connections: int, who: str, running: Running, seconds: int, stage: Stage) -> Figures:
    _prepare(running, load, connections, seconds)
    journal, cpu = _journal(running, stage), _cpu_us(running)
    counted = _generate(running, load, connections, seconds)
    cpu = {name: value - cpu[name] for name, value in _cpu_us(running).items()}
    journal = {name: value - journal[name] for name, value in _journal(running, stage).items()}
    check_answers(who, load, connections, counted, journal.get("rows"))
    figures = {"rate": counted.answers * load.updates / counted.seconds, **counted.latencies}
    figures |= {name: value / counted.answers for name, value in cpu.items()}
    if running.journal_url:
        figures |= {"statements": journal["statements"] / counted.seconds, "lock_failures": journal["lock_failures"]}
        figures |= {name: journal[name] / (journal["rows"] or 1) for name in ("wal_bytes", "disk_bytes")}
    if who in WORKERS and connections > 1:  # a lone connection is bound by latency
        # A worker, or the load generator, uses one core at most; all together use all that there are.
        busiest_us = max(figures["service_us"] / WORKERS[who], figures["load_us"])
        cores = len(os.sched_getaffinity(0))
        figures["predicted"] = min(1e6 / busiest_us, cores * 1e6 * counted.answers / sum(cpu.values()))
    return figures


def _prepare(running: Running, load: Load, connections: int, seconds: int) -> None:
    if load.prepared_by:
        run_wrk(load._replace(requests=(load.prepared_by,)), running.ports, connections, 2 * seconds)


def _generate(running: Running, load: Load, connections: int, seconds: int) -> Counted:
    if running.users:
        load = load._replace(users=running.users)
    if running.pgbench_url:
        return run_pgbench(load, running.pgbench_url, min(connections, POSTGRES_CONNECTIONS), seconds)
    return run_wrk(load, running.ports, connections, seconds)


def _cpu_us(running: Running) -> dict[str, float]:
    """CPU time so far; the load generators are the only children that end meanwhile."""
    generators = resource.getrusage(resource.RUSAGE_CHILDREN)
    servers = {"service_us": running.pids, "store_us": running.store_pids}
    used = {name: sum(map(_cpu_seconds, pids)) * 1e6 for name, pids in servers.items() if pids}
    return used | {"load_us": (generators.ru_utime + generators.ru_stime) * 1e6}


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process and of all the children it has had."""
    process = psutil.Process(pid)
    while True:
        times = process.cpu_times()[:4]  # user and system: its own, and of the children that have ended
        seconds = sum(times)
        for child in process.children():
            with suppress(psutil.NoSuchProcess):
                seconds += sum(child.cpu_times()[:2])
        if times[2:] == process.cpu_times()[2:4]:
            return seconds  # no child ended meanwhile, which would have been counted twice or not at all


def _journal(running: Running, stage: Stage) -> dict[str, float]:
    """What the service has written so far, and how."""
    if not running.journal_url:
        return {}
    rows = journal_rows_of(running)
    wal_bytes, disk_bytes = map(float, execute(running.journal_url, _WRITTEN))
    return {
        "rows": rows,
        "wal_bytes": wal_bytes,
        "disk_bytes": disk_bytes,
        "statements": metric_of(running, "atomic_balance_statement_changes_count"),
        "lock_failures": len(_LOCK_FAILURE.findall(stage.postgres_log.read_text(errors="replace"))),
    }


def journal_rows_of(running: Running) -> int:
    """How many applied changes the journal has gained since the start, when those on their way have arrived."""
    before, rows = -2, -1
    while rows != before:
        time.sleep(_SETTLE_SECONDS)
        before, (rows,) = rows, execute(running.journal_url, _APPLIED.format(running.journal_since))
    return rows


def metric_of(running: Running, name: str) -> float:
    """A metric of the service: the sum over the service's processes."""
    total = 0.0
    for port in running.ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            total += sum(map(float, re.findall(rf"^{name} (\S+)$", answer.read().decode(), re.MULTILINE)))
    return total
