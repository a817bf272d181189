"""Three services share one database through PgBouncer in transaction mode, where no session is anybody's own."""

import asyncio
import contextlib
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psycopg
import pytest

from atomic_balance.postgres.migrations import migrate
from atomic_balance.postgres.verify import verify
from tests.client import APPLIED, REFUSED, balance, opened, session, update, withdraw
from tests.pgbouncer import PROGRAM, PgBouncer, running_pgbouncer
from tests.processes import Service, running_service

SERVER_CONNECTIONS = 4  # fewer than the services' 12 lanes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PROGRAM is None and os.environ.get("CI") != "true",
        reason="PgBouncer is not installed (apt-get install pgbouncer)",
    ),
]


@pytest.fixture
async def pgbouncer(database_url: str, tmp_path: Path, unused_tcp_port: int) -> AsyncIterator[PgBouncer]:
    async with running_pgbouncer(database_url, unused_tcp_port, SERVER_CONNECTIONS, tmp_path) as running:
        yield running


@pytest.fixture
async def services(pgbouncer: PgBouncer, tmp_path: Path) -> AsyncIterator[list[Service]]:
    environment = {"DATABASE_URL": pgbouncer.url, "PREPARED_STATEMENTS": "false"}
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(running_service(environment, tmp_path)) for _ in range(3)]


@pytest.fixture
async def client(services: list[Service]) -> AsyncIterator[aiohttp.ClientSession]:
    async with session() as caller:
        await opened(caller, url=services[0].url)
        yield caller


async def test_the_reference_race(services: list[Service], client: aiohttp.ClientSession, pgbouncer: PgBouncer) -> None:
    answers = Counter(await asyncio.gather(*(withdraw(client, services[n % 3].url) for n in range(10_000))))
    assert answers == {APPLIED: 5_000, REFUSED: 5_000}
    assert [await balance(client, service.url) for service in services] == [0, 0, 0]
    found = await asyncio.to_thread(verify, pgbouncer.url)
    assert (found.changes, found.differences) == (5_000, [])


async def test_deposits_and_withdrawals_add_up(
    services: list[Service], client: aiohttp.ClientSession, database_url: str
) -> None:
    amounts = [random.Random(number).choice((-7000, -3000, -1, 2, 4000)) for number in range(3_000)]
    answers = await asyncio.gather(
        *(update(client, amount, url=services[n % 3].url) for n, amount in enumerate(amounts))
    )
    assert {status for status, _ in answers} == {200, 400}
    applied = sum(amount for amount, (status, _) in zip(amounts, answers, strict=True) if status == 200)
    assert await balance(client, services[0].url) == 10_000 + applied
    assert verify(database_url).differences == []


async def test_a_storm_of_one_key(services: list[Service], client: aiohttp.ClientSession) -> None:
    answers = await asyncio.gather(*(withdraw(client, services[n % 3].url, "k") for n in range(300)))
    assert set(answers) == {APPLIED}
    assert await balance(client, services[0].url) == 9_998


async def test_pgbouncer_dies_in_the_middle_of_the_race(
    services: list[Service], client: aiohttp.ClientSession, pgbouncer: PgBouncer, database_url: str
) -> None:
    """Without a single retry by a client."""
    race = asyncio.gather(*(withdraw(client, services[n % 3].url) for n in range(10_000)))
    for _ in range(3):
        await asyncio.sleep(0.2)
        assert not race.done()
        await pgbouncer.kill()
        await pgbouncer.start()
    assert Counter(await race) == {APPLIED: 5_000, REFUSED: 5_000}
    assert verify(database_url).differences == []


async def test_a_blocked_row_delays_its_own_account_alone(
    services: list[Service], client: aiohttp.ClientSession, database_url: str
) -> None:
    """A statement itself limits how long it waits for a row: a pooler keeps no session's settings."""
    await opened(client, 10, user_id=2, url=services[0].url)
    with psycopg.connect(database_url) as blocker:
        blocker.execute("UPDATE users SET balance = balance WHERE id = 2")
        async with asyncio.timeout(5):
            blocked = asyncio.create_task(update(client, -1, user_id=2, url=services[0].url))
            assert set(await asyncio.gather(*(withdraw(client, services[n % 3].url) for n in range(100)))) == {APPLIED}
        assert not blocked.done()
        blocker.rollback()
    assert (await blocked)[0] == 200


async def test_tables_in_a_schema_of_their_own(pgbouncer: PgBouncer, database_url: str, tmp_path: Path) -> None:
    """Which no session's search path names: it would be another's next moment."""
    migrate(database_url, schema="balances")
    environment = {"DATABASE_URL": pgbouncer.url, "PREPARED_STATEMENTS": "false", "DATABASE_SCHEMA": "balances"}
    async with running_service(environment, tmp_path) as service, session() as caller:
        await opened(caller, url=service.url)
        answers = Counter(await asyncio.gather(*(withdraw(caller, service.url) for _ in range(6_000))))
    assert answers == {APPLIED: 5_000, REFUSED: 1_000}
    found = await asyncio.to_thread(verify, pgbouncer.url, schema="balances")
    assert (found.accounts, found.changes, found.differences) == (1, 5_000, [])
    assert verify(database_url).accounts == 0
