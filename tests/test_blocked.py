"""An account that another session holds locked delays itself, not the others."""

import asyncio
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import aiohttp
import psycopg

from tests.processes import Service, running_service

BLOCKED_SECONDS = 6
BLOCKED_USER, UNRELATED_USER = 1, 2
OTHERS = range(10, 110)
CLIENTS = 64
WAITING = 2_000


class Throughput(NamedTuple):
    """What the clients of the other accounts saw."""

    per_second: float
    p99_ms: float


async def load_others(client: aiohttp.ClientSession, service: Service) -> Throughput:
    """Ask for changes of the other accounts for as long as the one is blocked."""
    latencies: list[float] = []
    until = time.monotonic() + BLOCKED_SECONDS

    async def work() -> None:
        while (began := time.monotonic()) < until:
            body = {"userId": random.choice(OTHERS), "amount": 1}
            async with client.post(f"{service.url}/api/balance/update", json=body) as answer:
                assert answer.status == 200
            latencies.append(time.monotonic() - began)

    await asyncio.gather(*(work() for _ in range(CLIENTS)))
    return Throughput(len(latencies) / BLOCKED_SECONDS, 1000 * statistics.quantiles(latencies, n=100)[98])


async def test_a_blocked_account_leaves_the_others_their_throughput(database_url: str, tmp_path: Path) -> None:
    """Against a control in which the other session holds a row that nobody asks for: any open transaction has a price.

    How much throughput is kept is for a quiet machine to say; here it is only seen that the others are not held up.
    """
    async with (
        running_service({"DATABASE_URL": database_url}, tmp_path) as service,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client,
    ):
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute(
                "INSERT INTO users (id, balance, opening_balance)"
                " SELECT id, 10000, 10000 FROM generate_series(1, 200) AS id"
            )
            connection.execute("ANALYZE users")

        async def withdraw() -> int:
            body = {"userId": BLOCKED_USER, "amount": -1}
            async with client.post(f"{service.url}/api/balance/update", json=body) as answer:
                return answer.status

        results = {}
        waiting: list[asyncio.Task[int]] = []
        for user_id in (UNRELATED_USER, BLOCKED_USER):
            with psycopg.connect(database_url) as blocker:
                blocker.execute("UPDATE users SET balance = balance WHERE id = %s", (user_id,))
                if user_id == BLOCKED_USER:
                    waiting = [asyncio.create_task(withdraw()) for _ in range(WAITING)]
                    await asyncio.sleep(0.5)
                results[user_id] = await load_others(client, service)
                assert not any(task.done() for task in waiting)
                blocker.rollback()
        print({"control": results[UNRELATED_USER], "blocked": results[BLOCKED_USER]})
        assert Counter(await asyncio.gather(*waiting)) == {200: WAITING}
        assert results[BLOCKED_USER].per_second > results[UNRELATED_USER].per_second / 2
        assert results[BLOCKED_USER].p99_ms < 1_000
