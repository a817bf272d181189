"""Transfers under concurrency and while the database is killed: against services that are processes of their own."""

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from atomic_balance.postgres.verify import verify
from tests.client import Told, session, transfer
from tests.database import Database
from tests.killable import killable_server
from tests.processes import running_service

pytestmark = pytest.mark.slow

REFUSED = Told(400, {"error": "Insufficient funds"}, replayed=False)


async def test_two_accounts_that_pay_each_other_thousands_of_times_at_once(database: Database, tmp_path: Path) -> None:
    """Through two processes: none waits for the other in a circle, and each answer is what was done."""
    environment = {"DATABASE_URL": database.url}
    database.open({1: 100, 2: 100})
    amounts = [random.Random(number).randint(1, 30) for number in range(6_000)]
    async with (
        running_service(environment, tmp_path) as one,
        running_service(environment, tmp_path) as other,
        session() as client,
    ):
        urls = [one.url, other.url]
        answers = await asyncio.gather(
            *(
                transfer(client, 1 + number % 2, {2 - number % 2: amount}, urls[number // 2 % 2])
                for number, amount in enumerate(amounts)
            )
        )
    moved = Counter[int]()
    for number, (amount, answer) in enumerate(zip(amounts, answers, strict=True)):
        if answer != REFUSED:
            assert answer.status == 200, answer
            assert answer.body["newBalance"] + answer.body["to"][0]["newBalance"] == 200
            moved[1 + number % 2] -= amount
            moved[2 - number % 2] += amount
    assert {answer.status for answer in answers} == {200, 400}
    assert (database.balance(1), database.balance(2)) == (100 + moved[1], 100 + moved[2])
    assert database.balance(1) + database.balance(2) == 200
    found = verify(database.url)
    assert (found.money.balances, found.money.added, found.differences) == (200, 0, [])
    assert database.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == [(0,)]


ACCOUNTS = 100
OPENING = 50
CLIENTS = 200
TRANSFERS_MIN = 3_000


async def test_the_database_is_killed_twice_while_money_goes_round_a_ring(tmp_path: Path) -> None:
    """Each of a hundred accounts pays the next ones, through three processes, without a single retry by a client."""
    with killable_server(tmp_path / "data") as server:
        environment = {"DATABASE_URL": server.url, "DEADLINE_SECONDS": "15"}
        with Database(server.url) as database:
            database.open(dict.fromkeys(range(1, ACCOUNTS + 1), OPENING))
        asked: dict[str, tuple[int, dict[int, int], Told]] = {}
        deaths = 0
        async with (
            running_service(environment, tmp_path) as one,
            running_service(environment, tmp_path) as two,
            running_service(environment, tmp_path) as three,
            session() as client,
        ):
            urls = [one.url, two.url, three.url]

            async def pay(number: int) -> None:
                chance = random.Random(number)
                step = 0
                while deaths < 2 or len(asked) < TRANSFERS_MIN:
                    step += 1
                    key, payer = f"{number}-{step}", chance.randint(1, ACCOUNTS)
                    payees = {
                        (payer + further) % ACCOUNTS + 1: chance.randint(1, 20)
                        for further in range(chance.choice((1, 1, 3)))
                    }
                    told = await transfer(client, payer, payees, chance.choice(urls), key)
                    assert told.status in (200, 400), told
                    asked[key] = payer, payees, told

            async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
                for number in range(CLIENTS):
                    tasks.create_task(pay(number))
                while deaths < 2:
                    before = len(asked)
                    while len(asked) < before + 500:  # noqa: ASYNC110 - it is in the middle
                        await asyncio.sleep(0.01)
                    server.kill()
                    server.start()
                    deaths += 1

            async def again(key: str) -> None:
                payer, payees, told = asked[key]
                assert await transfer(client, payer, payees, urls[len(key) % 3], key) == told._replace(replayed=True)

            await asyncio.gather(*map(again, asked))
        applied = {key: (payer, payees) for key, (payer, payees, told) in asked.items() if told.status == 200}
        assert 0 < len(applied) < len(asked)
        expected = Counter(dict.fromkeys(range(1, ACCOUNTS + 1), OPENING))
        for payer, payees in applied.values():
            expected.subtract({payer: sum(payees.values())})
            expected.update(payees)
        with Database(server.url) as database:
            assert {user_id: balance for user_id, (_, balance) in database.accounts().items()} == expected
            keys = database.execute(
                "SELECT idempotency_key FROM balance_changes WHERE payees IS NOT NULL AND refusal IS NULL"
            )
        assert sorted(key for (key,) in keys) == sorted(applied)
        found = verify(server.url)
        total = ACCOUNTS * OPENING
        assert (found.money, found.differences) == ((total, total, 0), [])
