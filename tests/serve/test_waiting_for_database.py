"""A database that is away at the start is waited for; one that is not fit to serve on ends the service all the same."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.client import update
from tests.database import Database
from tests.fault_proxy import FaultProxy, Link
from tests.processes import Service, running_service

PATIENT = {"DEADLINE_SECONDS": "50", "SHUTDOWN_SECONDS": "60"}  # nothing is late because the machine is busy
END_SECONDS = 40

each_number_of_workers = pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])


@asynccontextmanager
async def service_without_database(
    url: str, directory: Path, workers: str, how: object = Link.cut
) -> AsyncIterator[tuple[Service, FaultProxy]]:
    """A service whose database is away, and the proxy that lets it through to the one at `url` when asked to."""
    with Database(url) as database:
        async with database.proxied() as (proxy, away):
            proxy.greet = how  # type: ignore[assignment]
            environment = {"DATABASE_URL": away, "WORKERS": workers, **PATIENT}
            async with running_service(environment, directory) as service:
                yield service, proxy


async def readiness(caller: aiohttp.ClientSession, service: Service) -> tuple[int, dict[str, str]]:
    async with caller.get(f"{service.url}/readyz") as answer:
        return answer.status, json.loads(await answer.read())["checks"]


async def said(service: Service, words: str) -> None:
    async with asyncio.timeout(END_SECONDS):
        while not any(words in line for line in service.log):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def ended(service: Service) -> int:
    async with asyncio.timeout(END_SECONDS):
        return await service.process.wait()


@each_number_of_workers
async def test_a_database_that_is_away_at_the_start_is_waited_for(
    database: Database, caller: aiohttp.ClientSession, tmp_path: Path, workers: str
) -> None:
    database.open({1: 10})
    async with service_without_database(database.url, tmp_path, workers) as (service, proxy):
        await said(service, "waiting for the database, which can't be reached: ")
        async with caller.get(f"{service.url}/healthz") as answer:
            assert answer.status == 200
        status, checks = await readiness(caller, service)
        assert (status, checks["schema"]) == (503, "not known")
        assert checks["database"].startswith("has not answered for ")
        change = asyncio.create_task(update(caller, 1, url=service.url))
        proxy.greet = None
        assert (await change)[0] == 200
        async with asyncio.timeout(END_SECONDS):
            while (await readiness(caller, service))[0] != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await said(service, "the database answers")
        complaints = [line for line in service.log if '"level":"warning"' in line]
        assert len(complaints) <= 4 * int(workers), complaints  # now and then, not at each try


@each_number_of_workers
async def test_a_schema_that_turns_out_to_be_behind_ends_the_service(
    empty_database_url: str, tmp_path: Path, workers: str
) -> None:
    async with service_without_database(empty_database_url, tmp_path, workers) as (service, proxy):
        await said(service, "waiting for the database")
        proxy.greet = None
        assert await ended(service) == 1
        await said(service, "the schema is behind, without 0001-users")
        assert not any("Traceback" in line for line in service.log), service.log


@each_number_of_workers
async def test_a_service_that_waits_for_a_mute_database_can_be_stopped(
    database_url: str, tmp_path: Path, workers: str
) -> None:
    async with service_without_database(database_url, tmp_path, workers, Link.swallow) as (service, _):
        await said(service, "waiting for the database")
        service.process.send_signal(signal.SIGTERM)
        assert await ended(service) == 0
