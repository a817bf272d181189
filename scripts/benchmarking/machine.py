"""The machine and the versions that the figures belong to; nothing that tells whose machine it is."""

import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psutil

from benchmarking.pgbench import find_pgbench

_PACKAGES = ("aiohttp", "asyncpg", "msgspec", "uvloop", "redis", "hiredis")
_PROGRAMS = {"wrk": "-v", "redis-server": "--version"}
_PAGE_BYTES = 8192
_DURABLE_WRITES = 100


def describe_machine(folder: Path) -> Mapping[str, str]:
    """The machine; `folder` is where the databases are."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    mounts = [mount for mount in psutil.disk_partitions(all=True) if folder.is_relative_to(mount.mountpoint)]
    return {
        "processor": model[1] if model else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "file system": max(mounts, key=lambda mount: len(mount.mountpoint)).fstype,
        "a page written durably (fdatasync)": f"{_durable_write_ms(folder):.2f} ms",
    }


def describe_versions(postgres_version: str) -> Mapping[str, str]:
    """The versions of what takes part; programs that are not installed are left out."""
    programs = dict(_PROGRAMS)
    if pgbench := find_pgbench():
        programs[pgbench] = "--version"
    return {
        "PostgreSQL": postgres_version,
        "Python": platform.python_version(),
        **{f"{name} (Python)" if name == "redis" else name: version(name) for name in _PACKAGES},
        **{Path(name).name: _version(name, option) for name, option in programs.items() if shutil.which(name)},
    }


def _version(program: str, option: str) -> str:
    # wrk shows its usage as well, and exits with 1.
    printed = subprocess.run([program, option], capture_output=True, text=True, check=False).stdout
    found = re.search(r"\d+\.\d+(\.\d+)?", printed)
    return found[0] if found else "unknown"


def _durable_write_ms(folder: Path) -> float:
    durations = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(_DURABLE_WRITES):
            started = time.perf_counter()
            os.pwrite(file.fileno(), bytes(_PAGE_BYTES), 0)
            os.fdatasync(file.fileno())
            durations.append((time.perf_counter() - started) * 1e3)
    return median(durations)
