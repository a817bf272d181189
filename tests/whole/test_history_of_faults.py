"""While connections to the database break in every way, the answers of several processes stay linearizable."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from atomic_balance.postgres.verify import verify
from tests.client import session
from tests.database import Database
from tests.fault_proxy import FaultProxy, Link
from tests.history import Applied, Operation, contradictions
from tests.paying import History
from tests.processes import running_service

pytestmark = pytest.mark.slow

USERS = (1, 2, 3)
OPENING = 60
CLIENTS = 40
SECONDS = 5
SETTINGS = {"STATEMENT_SECONDS": "0.5", "DEADLINE_SECONDS": "3", "CONNECT_SECONDS": "1"}
FAULTS: list[Callable[[Link], None]] = [Link.cut, Link.cut_at_answer, Link.swallow, Link.swallow_answers, Link.garble]


async def break_connections(proxies: list[FaultProxy], database: Database, until: float) -> Counter[str]:
    """Break the connections of one of the services after the other; now and then hold a row, too."""
    chance = random.Random(7)
    done: Counter[str] = Counter()
    while time.monotonic() < until:
        await asyncio.sleep(chance.uniform(0.05, 0.3))
        if chance.random() < 0.2:
            with database.holding(chance.choice(USERS)):
                await asyncio.sleep(0.3)
            done["holding"] += 1
        else:
            fault = chance.choice(FAULTS)
            for link in list(chance.choice(proxies).links):
                fault(link)
            done[fault.__name__] += 1
    return done


async def test_the_answers_stay_linearizable_while_connections_break(database: Database, tmp_path: Path) -> None:
    """Clients ask again with the key, here or there, until they have an outcome: to the checker one long operation."""
    database.open(dict.fromkeys(USERS, OPENING))
    histories: dict[int, list[Operation]] = {user_id: [] for user_id in USERS}
    async with contextlib.AsyncExitStack() as running:
        enter = running.enter_async_context
        through = [await enter(database.proxied()) for _ in range(3)]
        services = [await enter(running_service({"DATABASE_URL": url, **SETTINGS}, tmp_path)) for _, url in through]
        client = await enter(session(connections_max=0))
        until = time.monotonic() + SECONDS

        async def ask(url: str, user_id: int, amount: int, name: str) -> tuple[int, int | None]:
            body = {"userId": user_id, "amount": amount, "reference": name}
            headers = {"Idempotency-Key": name}
            async with client.post(f"{url}/api/balance/update", json=body, headers=headers) as answer:
                return answer.status, (await answer.json()).get("newBalance")

        async def work(number: int) -> None:
            chance = random.Random(number)
            step = 0
            while time.monotonic() < until:
                step += 1
                user_id, amount, name = chance.choice(USERS), chance.choice((-25, -9, -4, 3, 8, 12)), f"{number}-{step}"
                asked = time.monotonic()
                while True:
                    status, balance = await ask(chance.choice(services).url, user_id, amount, name)
                    if status in (200, 400):
                        break
                    assert status in (503, 504)
                histories[user_id].append(Operation(name, amount, asked, time.monotonic(), balance))

        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            breaking = tasks.create_task(break_connections([proxy for proxy, _ in through], database, until))
            for number in range(CLIENTS):
                tasks.create_task(work(number))
        assert sum(breaking.result().values()) > 10
    for user_id, operations in histories.items():
        journal = [row for row in database.journal(user_id) if row.version]
        assert {row.reference for row in journal} == {one.name for one in operations if one.new_balance is not None}
        assert {one.new_balance is None for one in operations} == {True, False}
        applied = [Applied(row.key, row.amount, row.balance) for row in journal]
        assert contradictions(operations, applied, OPENING) == []
    assert verify(database.url).differences == []


async def test_transfers_stay_linearizable_while_connections_break(database: Database, tmp_path: Path) -> None:
    """And whoever reads all accounts at once sees all of a transfer or nothing of it."""
    history = History(database, USERS, OPENING, again=(503, 504))
    async with contextlib.AsyncExitStack() as running:
        enter = running.enter_async_context
        through = [await enter(database.proxied()) for _ in range(3)]
        services = [await enter(running_service({"DATABASE_URL": url, **SETTINGS}, tmp_path)) for _, url in through]
        client = await enter(session(connections_max=0))
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            proxies, until = [proxy for proxy, _ in through], time.monotonic() + SECONDS
            breaking = tasks.create_task(break_connections(proxies, database, until))
            tasks.create_task(history.load(client, [service.url for service in services], CLIENTS, SECONDS))
        assert sum(breaking.result().values()) > 10
    assert {one.balances is None for one in history.transfers} == {True, False}
    assert len(history.snapshots) > 50
    assert history.contradictions() == []
    assert verify(database.url).differences == []
