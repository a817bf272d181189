"""The command: measures, prints the page, and writes what is made of it."""

import argparse
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path

import psutil

from atomic_balance.postgres.embedded import EmbeddedPostgresError, embedded_postgres
from benchmarking.contenders import CONTENDERS, BenchmarkError, Contender, Stage, execute, service
from benchmarking.figures import DOCUMENTS, chart, quoted
from benchmarking.generators import program
from benchmarking.loads import BEFORE, LOADS
from benchmarking.report import page
from benchmarking.results import WAITING, Figures, Key, Results
from benchmarking.rounds import measure

_ROOT = Path(__file__).parents[2]
# Not /tmp, which may be in memory: there a durable write would cost nothing.
_DISK = "/var/tmp"  # noqa: S108
_PAGE_BYTES, _DURABLE_WRITES = 8192, 100


def main() -> None:
    """Measure and write; exits with 1 where that is not possible, or something wrong was found."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is stopped
    if not shutil.which("wrk"):
        sys.exit("benchmark: wrk is not installed, and it makes the load (Debian: apt-get install wrk)")
    # As many open files as may be, here and in everything that is started from here.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    try:
        text = page(_measure(arguments))
    except (BenchmarkError, EmbeddedPostgresError, subprocess.CalledProcessError) as error:
        sys.exit(f"benchmark: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    print(text)
    whole = not any((arguments.quick, arguments.loads, arguments.contenders, arguments.against, arguments.output))
    if output := _ROOT / "docs" / "benchmarks" if whole else arguments.output:
        output.mkdir(parents=True, exist_ok=True)
        (output / "README.md").write_text(text)
        (output / "throughput.svg").write_text(chart(text))
    for document in (_ROOT / name for name in DOCUMENTS if whole):
        document.write_text(quoted(document.read_text(), text))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark",
        description="Measure atomic-balance beside what else one might do, on this machine, and print the page. "
        "Without options that leave something out, also write docs/benchmarks and the figures that documents quote.",
    )
    parser.add_argument("--quick", action="store_true", help="one round of 1 s: about 3 minutes, instead of 15")
    parser.add_argument("--rounds", type=int, help="rounds of each measurement (5)")
    parser.add_argument("--seconds", type=int, help="seconds of each round (2)")
    for option, names in (("--loads", [*LOADS, WAITING[0]]), ("--contenders", list(CONTENDERS))):
        listed = " ".join(f"'{name}'" if " " in name else name for name in names)
        parser.add_argument(option, nargs="+", choices=names, metavar="NAME", help=f"of {listed}")
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="also the service of another checkout, by its .venv"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="write the page and its chart there, nothing else")
    arguments = parser.parse_args()
    if arguments.against and not _python_of(arguments.against).exists():
        parser.error(f"--against: expected a checkout with its .venv, found no {_python_of(arguments.against)}")
    return arguments


def _python_of(checkout: Path) -> Path:
    return checkout.absolute() / ".venv" / "bin" / "python"


def _measure(arguments: argparse.Namespace) -> Results:
    contenders = {name: CONTENDERS[name] for name in CONTENDERS if name in (arguments.contenders or CONTENDERS)}
    if arguments.against:
        start = partial(service, python=str(_python_of(arguments.against)))
        before = Contender("the service of another checkout", start)
        contenders = {BEFORE: before, **contenders}
    needs = {name: contender.needs for name, contender in contenders.items() if contender.needs}
    missing = {name: f"{needed} is not installed" for name, needed in needs.items() if not program(needed)}
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    seconds = arguments.seconds or (1 if arguments.quick else 2)
    measured: dict[Key, list[Figures]] = {}
    present = {name: contender for name, contender in contenders.items() if name not in missing}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-", dir=_DISK)))
        url = stack.enter_context(embedded_postgres(folder / "data"))
        (pid,) = execute(url, "SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)::int")
        stage = Stage(folder, url, pid, folder / "data" / "postgres.log", stack)
        for key, figures in measure(arguments.loads or [*LOADS, WAITING[0]], present, rounds, seconds, stage):
            measured.setdefault(key, []).append(figures)
        machine = _machine(stage)
    what = {name: contender.what for name, contender in contenders.items()}
    return Results(measured, rounds, seconds, what, missing, machine)


def _machine(stage: Stage) -> Mapping[str, str]:
    """The machine and the versions that the figures belong to; nothing that tells whose machine it is."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    with tempfile.TemporaryFile(dir=stage.folder) as file:
        started = time.perf_counter()
        for _ in range(_DURABLE_WRITES):
            os.pwrite(file.fileno(), bytes(_PAGE_BYTES), 0)
            os.fdatasync(file.fileno())
        durable_ms = (time.perf_counter() - started) * 1e3 / _DURABLE_WRITES
    settings = ("server_version", "fsync", "synchronous_commit", "full_page_writes", "wal_sync_method")
    return {
        "processor": model[1] if model else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "a page written durably (fdatasync)": f"{durable_ms:.2f} ms",
        "Python": platform.python_version(),
        **{name: version(name) for name in ("aiohttp", "asyncpg", "msgspec", "uvloop", "redis")},
        **{f"PostgreSQL's {name}": execute(stage.postgres_url, f"SHOW {name}")[0] for name in settings},
    }


if __name__ == "__main__":
    main()
