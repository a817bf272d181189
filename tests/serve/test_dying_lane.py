"""A fault in the service's own code ends the process, loudly, and whoever supervises it starts another."""

import asyncio
from pathlib import Path

import aiohttp
import pytest

from tests.client import update
from tests.processes import running_service

# Read by Python before the service starts: to carry a change of user 666 raises something unforeseen.
SABOTAGE = """
from atomic_balance.commit import backlog

take_ready = backlog.Backlog.take_ready

def sabotaged(room, *arguments):
    batch = take_ready(room, *arguments)
    if batch and any(line.user_id == 666 for line in batch.lines()):
        raise RuntimeError("unforeseen")
    return batch

backlog.Backlog.take_ready = sabotaged
"""


@pytest.fixture
def environment(database_url: str, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE)
    return {"DATABASE_URL": database_url, "PYTHONPATH": str(tmp_path), "DRAIN_SECONDS": "0.5"}


async def test_a_lane_that_dies_ends_the_process(environment: dict[str, str], tmp_path: Path) -> None:
    async with running_service(environment, tmp_path) as service, aiohttp.ClientSession() as client:
        assert (await update(client, 1, user_id=1, url=service.url))[0] == 404
        assert (await update(client, 1, user_id=666, url=service.url))[0] == 503
        async with client.get(f"{service.url}/readyz") as answer:
            assert answer.status == 503
        async with asyncio.timeout(20):
            assert await service.process.wait() == 1
        log = "".join(service.log)
        assert "changes can't be carried any more" in log
        assert "unforeseen" in log


async def test_a_worker_whose_lane_dies_is_replaced(environment: dict[str, str], tmp_path: Path) -> None:
    async with (
        running_service({**environment, "WORKERS": "2"}, tmp_path) as service,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as client,
    ):
        for _ in range(3):
            assert (await update(client, 1, user_id=666, url=service.url))[0] == 503
            async with asyncio.timeout(20):
                while True:
                    try:
                        if (await update(client, 1, user_id=1, url=service.url))[0] == 404:
                            break
                    except aiohttp.ClientError:
                        await asyncio.sleep(0.05)
        assert service.process.returncode is None
