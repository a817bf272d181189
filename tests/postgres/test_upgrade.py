"""From version 0.1.0 to this one, on a database that it made: while a process of each applies changes."""

import asyncio
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest
from pytest_aiohttp import AiohttpClient

from atomic_balance.changes import BALANCE_LIMIT
from atomic_balance.http.app import make_app
from atomic_balance.postgres.migrations import migrate
from atomic_balance.postgres.verify import verify
from atomic_balance.settings import Settings
from tests.client import Client
from tests.database import Database
from tests.postgres.test_version_0_1_0 import apply, prepare

BALANCES = {1: 75, 2: 206, 3: -12, 4: 400, 5: -50, BALANCE_LIMIT: BALANCE_LIMIT}
CHANGES = 7
"""How many the journal of that database has, applied ones."""


@pytest.fixture
def made_by_0_1_0(empty_database_url: str) -> Iterator[Database]:
    """A database as version 0.1.0 left it."""
    with Database(empty_database_url) as database:
        database.execute(Path(__file__).with_name("version-0.1.0.sql").read_text())
        yield database


class OldProcess:
    """A process of version 0.1.0, which deposits 1 to user 1 and withdraws 1 from user 4, over and over."""

    def __init__(self, url: str) -> None:
        self.applied = 0
        self._stopping = threading.Event()
        self._work = threading.Thread(target=self._run, args=(url,))
        self._work.start()

    def _run(self, url: str) -> None:
        with Database(url) as database:
            prepare(database)
            while not self._stopping.is_set():
                try:
                    results = apply(database, {1: 1, 4: -1}, f"old-{self.applied}")
                except psycopg.errors.LockNotAvailable:
                    continue  # a migration has the table: as its service does, it sends the batch again
                assert [(user_id, applied) for user_id, applied, _ in results] == [(1, True), (4, True)]
                self.applied += 1

    def stop(self) -> None:
        self._stopping.set()
        self._work.join(20)

    async def until(self, applied: int) -> None:
        """Wait until it has applied so many batches."""
        async with asyncio.timeout(20):
            while self.applied < applied:
                assert self._work.is_alive()
                await asyncio.sleep(0.01)


async def test_both_versions_apply_changes_while_the_schema_moves_on(
    made_by_0_1_0: Database, aiohttp_client: AiohttpClient
) -> None:
    database = made_by_0_1_0
    database.execute(
        "UPDATE users SET balance = balance + 100000, opening_balance = opening_balance + 100000 WHERE id = 4"
    )
    old = OldProcess(database.url)
    try:
        await old.until(20)
        applied = await asyncio.to_thread(migrate, database.url)
        assert applied[0] == "0003-holds"
        during = old.applied
        client = await aiohttp_client(make_app(Settings(database_url=database.url)))
        new = 0
        while old.applied < during + 50:
            for user_id, amount in ((1, 2), (4, -2)):
                answer = await client.post("/api/balance/update", json={"userId": user_id, "amount": amount})
                assert answer.status == 200
                new += 1
    finally:
        old.stop()
    assert database.balance(1) == BALANCES[1] + old.applied + new
    assert database.balance(4) == BALANCES[4] + 100_000 - old.applied - new
    found = verify(database.url)
    assert (found.differences, found.changes) == ([], CHANGES + 2 * old.applied + new)


async def ask(client: Client, user_id: int, amount: int, key: str) -> tuple[int, str, bool]:
    """Ask for a change under a key: status, body, whether it was said to be a replay."""
    body, headers = {"userId": user_id, "amount": amount}, {"Idempotency-Key": key}
    async with client.post("/api/balance/update", json=body, headers=headers) as answer:
        return answer.status, await answer.text(), "Idempotent-Replayed" in answer.headers


async def test_what_0_1_0_decided_stays_decided(made_by_0_1_0: Database, aiohttp_client: AiohttpClient) -> None:
    """Its keys bind as before, its refusals too, and what it left can be read, held, paid and followed."""
    migrate(made_by_0_1_0.url)
    assert verify(made_by_0_1_0.url).differences == []
    client = await aiohttp_client(make_app(Settings(database_url=made_by_0_1_0.url)))
    refused = '{"error":"Insufficient funds"}'
    headers = {"Idempotency-Key": "order-1"}
    body = {"userId": 1, "amount": -30, "reference": "a book"}
    async with client.post("/api/balance/update", json=body, headers=headers) as answer:
        assert (answer.status, await answer.json()) == (200, {"userId": 1, "newBalance": 70})
        assert answer.headers["Idempotent-Replayed"] == "true"
    assert (await ask(client, 1, -31, "order-1"))[0] == 422
    assert await ask(client, 1, -300, "order-2") == (400, refused, True)
    assert await ask(client, 5, -50, "overdraft") == (200, '{"userId":5,"newBalance":-50}', True)
    assert await ask(client, 5, -1, "too-deep") == (400, refused, True)
    assert await ask(client, BALANCE_LIMIT, 1, "too-much") == (400, '{"error":"Balance limit exceeded"}', True)
    assert await ask(client, 3, -9, "more") == (400, refused, False)
    assert await ask(client, 3, -8, "most") == (200, '{"userId":3,"newBalance":-20}', False)
    async with client.get("/api/users") as answer:
        balances = {account["userId"]: account["balance"] for account in (await answer.json())["users"]}
    assert balances == BALANCES | {3: -20}
    async with client.get(f"/api/users/2?at={datetime(2026, 1, 1, tzinfo=UTC):%Y-%m-%dT%H:%M:%SZ}") as answer:
        assert (await answer.json())["balance"] == 200
    async with client.get("/api/changes") as answer:
        feed = (await answer.json())["changes"]
    assert [(one["userId"], one["version"]) for one in feed] == [
        (1, 1),
        (1, 2),
        (2, 1),
        (2, 2),
        (3, 1),
        (3, 2),
        (5, 1),
        (3, 3),
    ]
    async with client.put("/api/users/4/holds/h", json={"amount": 400}) as answer:
        assert answer.status == 201
    async with client.post("/api/users/4/holds/h/capture", json={"to": [{"userId": 5, "amount": 400}]}) as answer:
        assert (answer.status, (await answer.json())["newBalance"]) == (200, 0)
    assert verify(made_by_0_1_0.url).differences == []
