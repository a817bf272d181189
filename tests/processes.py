"""The service as processes of its own: started as a user starts it, on a free port, and stopped by their ids."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from atomic_balance.settings import Settings

ROOT = Path(__file__).parents[1]
ALWAYS: dict[str, str] = {}
"""The settings that every process of a test is started with."""

_START_SECONDS = 60
_SERVES = re.compile(rb"serves on (http://[^\s\"]+)")


class Service(NamedTuple):
    """A running service: where it answers, its process, and the lines it has logged so far."""

    url: str
    process: Process
    log: list[str]


@contextlib.asynccontextmanager
async def running_service(
    environment: Mapping[str, str], directory: Path, through: Sequence[str] = ()
) -> AsyncIterator[Service]:
    """Run `python -m atomic_balance` in `directory` until it serves, and stop it at the end if it still runs.

    `through`: a command that is to run it, if it is not to be run directly.
    """
    process = await asyncio.create_subprocess_exec(
        *through,
        sys.executable,
        *("-m", "atomic_balance"),
        cwd=directory,
        env={**bare_environment(), "PORT": "0", **environment},
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr
    log: list[str] = []
    async with asyncio.TaskGroup() as tasks:
        try:
            async with asyncio.timeout(_START_SECONDS):
                async for line in process.stderr:
                    log.append(line.decode())
                    if found := _SERVES.search(line):
                        break
                else:
                    raise AssertionError(f"the service did not start: {''.join(log)}")
            tasks.create_task(_follow(process.stderr, log))
            yield Service(found[1].decode(), process, log)
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(_START_SECONDS):
                await process.wait()


async def run(*command: str, directory: Path, environment: Mapping[str, str] = {}) -> tuple[int, str]:
    """Run a command to its end; its exit status, and what it printed on both outputs."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=directory,
        env={**bare_environment(), **environment},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


def bare_environment() -> dict[str, str]:
    """This process's environment, without any setting of the service but `ALWAYS`."""
    return {name: value for name, value in os.environ.items() if name not in Settings.__struct_encode_fields__} | ALWAYS


async def _follow(stream: asyncio.StreamReader, log: list[str]) -> None:
    async for line in stream:
        log.append(line.decode())  # noqa: PERF401 - the lines must be there as they come
