"""What more workers bring, and what a change costs: CPU, statements, write-ahead log, disk."""

import os
import resource
import urllib.request
from collections.abc import Iterator

import psycopg
from prometheus_client.parser import text_string_to_metric_families

from benchmarking.entrants import Stage, check_journal, service, through_http, verify
from benchmarking.loads import HOT, LOADS, ROWS
from benchmarking.processes import BenchmarkError, Server, cpu_seconds
from benchmarking.results import Scale
from benchmarking.stores import journal_rows

WORKERS = (1, 2, 4)
CONNECTIONS = 256

_STATEMENTS = "atomic_balance_statement_changes_count"
_SIZE = "SELECT pg_current_wal_insert_lsn() - '0/0', pg_total_relation_size('balance_changes')"


def steps() -> int:
    """How many measurements there are."""
    return len(list(_plan()))


def measure_scaling(seconds: int, stage: Stage) -> Iterator[Scale]:
    """Load the service with one worker and with several, with one connection and with many. Raises BenchmarkError."""
    for load, workers, connections in _plan():
        yield _measure(load, workers, connections, seconds, stage)


def _plan() -> Iterator[tuple[str, int, int]]:
    yield ROWS, 1, 1
    for load in (HOT, ROWS):
        for workers in WORKERS:
            yield load, workers, CONNECTIONS


def _measure(name: str, workers: int, connections: int, seconds: int, stage: Stage) -> Scale:
    load = LOADS[name]
    stage = stage._replace(environment={**stage.environment, "WORKERS": str(workers)})
    with stage.postgres.service_database(f"scaling-{name}-{workers}", load.balance) as url:
        with service(url, stage) as server:
            generate = through_http(load, server)
            generate(connections, 1)
            pids = (server.pid, stage.postgres.pid)
            rows = journal_rows(url)
            before = (*map(cpu_seconds, pids), _load_seconds(), _statements(server), *_sizes(url))
            counted = generate(connections, seconds)
            after = (*map(cpu_seconds, pids), _load_seconds(), _statements(server), *_sizes(url))
            written = journal_rows(url) - rows
        if counted.failures or set(counted.statuses) != {load.status}:
            raise BenchmarkError(f"{workers} workers, {load.title}: expected {load.status} alone, got {counted}")
        check_journal(written, counted, load, connections)
        verify(url, stage)
    service_seconds, store_seconds, load_seconds, statements, wal_bytes, disk_bytes = (
        float(end - start) for start, end in zip(before, after, strict=True)
    )
    return Scale(
        load=load.title,
        connections=connections,
        workers=workers,
        cores=len(os.sched_getaffinity(0)),
        rate=counted.answers / counted.seconds,
        p99_ms=counted.p99_ms,
        service_cpu_us=service_seconds * 1e6 / counted.answers,
        store_cpu_us=store_seconds * 1e6 / counted.answers,
        load_cpu_us=load_seconds * 1e6 / counted.answers,
        statements_per_second=statements / counted.seconds,
        wal_bytes=wal_bytes / written,
        disk_bytes=disk_bytes / written,
    )


def _load_seconds() -> float:
    """CPU time of the load generators so far: the only children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _statements(server: Server) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
        text = answer.read().decode()
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == _STATEMENTS
    )


def _sizes(url: str) -> tuple[float, float]:
    """The bytes of write-ahead log so far, and those of the journal with its indexes."""
    with psycopg.connect(url) as connection:
        row = connection.execute(_SIZE).fetchone()
    return (float(row[0]), float(row[1])) if row else (0.0, 0.0)
