"""Servers as processes: started, waited for, watched, stopped."""

import contextlib
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

_START_SECONDS = 60
_STOP_SECONDS = 30
_POLL_SECONDS = 0.02
_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")


class BenchmarkError(Exception):
    """The benchmark can't go on, or found something wrong; the text says what."""


class Server(NamedTuple):
    """A running HTTP server: its port on 127.0.0.1 and its process."""

    port: int
    pid: int


@contextlib.contextmanager
def http_server(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[Server]:
    """Run a server that prints its address; its output goes to `log`."""
    with running(command, environment, log) as process:
        for _ in polling(process, log):
            if found := _ADDRESS.search(log.read_text()):
                yield Server(int(found[1]), process.pid)
                return


@contextlib.contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in the folder of `log`, where its output goes, and stop it at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=log.parent, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def polling(process: subprocess.Popen[bytes], log: Path) -> Iterator[None]:
    """Give control again and again until the caller has seen that `process` is ready; raise if it can't be any more."""
    give_up = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < give_up:
        time.sleep(_POLL_SECONDS)
        yield
    raise BenchmarkError(f"{process.args!r} did not start:\n{log.read_text()}")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of all the children it has had, those that are gone included."""
    process = psutil.Process(pid)
    while True:
        times = process.cpu_times()
        seconds = sum(times[:4])  # user and system: its own, and of the children that it has waited for
        for child in process.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                seconds += sum(child.cpu_times()[:2])
        now = process.cpu_times()
        if (times.children_user, times.children_system) == (now.children_user, now.children_system):
            return seconds  # no child went meanwhile, which would have been counted twice or not at all
