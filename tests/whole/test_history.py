"""Real runs through several processes are linearizable, account by account; and the checker would notice if not."""

import asyncio
import json
import random
import time
from pathlib import Path

import psycopg
import pytest

from atomic_balance.changes import settlement_key
from atomic_balance.postgres.verify import verify
from tests.client import Told, hold, opened, session, settle, update
from tests.database import Database
from tests.history import Applied, Operation, contradictions
from tests.processes import running_service

pytestmark = [pytest.mark.slow, pytest.mark.over_both_statements]

USERS = (1, 2, 3)
OPENING = 30
CLIENTS = 48
REQUESTS = 120


@pytest.mark.on_a_cluster
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


@pytest.mark.on_a_cluster
async def test_the_answers_about_holds_are_linearizable_too(database: Database, tmp_path: Path) -> None:
    """Updates, holds, captures, releases and expiries of the same accounts; what is available is never below 0."""
    environment = {"DATABASE_URL": database.url}
    database.open(dict.fromkeys(USERS, OPENING))
    histories: dict[int, list[Operation]] = {user_id: [] for user_id in USERS}
    async with (
        running_service(environment, tmp_path) as one,
        running_service(environment, tmp_path) as two,
        running_service(environment, tmp_path) as three,
        session(connections_max=0) as client,
    ):
        urls = [service.url for service in (one, two, three)]

        async def work(number: int) -> None:
            chance = random.Random(number)
            for step in range(REQUESTS // 2):
                user_id, kind, url = chance.choice(USERS), chance.random(), chance.choice(urls)
                name, hold_id, amount = f"request-{number}-{step}", f"hold-{chance.randrange(600)}", 0
                asked = time.monotonic()
                if kind < 0.4:
                    amount = chance.choice((-9, -4, 3, 6))
                    status, text = await update(client, amount, user_id, url, reference=name)
                    told = Told(status, json.loads(text), replayed=False)
                    held = 0
                elif kind < 0.7:
                    name, held = hold_id, random.Random(hold_id).choice((2, 5, 12))
                    told = await hold(client, hold_id, held, user_id, url, expiresInSeconds=chance.choice((1, 60)))
                else:
                    name, held = settlement_key(hold_id), 0
                    told = await settle(client, chance.choice(("capture", "release")), hold_id, user_id, url)
                answered = time.monotonic()
                # It may not be settled yet, or nobody's request has settled it.
                expired = told.body == {"error": "The hold has expired"} or (
                    name != hold_id and told.body.get("status") == "expired"
                )
                if told.status == 404 or expired:
                    continue
                assert told.status in (200, 201, 400, 409), told
                balance = told.body.get("newBalance", 0)
                histories[user_id].append(
                    Operation(
                        name,
                        amount,
                        asked,
                        answered,
                        None if told.status == 400 else balance,
                        told.replayed or told.status == 409,
                        held,
                        told="newBalance" in told.body and not held,  # a hold says what became of it later
                    )
                )

        await asyncio.gather(*(work(number) for number in range(CLIENTS)))
    for user_id, operations in histories.items():
        rows = database.execute(
            "SELECT CASE WHEN hold_amount IS NULL THEN reference ELSE idempotency_key END, amount, balance,"
            "       coalesce(hold_amount, 0)"
            "  FROM balance_changes WHERE user_id = %s AND version IS NOT NULL ORDER BY version",
            user_id,
        )
        assert {one.new_balance is None for one in operations if one.hold_amount} == {True, False}
        assert contradictions(operations, [Applied(*row) for row in rows], OPENING) == []
    assert verify(database.url).differences == []


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
        ([*FINE, Operation("e", 0, 8, 9, None, hold_amount=20)], JOURNAL, "the refusal of e is not justified"),
        (FINE, [*JOURNAL, Applied("e", 0, 20, 21)], "version 4: -1 is available"),
        (FINE, [*JOURNAL, Applied("e", 0, 20, -1)], "version 4: -1 is held"),
    ],
)
def test_the_checker_notices(operations: list[Operation], journal: list[Applied], said: str) -> None:
    assert any(said in line for line in contradictions(operations, journal, 30))
