"""Real runs through several processes are linearizable, account by account; and the checker would notice if not."""

import asyncio
import random
import time
from pathlib import Path

import psycopg
import pytest

from tests.client import opened, session
from tests.history import Applied, Operation, contradictions
from tests.processes import running_service

pytestmark = [pytest.mark.slow, pytest.mark.over_both_statements]

USERS = (1, 2, 3)
OPENING = 30
CLIENTS = 48
REQUESTS = 120


async def test_the_answers_of_several_processes_are_linearizable(database_url: str, tmp_path: Path) -> None:
    environment = {"DATABASE_URL": database_url}
    histories: dict[int, list[Operation]] = {user_id: [] for user_id in USERS}
    async with (
        running_service(environment, tmp_path) as one,
        running_service(environment, tmp_path) as two,
        running_service(environment, tmp_path) as three,
        session(connections_max=0) as client,
    ):
        urls = [service.url for service in (one, two, three)]
        for user_id in USERS:
            await opened(client, OPENING, user_id, urls[0])

        async def work(number: int) -> None:
            chance = random.Random(number)
            for step in range(REQUESTS):
                user_id = chance.choice(USERS)
                # Keys are shared between clients now and then, and with them the change.
                key = f"key-{chance.randrange(400)}" if chance.random() < 0.3 else None
                name = key or f"request-{number}-{step}"
                amount = (
                    random.Random(name).choice((-25, -9, -4, 3, 8, 12)) if key else chance.choice((-25, -9, -4, 3, 8))
                )
                body = {"userId": user_id, "amount": amount, "reference": name}
                headers = {"Idempotency-Key": key} if key else {}
                asked = time.monotonic()
                url = f"{chance.choice(urls)}/api/balance/update"
                async with client.post(url, json=body, headers=headers) as answer:
                    found = await answer.json()
                    answered = time.monotonic()
                    assert answer.status in (200, 400), found
                    replayed = "Idempotent-Replayed" in answer.headers
                balance = found["newBalance"] if answer.status == 200 else None
                histories[user_id].append(Operation(name, amount, asked, answered, balance, replayed))

        await asyncio.gather(*(work(number) for number in range(CLIENTS)))
    with psycopg.connect(database_url) as connection:
        for user_id, operations in histories.items():
            rows = connection.execute(
                "SELECT reference, amount, balance FROM balance_changes"
                " WHERE user_id = %s AND version IS NOT NULL ORDER BY version",
                (user_id,),
            ).fetchall()
            assert {one.new_balance is None for one in operations} == {True, False}
            assert any(one.replayed for one in operations)
            assert contradictions(operations, [Applied(*row) for row in rows], OPENING) == []


FINE = [
    Operation("a", -10, 0, 1, 20),
    Operation("b", -10, 2, 3, 10),
    Operation("c", -15, 4, 5, None),
    Operation("d", 10, 6, 7, 20),
    Operation("a", -10, 8, 9, 20, replayed=True),
]
JOURNAL = [Applied("a", -10, 20), Applied("b", -10, 10), Applied("d", 10, 20)]


def changed(index: int, **values: object) -> list[Operation]:
    return [one._replace(**values) if at == index else one for at, one in enumerate(FINE)]  # type: ignore[arg-type]


def test_the_checker_accepts_what_is_linearizable() -> None:
    assert contradictions(FINE, JOURNAL, 30) == []
    overlapping = [*FINE, Operation("e", -12, 2.5, 6.5, None)]
    assert contradictions(overlapping, JOURNAL, 30) == []


@pytest.mark.parametrize(
    ("operations", "journal", "said"),
    [
        (changed(1, new_balance=20), JOURNAL, "the journal knows otherwise"),
        (FINE, [JOURNAL[0], JOURNAL[2]._replace(balance=30)], "the journal knows otherwise"),
        (FINE, [*JOURNAL, Applied("c", -15, 5)], "was refused and is in the journal"),
        (FINE, [JOURNAL[0]._replace(amount=-11), *JOURNAL[1:]], "version 1: 19 is expected"),
        (changed(0, asked=4, answered=5), JOURNAL, "was answered before one with a smaller version was asked for"),
        (changed(2, asked=0, answered=1.5), JOURNAL, "the refusal of c is not justified"),
        (changed(2, asked=7.5, answered=8), JOURNAL, "the refusal of c is not justified"),
        ([*FINE, Operation("e", -12, 8, 9, None)], JOURNAL, "the refusal of e is not justified"),
    ],
)
def test_the_checker_notices(operations: list[Operation], journal: list[Applied], said: str) -> None:
    assert any(said in line for line in contradictions(operations, journal, 30))
