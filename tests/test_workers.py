"""Several processes behind one port: exact counts, one set of metrics, and workers that die or stop."""

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from atomic_balance.verify import verify
from tests.processes import Service, running_service

pytestmark = pytest.mark.slow

WORKERS = 3
APPLIED = (200, "applied")
REFUSED = (400, '{"error":"Insufficient funds"}')


@pytest.fixture
async def service(database_url: str, tmp_path: Path) -> AsyncIterator[Service]:
    environment = {"DATABASE_URL": database_url, "WORKERS": str(WORKERS), "DRAIN_SECONDS": "1"}
    async with running_service(environment, tmp_path) as running:
        yield running


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=500)) as session:
        yield session


def workers(service: Service) -> list[psutil.Process]:
    return psutil.Process(service.process.pid).children()


async def opened(client: aiohttp.ClientSession, service: Service) -> None:
    async with client.put(f"{service.url}/api/users/1", json={"balance": 10_000}) as answer:
        assert answer.status == 201


async def withdraw(client: aiohttp.ClientSession, service: Service, key: str) -> tuple[int, str]:
    body = {"userId": 1, "amount": -2}
    headers = {"Idempotency-Key": key}
    async with client.post(f"{service.url}/api/balance/update", json=body, headers=headers) as answer:
        return answer.status, "applied" if answer.status == 200 else await answer.text()


async def persistently(client: aiohttp.ClientSession, service: Service, key: str) -> tuple[int, str]:
    while True:
        try:
            return await withdraw(client, service, key)
        except aiohttp.ClientError:
            await asyncio.sleep(0.02)


async def race(client: aiohttp.ClientSession, service: Service) -> Counter[tuple[int, str]]:
    return Counter(await asyncio.gather(*(persistently(client, service, f"k{number}") for number in range(10_000))))


async def metrics(client: aiohttp.ClientSession, service: Service) -> dict[str, float]:
    async with client.get(f"{service.url}/metrics") as answer:
        text = await answer.text()
    return {
        " ".join((sample.name, *sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def all_at_work(client: aiohttp.ClientSession, service: Service) -> None:
    async with asyncio.timeout(10):
        while (await metrics(client, service))["atomic_balance_workers"] != WORKERS:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_the_race_with_several_workers(
    service: Service, client: aiohttp.ClientSession, database_url: str
) -> None:
    await all_at_work(client, service)
    await opened(client, service)
    assert await race(client, service) == {APPLIED: 5_000, REFUSED: 5_000}
    assert verify(database_url).differences == []
    seen = await metrics(client, service)
    assert (
        seen["atomic_balance_changes_total applied"] == seen["atomic_balance_changes_total insufficient_funds"] == 5_000
    )
    assert seen["atomic_balance_change_duration_seconds_count"] == 10_000
    assert seen["atomic_balance_workers"] == WORKERS
    connections = [seen[f"process_open_fds {worker}"] for worker in range(WORKERS)]
    assert max(connections) < 0.9 * sum(connections), "one worker did it all"


async def test_a_worker_that_dies_is_replaced_and_no_count_falls(
    service: Service, client: aiohttp.ClientSession, database_url: str
) -> None:
    await all_at_work(client, service)
    await opened(client, service)
    running = asyncio.create_task(race(client, service))
    await asyncio.sleep(0.3)
    async with aiohttp.ClientSession() as other:
        before = await metrics(other, service)
    for victim in workers(service)[:2]:
        victim.kill()
    assert not running.done()
    assert await running == {APPLIED: 5_000, REFUSED: 5_000}
    assert verify(database_url).differences == []
    await all_at_work(client, service)
    after = await metrics(client, service)
    assert all(after[name] >= before[name] for name in before if name.startswith("atomic_balance_changes_total"))
    assert after["atomic_balance_changes_total applied"] >= 5_000
    assert sum("was sent SIGKILL" in line for line in service.log) == 2
    async with client.get(f"{service.url}/readyz") as answer:
        assert answer.status == 200


async def test_a_frozen_worker_delays_no_one_else(service: Service, client: aiohttp.ClientSession) -> None:
    await all_at_work(client, service)
    await opened(client, service)
    victim = workers(service)[0]
    victim.suspend()
    try:
        answers = []
        for number in range(20):
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(5)) as fresh:
                answers.append(await withdraw(fresh, service, f"k{number}"))
        assert set(answers) == {APPLIED}
    finally:
        victim.resume()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_stopping_answers_what_was_accepted(
    service: Service, client: aiohttp.ClientSession, number: signal.Signals
) -> None:
    await all_at_work(client, service)
    await opened(client, service)
    running = asyncio.gather(*(withdraw(client, service, f"k{key}") for key in range(500)))
    await asyncio.sleep(0.1)
    service.process.send_signal(number)
    assert Counter(await running) == {APPLIED: 500}
    assert await service.process.wait() == 0


async def test_stopping_while_the_workers_are_being_started(database_url: str, tmp_path: Path) -> None:
    environment = {"DATABASE_URL": database_url, "WORKERS": str(WORKERS)}
    for _ in range(3):
        async with running_service(environment, tmp_path) as service:
            service.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                assert await service.process.wait() == 0


async def test_reloading_replaces_every_worker_and_answers_everybody(
    service: Service, client: aiohttp.ClientSession
) -> None:
    await all_at_work(client, service)
    await opened(client, service)
    old = {worker.pid for worker in workers(service)}
    running = asyncio.gather(*(withdraw(client, service, f"k{number}") for number in range(10_000)))
    await asyncio.sleep(0.2)
    service.process.send_signal(signal.SIGHUP)
    assert Counter(await running) == {APPLIED: 5_000, REFUSED: 5_000}
    async with asyncio.timeout(20):
        while len(new := {worker.pid for worker in workers(service)}) != WORKERS or old & new:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await all_at_work(client, service)


async def test_without_their_parent_the_workers_stop_and_no_server_is_left(tmp_path: Path) -> None:
    environment = {"WORKERS": str(WORKERS), "DATA_DIR": str(tmp_path / "data")}
    async with running_service(environment, tmp_path) as service:
        family = psutil.Process(service.process.pid).children(recursive=True)
        assert len(family) > WORKERS  # the embedded server's are among them
        service.process.send_signal(signal.SIGKILL)
        _, alive = await asyncio.to_thread(psutil.wait_procs, family, timeout=15)
        assert alive == []


async def test_a_worker_that_ends_leaves_the_embedded_server_alone(
    tmp_path: Path, client: aiohttp.ClientSession
) -> None:
    environment = {"WORKERS": str(WORKERS), "DATA_DIR": str(tmp_path / "data")}
    async with running_service(environment, tmp_path) as service:
        await opened(client, service)
        await all_at_work(client, service)
        for child in workers(service):
            if child.cmdline() == psutil.Process(service.process.pid).cmdline():
                child.terminate()
                await asyncio.to_thread(child.wait, 10)
        async with aiohttp.ClientSession() as fresh:
            assert await withdraw(fresh, service, "k") == APPLIED
