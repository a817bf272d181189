"""The command: measures everything, or what is asked for, and writes the report."""

import argparse
import contextlib
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from atomic_balance.postgres.embedded import EmbeddedPostgresError, embedded_postgres
from atomic_balance.settings import Settings
from benchmarking import scaling
from benchmarking.chart import write_chart
from benchmarking.crowd import measure_crowd
from benchmarking.entrants import Stage
from benchmarking.loads import CONTENDERS, LOADS, POSTGRES_ALONE, REDIS_ALWAYS, REDIS_EVERYSEC
from benchmarking.machine import describe_machine, describe_versions
from benchmarking.pgbench import find_pgbench
from benchmarking.processes import BenchmarkError
from benchmarking.progress import Progress
from benchmarking.report import summary, write_report
from benchmarking.results import Results, Scale
from benchmarking.run import Plan
from benchmarking.several import measure_processes
from benchmarking.stores import Postgres

_ROOT = Path(__file__).parents[2]
_PROCESSES, _CROWD, _SCALING = "processes", "crowd", "scaling"
# Not /tmp, which may be in memory: there a durable write would cost nothing.
_DISK = Path("/var/tmp")  # noqa: S108


def main() -> None:
    """Measure and report; exits with 1 where that is not possible, or something wrong was found."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is stopped
    if not shutil.which("wrk"):
        sys.exit("benchmark: wrk is not installed, and it makes the load (Debian: apt-get install wrk)")
    try:
        results = _measure(arguments)
    except (BenchmarkError, EmbeddedPostgresError) as error:
        sys.exit(f"benchmark: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_report(results, arguments.output)
    write_chart(results, arguments.output)
    print(summary(results))
    print(f"\nWritten: README.md, throughput.svg and results.json in {arguments.output}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark", description="Measure atomic-balance beside what else one might do, on this machine."
    )
    parser.add_argument("--quick", action="store_true", help="about 2 minutes, instead of about 15")
    parser.add_argument("--rounds", type=int, help="rounds of each measurement (5; quick: 1)")
    parser.add_argument("--seconds", type=int, help="seconds of each round (2; quick: 1)")
    names = [*LOADS, _PROCESSES, _CROWD, _SCALING]
    parser.add_argument("--loads", nargs="+", choices=names, default=names, metavar="LOAD", help=", ".join(names))
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=list(CONTENDERS),
        metavar="NAME",
        help=", ".join(f'"{name}"' for name in CONTENDERS),
    )
    parser.add_argument("--output", type=Path, default=_ROOT / "docs" / "benchmarks", help="a folder (docs/benchmarks)")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 5)
    arguments.seconds = arguments.seconds or (1 if arguments.quick else 2)
    return arguments


def _measure(arguments: argparse.Namespace) -> Results:
    missing = _missing()
    plan = Plan(
        loads=[name for name in arguments.loads if name in LOADS],
        contenders=[name for name in arguments.contenders if name not in missing],
        rounds=arguments.rounds,
        seconds=arguments.seconds,
    )
    _allow_many_connections()
    progress = Progress(plan.steps() + 2 + scaling.steps())
    with _stage() as stage:
        machine = describe_machine(stage.folder)
        measurements = list(plan.measurements(stage, progress))
        processes = crowd = None
        scales: list[Scale] = []
        if _PROCESSES in arguments.loads:
            progress.step("four processes on 50 rows")
            processes = measure_processes(5 if arguments.quick else 60, stage)
        if _CROWD in arguments.loads:
            progress.step("10,000 connections that wait")
            crowd = measure_crowd(stage)
        if _SCALING in arguments.loads:
            for scale in scaling.measure_scaling(2 if arguments.quick else 10, stage):
                progress.step(f"{scale.workers} workers, {scale.load}")
                scales.append(scale)
        progress.end()
        return Results(
            machine=machine,
            versions=describe_versions(stage.postgres.version),
            postgres_settings=stage.postgres.settings,
            rounds=plan.rounds,
            seconds=plan.seconds,
            not_measured=[f"{name}: {why}" for name, why in missing.items()],
            measurements=measurements,
            processes=processes,
            crowd=crowd,
            scaling=scales,
        )


@contextlib.contextmanager
def _stage() -> Iterator[Stage]:
    settings = {field.encode_name for field in msgspec.structs.fields(Settings)}
    environment = {name: value for name, value in os.environ.items() if name not in settings}
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=_DISK) as name:
        folder = Path(name)
        with embedded_postgres(folder / "postgres") as url:
            yield Stage(folder, Postgres(url, folder / "postgres" / "postgres.log"), environment)


def _missing() -> Mapping[str, str]:
    """The contenders that can't be measured here, and why."""
    missing: dict[str, str] = {}
    if not shutil.which("redis-server"):
        why = "redis-server is not installed (Debian: apt-get install redis-server)"
        missing |= {REDIS_ALWAYS: why, REDIS_EVERYSEC: why}
    if not find_pgbench():
        missing[POSTGRES_ALONE] = "pgbench is not installed (Debian: apt-get install postgresql-contrib)"
    return missing


def _allow_many_connections() -> None:
    """Open as many files as may be, here and in everything that is started from here."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    main()
