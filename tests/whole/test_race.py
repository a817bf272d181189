"""Exact counts under concurrency, over HTTP, against services that are processes of their own."""

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.client import balance, opened, session, update
from tests.processes import running_service

pytestmark = [pytest.mark.slow, pytest.mark.over_both_statements, pytest.mark.on_a_cluster]


async def test_the_reference_race(database_url: str, tmp_path: Path) -> None:
    """10,000 requests at once withdraw 2 each from 10,000: 5,000 succeed, 5,000 are refused, nothing is left."""
    async with running_service({"DATABASE_URL": database_url}, tmp_path) as service, session() as client:
        await opened(client, url=service.url)
        answers = Counter(await asyncio.gather(*(update(client, -2, url=service.url) for _ in range(10_000))))
        expected = {(200, f'{{"userId":1,"newBalance":{left}}}'): 1 for left in range(0, 10_000, 2)}
        assert answers == expected | {(400, '{"error":"Insufficient funds"}'): 5_000}
        assert await balance(client, service.url) == 0


async def test_deposits_and_withdrawals_through_two_processes(database_url: str, tmp_path: Path) -> None:
    """The balance at the end is the opening one plus every amount that was answered 200."""
    environment = {"DATABASE_URL": database_url}
    amounts = [random.Random(number).choice((-7, -3, -1, 2, 4)) for number in range(4_000)]
    async with (
        running_service(environment, tmp_path) as one,
        running_service(environment, tmp_path) as other,
        session() as client,
    ):
        await opened(client, 50, url=one.url)
        urls = [one.url, other.url]
        answers = await asyncio.gather(
            *(update(client, amount, url=urls[number % 2]) for number, amount in enumerate(amounts))
        )
        assert {status for status, _ in answers} == {200, 400}
        applied = sum(amount for amount, (status, _) in zip(amounts, answers, strict=True) if status == 200)
        assert await balance(client, one.url) == await balance(client, other.url) == 50 + applied
