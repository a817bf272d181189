"""Several processes behind one port: exact counts, one set of metrics, and workers that die or stop."""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from atomic_balance.postgres.verify import verify
from tests.client import APPLIED, REFUSED, opened, persistently, withdraw
from tests.processes import Service, running_service

pytestmark = pytest.mark.slow

WORKERS = 3
PATIENT = {"DEADLINE_SECONDS": "50", "SHUTDOWN_SECONDS": "60"}  # nothing is late because the machine is busy


@pytest.fixture
async def service(database_url: str, tmp_path: Path) -> AsyncIterator[Service]:
    environment = {"DATABASE_URL": database_url, "WORKERS": str(WORKERS), **PATIENT}
    async with running_service(environment, tmp_path) as running:
        yield running


def workers(service: Service) -> list[psutil.Process]:
    return psutil.Process(service.process.pid).children()


async def said(service: Service, what: str, times: int) -> None:
    """Wait until the log says so, so many times."""
    async with asyncio.timeout(60):
        while sum(what in line for line in service.log) < times:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def race(caller: aiohttp.ClientSession, service: Service) -> Counter[tuple[int, str]]:
    return Counter(
        await asyncio.gather(*(persistently(caller, [service.url], f"k{number}") for number in range(10_000)))
    )


async def metrics(caller: aiohttp.ClientSession, service: Service) -> dict[str, float]:
    async with caller.get(f"{service.url}/metrics") as answer:
        text = await answer.text()
    return {
        " ".join((sample.name, *sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def shown(caller: aiohttp.ClientSession, service: Service, name: str, least: float) -> None:
    """Wait until the metric is at least so much; the time is only there for the test to end."""
    async with asyncio.timeout(60):
        while (await metrics(caller, service))[name] < least:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def all_at_work(caller: aiohttp.ClientSession, service: Service, count: int = WORKERS) -> None:
    await shown(caller, service, "atomic_balance_workers", count)


async def served_by(service: Service) -> set[str]:
    """The processes that answer a hundred connections: the ids that they give requests tell them apart."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as fresh:

        async def ask() -> str:
            async with fresh.get(f"{service.url}/healthz") as answer:
                return answer.headers["X-Request-ID"].split("-")[0]

        return set(await asyncio.gather(*(ask() for _ in range(100))))


async def test_the_race_with_several_workers(
    service: Service, caller: aiohttp.ClientSession, database_url: str
) -> None:
    await all_at_work(caller, service)
    await opened(caller, url=service.url)
    assert await race(caller, service) == {APPLIED: 5_000, REFUSED: 5_000}
    assert verify(database_url).differences == []
    seen = await metrics(caller, service)
    assert (
        seen["atomic_balance_changes_total applied"] == seen["atomic_balance_changes_total insufficient_funds"] == 5_000
    )
    assert seen["atomic_balance_change_duration_seconds_count"] == 10_000
    assert seen["atomic_balance_workers"] == WORKERS
    serving: set[str] = set()
    async with asyncio.timeout(60):
        while len(serving) < WORKERS:
            serving |= await served_by(service)


async def test_workers_that_are_added_count_too(
    database_url: str, tmp_path: Path, caller: aiohttp.ClientSession
) -> None:
    """More than twice as many as there were."""
    environment = {"DATABASE_URL": database_url, "WORKERS": "2", **PATIENT}
    async with running_service(environment, tmp_path) as service:
        await all_at_work(caller, service, 2)
        await opened(caller, url=service.url)
        for count in range(3, 7):
            service.process.send_signal(signal.SIGTTIN)
            await all_at_work(caller, service, count)
        assert await race(caller, service) == {APPLIED: 5_000, REFUSED: 5_000}
        before = await metrics(caller, service)
        assert before["atomic_balance_changes_total applied"] == 5_000
        assert before["atomic_balance_changes_total insufficient_funds"] == 5_000
        service.process.send_signal(signal.SIGTTOU)
        async with asyncio.timeout(60):
            while len(workers(service)) != 5:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        async with aiohttp.ClientSession() as fresh:
            after = await metrics(fresh, service)
        assert after["atomic_balance_workers"] == 5
        assert all(after[name] == before[name] for name in before if name.startswith("atomic_balance_changes_total"))


async def test_a_worker_that_dies_is_replaced_and_no_count_falls(
    service: Service, caller: aiohttp.ClientSession, database_url: str
) -> None:
    await all_at_work(caller, service)
    await opened(caller, url=service.url)
    running = asyncio.create_task(race(caller, service))
    async with aiohttp.ClientSession() as other:
        await shown(other, service, "atomic_balance_changes_total applied", 100)
        before = await metrics(other, service)
    for victim in workers(service)[:2]:
        victim.kill()
    assert not running.done()
    assert await running == {APPLIED: 5_000, REFUSED: 5_000}
    assert verify(database_url).differences == []
    await all_at_work(caller, service)
    after = await metrics(caller, service)
    assert all(after[name] >= before[name] for name in before if name.startswith("atomic_balance_changes_total"))
    assert after["atomic_balance_changes_total applied"] >= 5_000
    assert sum("was sent SIGKILL" in line for line in service.log) == 2
    async with caller.get(f"{service.url}/readyz") as answer:
        assert answer.status == 200


async def test_a_frozen_worker_delays_no_one_else(service: Service, caller: aiohttp.ClientSession) -> None:
    await all_at_work(caller, service)
    await opened(caller, url=service.url)
    victim = workers(service)[0]
    victim.suspend()
    try:
        answers = []
        for number in range(20):
            async with aiohttp.ClientSession() as fresh:
                answers.append(await withdraw(fresh, service.url, f"k{number}"))
        assert set(answers) == {APPLIED}
        assert victim.status() == psutil.STATUS_STOPPED, "it was replaced before the last answer"
    finally:
        victim.resume()


async def test_a_signal_to_a_worker_that_was_just_forked_is_not_lost(service: Service) -> None:
    """It still has its parent's handlers then. Each of the first workers is told to stop as soon as it can be seen."""
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children")

    def stop_each() -> list[psutil.Process]:
        told: dict[int, psutil.Process] = {}
        give_up = time.monotonic() + 60
        while len(told) < 20 and time.monotonic() < give_up:
            for pid in set(map(int, children.read_text().split())) - told.keys():
                told[pid] = psutil.Process(pid)
                told[pid].terminate()
        return list(told.values())

    told = await asyncio.to_thread(stop_each)
    assert len(told) == 20
    _, alive = await asyncio.to_thread(psutil.wait_procs, told, timeout=30)
    assert alive == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_stopping_answers_what_was_accepted(
    service: Service, caller: aiohttp.ClientSession, database_url: str, number: signal.Signals
) -> None:
    await all_at_work(caller, service)
    await opened(caller, url=service.url)
    with psycopg.connect(database_url) as blocker:
        blocker.execute("UPDATE users SET balance = balance WHERE id = 1")
        running = asyncio.gather(*(withdraw(caller, service.url, f"k{key}") for key in range(400)))
        await shown(caller, service, "atomic_balance_waiting_changes", 400)
        service.process.send_signal(number)
        await said(service, "stopping: what was accepted is still answered", WORKERS)
        blocker.rollback()
    assert Counter(await running) == {APPLIED: 400}
    assert await service.process.wait() == 0


async def test_stopping_while_the_workers_are_being_started(database_url: str, tmp_path: Path) -> None:
    environment = {"DATABASE_URL": database_url, "WORKERS": str(WORKERS)}
    for _ in range(3):
        async with running_service(environment, tmp_path) as service:
            service.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(60):
                assert await service.process.wait() == 0


async def test_reloading_replaces_every_worker_and_answers_everybody(
    database_url: str, tmp_path: Path, caller: aiohttp.ClientSession
) -> None:
    """The callers' connections may lie idle for DRAIN_SECONDS, and they do on a machine that has other things to do."""
    environment = {"DATABASE_URL": database_url, "WORKERS": str(WORKERS), **PATIENT, "DRAIN_SECONDS": "5"}
    async with running_service(environment, tmp_path) as service:
        await all_at_work(caller, service)
        await opened(caller, url=service.url)
        old = {worker.pid for worker in workers(service)}
        running = asyncio.gather(*(withdraw(caller, service.url, f"k{number}") for number in range(10_000)))
        async with aiohttp.ClientSession() as other:
            await shown(other, service, "atomic_balance_changes_total applied", 100)
        service.process.send_signal(signal.SIGHUP)
        assert Counter(await running) == {APPLIED: 5_000, REFUSED: 5_000}
        async with asyncio.timeout(60):
            while len(new := {worker.pid for worker in workers(service)}) != WORKERS or old & new:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await all_at_work(caller, service)


async def test_without_their_parent_the_workers_stop_and_no_server_is_left(
    tmp_path: Path, caller: aiohttp.ClientSession
) -> None:
    environment = {"WORKERS": str(WORKERS), "DATA_DIR": str(tmp_path / "data")}
    async with running_service(environment, tmp_path) as service:
        await all_at_work(caller, service)
        family = psutil.Process(service.process.pid).children(recursive=True)
        service.process.send_signal(signal.SIGKILL)
        _, alive = await asyncio.to_thread(psutil.wait_procs, family, timeout=30)
        try:
            assert alive == []
        finally:
            for process in alive:
                process.kill()


async def test_a_worker_that_ends_leaves_the_embedded_server_alone(
    tmp_path: Path, caller: aiohttp.ClientSession
) -> None:
    environment = {"WORKERS": str(WORKERS), "DATA_DIR": str(tmp_path / "data")}
    async with running_service(environment, tmp_path) as service:
        await opened(caller, url=service.url)
        await all_at_work(caller, service)
        for child in workers(service):
            if child.cmdline() == psutil.Process(service.process.pid).cmdline():
                child.terminate()
                await asyncio.to_thread(child.wait, 60)
        async with aiohttp.ClientSession() as fresh:
            assert await withdraw(fresh, service.url, "k") == APPLIED
