"""Holds while processes are killed or stand still: who asks again gets their outcome, and what expires is settled."""

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psycopg
import pytest

from atomic_balance.postgres.verify import verify
from tests.client import Told, hold, opened, session, settle
from tests.database import Database, until
from tests.killable import KillableServer, killable_server
from tests.processes import Service, running_service

pytestmark = pytest.mark.slow

LIVES = 3_000
ENDS = ("capture", "release", "part")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[KillableServer]:
    """A PostgreSQL server to be killed."""
    with killable_server(tmp_path / "data") as running:
        yield running


async def persistently(urls: Sequence[str], ask: Callable[[str], Awaitable[Told]]) -> Told:
    """Ask again, here and there, until there is an outcome."""
    for attempt in range(1_000):
        try:
            told = await ask(urls[attempt % len(urls)])
        except (aiohttp.ClientError, ConnectionError):
            pass
        else:
            if told.status not in (503, 504):
                return told
        await asyncio.sleep(0.05)
    raise AssertionError("no outcome")


async def live(client: aiohttp.ClientSession, urls: Sequence[str], number: int) -> str:
    """Place a hold of 2 and end it; gives how it ended."""
    hold_id, how = f"hold-{number}", ENDS[number % 3]
    placed = await persistently(urls, lambda url: hold(client, hold_id, 2, url=url))
    if placed.status == 400:
        again = await persistently(urls, lambda url: settle(client, "release", hold_id, url=url))
        assert again.status == 404
        return "refused"
    assert placed.status in (200, 201)
    assert placed.body["status"] == "held"
    if how == "release":
        ended = await persistently(urls, lambda url: settle(client, "release", hold_id, url=url))
        expected: dict[str, Any] = {"status": "released"}
    else:
        body = {"amount": 1} if how == "part" else {}
        ended = await persistently(urls, lambda url: settle(client, "capture", hold_id, url=url, **body))
        expected = {"status": "captured", "captured": 1 if how == "part" else 2}
    assert ended.status == 200
    assert ended.body.items() >= expected.items()
    return how


def sums_fit(url: str, ends: Counter[str]) -> None:
    """Hold the account and its journal against what the callers were told."""
    with psycopg.connect(url) as connection:
        found = connection.execute(
            "SELECT balance, held, version, (SELECT count(*) FROM open_holds) FROM users"
        ).fetchone()
    placed = sum(ends.values()) - ends["refused"]
    assert found == (5_000 - 2 * ends["capture"] - ends["part"], 0, 2 * placed, 0)
    assert verify(url).differences == []


async def test_the_database_dies_in_the_middle_of_holds(server: KillableServer, tmp_path: Path) -> None:
    async with (
        running_service({"DATABASE_URL": server.url, "STATEMENT_SECONDS": "2"}, tmp_path) as service,
        session() as client,
    ):
        await opened(client, 5_000, url=service.url)
        lives = asyncio.gather(*(live(client, [service.url], number) for number in range(LIVES)))
        deaths = 0
        while deaths < 4:
            await asyncio.sleep(0.15)
            if lives.done():
                break
            if deaths % 2:
                await server.kill_backend()
            else:
                server.kill()
                server.start()
            deaths += 1
        assert deaths >= 2, "a fast machine: both kinds of death must come before all is over"
        ends = Counter(await lives)
    assert set(ends) >= set(ENDS)
    sums_fit(server.url, ends)


async def test_the_service_dies_in_the_middle_of_holds(database: Database, tmp_path: Path) -> None:
    environment = {"DATABASE_URL": database.url}
    async with running_service(environment, tmp_path) as other, session() as client:
        async with running_service(environment, tmp_path) as service:
            await opened(client, 5_000, url=service.url)
            urls = [service.url, other.url]
            lives = asyncio.gather(*(live(client, urls, number) for number in range(LIVES)))
            await asyncio.sleep(0.7)
            assert not lives.done()
            service.process.send_signal(signal.SIGKILL)
            await service.process.wait()
        port = service.url.rsplit(":", 1)[1]
        async with running_service({**environment, "PORT": port}, tmp_path):
            ends = Counter(await lives)
    assert set(ends) >= set(ENDS)
    sums_fit(database.url, ends)


async def expired_by(client: aiohttp.ClientSession, service: Service) -> int:
    """How many holds a service says that it has settled because they had expired."""
    async with client.get(f"{service.url}/metrics") as answer:
        text = await answer.text()
    (line,) = (line for line in text.splitlines() if line.startswith('atomic_balance_holds_total{event="expired"}'))
    return int(float(line.split()[1]))


async def expire(client: aiohttp.ClientSession, database: Database, service: Service, prefix: str) -> None:
    """Place a thousand holds that last for a second, and wait until all are settled."""
    chance = random.Random(prefix)
    answers = await asyncio.gather(
        *(
            hold(client, f"{prefix}-{number}", 1, chance.randint(1, 20), service.url, expiresInSeconds=1)
            for number in range(1_000)
        )
    )
    assert {answer.status for answer in answers} == {201}
    await until(lambda: database.execute("SELECT count(*) FROM open_holds") == [(0,)])


async def test_the_process_that_has_the_turn_to_settle_stands_still_then_goes_on_and_dies(
    database: Database, tmp_path: Path
) -> None:
    """Another one takes over, and what the first does when it goes on does no harm."""
    environment = {"DATABASE_URL": database.url}
    database.open(dict.fromkeys(range(1, 21), 10_000))
    async with (
        running_service(environment, tmp_path) as one,
        running_service(environment, tmp_path) as two,
        running_service(environment, tmp_path) as three,
        session() as client,
    ):
        services = [one, two, three]
        await expire(client, database, one, "first")
        (first,) = [service for service in services if await expired_by(client, service)]
        others = [service for service in services if service is not first]

        waiting = asyncio.create_task(expire(client, database, others[0], "second"))
        await asyncio.sleep(1.2)  # many a settlement is under way by now
        first.process.send_signal(signal.SIGSTOP)
        await waiting
        first.process.send_signal(signal.SIGCONT)
        await expire(client, database, others[0], "third")
        counts = [await expired_by(client, service) for service in others]
        assert sum(counts) > 0
        second, third = others if counts[0] > counts[1] else reversed(others)

        before = await expired_by(client, first) + await expired_by(client, third)
        waiting = asyncio.create_task(expire(client, database, first, "fourth"))
        await asyncio.sleep(0.5)
        second.process.send_signal(signal.SIGKILL)
        await waiting
        assert await expired_by(client, first) + await expired_by(client, third) > before
    assert database.execute("SELECT sum(held), sum(version) FROM users") == [(0, 8_000)]
    assert verify(database.url).differences == []
