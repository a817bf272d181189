"""Log lines: nobody waits for them to be read, none is lost that can be written, and what is dropped is counted."""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.processes import bare_environment, running_service

REQUESTS = 3_000
"""More lines than the pipe and the queues of two workers hold."""


class Unread(NamedTuple):
    """A running service whose log nobody reads; `log` is the end of the pipe at which one could."""

    url: str
    process: Process
    log: int


@contextlib.asynccontextmanager
async def unread(environment: Mapping[str, str], directory: Path) -> AsyncIterator[Unread]:
    """Run a service that logs every request, with a pipe for its log that is read until it serves and no further."""
    log, inherited = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "atomic_balance"),
        cwd=directory,
        env={**bare_environment(), "PORT": "0", "LOG_REQUESTS": "true", **environment},
        stderr=inherited,
        start_new_session=True,
    )
    os.close(inherited)
    try:
        text = b""
        while not (found := re.search(rb"serves on (http://[^\s\"]+)", text)):
            read = await asyncio.to_thread(os.read, log, 65_536)
            assert read, text
            text += read
        yield Unread(found[1].decode(), process, log)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        with contextlib.suppress(OSError):
            os.close(log)


async def ask(client: aiohttp.ClientSession, url: str, times: int) -> None:
    for _ in range(times):
        async with client.get(f"{url}/healthz") as answer:
            assert answer.status == 200


async def dropped(client: aiohttp.ClientSession, url: str) -> float:
    async with client.get(f"{url}/metrics") as answer:
        families = text_string_to_metric_families(await answer.text())
    return next(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == "atomic_balance_log_lines_dropped_total"
    )


def lines(text: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_log_that_nobody_reads_stops_no_answer_and_no_stop(
    database_url: str, tmp_path: Path, workers: int
) -> None:
    async with (
        unread({"DATABASE_URL": database_url, "WORKERS": str(workers)}, tmp_path) as service,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(20)) as client,
    ):
        await ask(client, service.url, workers * REQUESTS)
        async with asyncio.timeout(10):
            while not await dropped(client, service.url):  # noqa: ASYNC110 - it is asked of a process
                await asyncio.sleep(0.1)
        service.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            assert await service.process.wait() == 0


async def test_once_the_log_is_read_again_it_says_how_many_lines_are_missing(database_url: str, tmp_path: Path) -> None:
    async with (
        unread({"DATABASE_URL": database_url}, tmp_path) as service,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(20)) as client,
    ):
        await ask(client, service.url, REQUESTS)
        assert await dropped(client, service.url) > 0
        service.process.send_signal(signal.SIGTERM)
        text = await asyncio.to_thread(read_all, service.log)
        assert await service.process.wait() == 0
    found = lines(text)
    missing = [int(line["message"].split()[0]) for line in found if "were dropped" in line["message"]]
    written = sum("/healthz" in line["message"] or "/metrics" in line["message"] for line in found)
    stopping = sum("stopping" in line["message"] for line in found)
    assert written + stopping + sum(missing) == REQUESTS + 2


def read_all(descriptor: int) -> bytes:
    return b"".join(iter(lambda: os.read(descriptor, 65_536), b""))


async def test_a_log_whose_reader_has_gone_stops_no_answer(database_url: str, tmp_path: Path) -> None:
    async with (
        unread({"DATABASE_URL": database_url}, tmp_path) as service,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(20)) as client,
    ):
        os.close(service.log)
        await ask(client, service.url, 100)
        async with asyncio.timeout(10):
            while await dropped(client, service.url) < 100:  # noqa: ASYNC110 - it is asked of a process
                await asyncio.sleep(0.1)
        service.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            assert await service.process.wait() == 0


@pytest.mark.parametrize("workers", [1, 2])
async def test_every_line_is_written_before_the_end(database_url: str, tmp_path: Path, workers: int) -> None:
    environment = {"DATABASE_URL": database_url, "WORKERS": str(workers), "LOG_REQUESTS": "true"}
    async with running_service(environment, tmp_path) as service, aiohttp.ClientSession() as client:
        await asyncio.gather(*(ask(client, service.url, 20) for _ in range(20)))
    found = lines("".join(service.log).encode())
    assert sum("/healthz" in line["message"] for line in found) == 400
    assert sum("stopping" in line["message"] for line in found) == workers
