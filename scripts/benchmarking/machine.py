"""The machine that is measured on: a PostgreSQL for the contenders, what the figures belong to, and how a run ends."""

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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import psutil

from atomic_balance.postgres.embedded import EmbeddedPostgresError, embedded_postgres
from benchmarking.contenders import BenchmarkError, Stage, execute

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "benchmarks"
"""Where the pages are written, unless it is said otherwise."""

# Not /tmp, which may be in memory: there a durable write would cost nothing.
_DISK = "/var/tmp"  # noqa: S108
_PAGE_BYTES, _DURABLE_WRITES = 8192, 100


@contextmanager
def ending_in_one_line() -> Iterator[None]:
    """Let a run use all open files that there may be; exit with 1 and a line where it can't go on."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is stopped
    if not shutil.which("wrk"):
        sys.exit("benchmark: wrk is not installed, and it makes the load (Debian: apt-get install wrk)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    try:
        yield
    except (BenchmarkError, EmbeddedPostgresError, subprocess.CalledProcessError) as error:
        sys.exit(f"benchmark: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


@contextmanager
def staged() -> Iterator[Stage]:
    """A folder and an embedded PostgreSQL, which are gone afterwards."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-", dir=_DISK)))
        url = stack.enter_context(embedded_postgres(folder / "data"))
        (pid,) = execute(url, "SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)::int")
        yield Stage(folder, url, pid, folder / "data" / "postgres.log", stack)


def machine_of(stage: Stage) -> Mapping[str, str]:
    """The machine and the versions that the figures belong to; nothing that tells whose machine it is."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    with tempfile.TemporaryFile(dir=stage.folder) as file:
        started = time.perf_counter()
        for _ in range(_DURABLE_WRITES):
            os.pwrite(file.fileno(), bytes(_PAGE_BYTES), 0)
            os.fdatasync(file.fileno())
        durable_ms = (time.perf_counter() - started) * 1e3 / _DURABLE_WRITES
    settings = (
        "server_version",
        "shared_buffers",
        "fsync",
        "synchronous_commit",
        "full_page_writes",
        "wal_sync_method",
    )
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
