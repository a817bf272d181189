"""apply_changes.sql takes the rows of users in the order of their ids, whatever their number, so nobody deadlocks."""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest

from atomic_balance.changes import Change
from atomic_balance.postgres.session import connect
from atomic_balance.postgres.statements import APPLY_CHANGES
from atomic_balance.postgres.verify import verify
from atomic_balance.settings import Settings
from tests.database import Database

HAMMER_SECONDS = 4
HAMMERS = 6
ROWS = 50


@pytest.mark.parametrize("users", [2, 50, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_the_plan_takes_rows_in_the_order_of_their_ids(database: Database, users: int) -> None:
    """A nested loop, driven by the sorted accounts of the batch; over the primary key, where users are many."""
    database.execute(
        "INSERT INTO users (id, balance, opening_balance)"
        f" SELECT id, 100, 100 FROM generate_series(1, {users}::bigint) AS id"
    )
    database.execute("ANALYZE users")
    database.execute(f"PREPARE applying (bigint[], text[], bigint[], text[], boolean[], text) AS {APPLY_CHANGES}")
    for mode in ("force_custom_plan", "force_generic_plan"):
        database.execute(f"SET plan_cache_mode = {mode}")
        for changes in (1, 2, 50, 1_000):
            ((plans,),) = database.execute(f"EXPLAIN (FORMAT JSON) EXECUTE applying ({arguments(changes, users)})")
            plan = plans[0]["Plan"]
            update = node(plan, {"Node Type": "ModifyTable", "Relation Name": "users"})
            (loop,) = update["Plans"]
            assert loop["Node Type"] == "Nested Loop", loop
            outer, inner = loop["Plans"]
            assert (outer["Node Type"], outer["CTE Name"]) == ("CTE Scan", "demand"), loop
            if users > 50:
                assert (inner["Node Type"], inner["Index Name"]) == ("Index Scan", "users_pkey"), loop
            demand = node(plan, {"Subplan Name": "CTE demand"})
            assert (demand["Node Type"], demand["Strategy"]) == ("Aggregate", "Sorted"), demand
    rows = database.execute(f"EXECUTE applying ({arguments(1_000, users)})")
    taken = [row[1] for row in rows]
    assert len(taken) == min(users, 1_000)
    assert taken == sorted(taken)


def arguments(changes: int, users: int) -> str:
    """The statement's: withdrawals from different users, in no order, as SQL."""
    ids = [1 + number * 7_919 % users for number in range(changes)]
    keys = [str(number) for number in range(changes)]
    arrays = f"ARRAY{ids}, ARRAY{keys}" + "".join(
        f", array_fill({value}, ARRAY[{changes}])" for value in ("-1::bigint", "NULL::text", "true")
    )
    return f"{arrays}, '100ms'"


def node(plan: dict[str, Any], wanted: dict[str, str]) -> dict[str, Any]:
    """The node of a plan with the properties `wanted`."""
    (found,) = _nodes(plan, wanted)
    return found


def _nodes(plan: dict[str, Any], wanted: dict[str, str]) -> Iterator[dict[str, Any]]:
    if wanted.items() <= plan.items():
        yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child, wanted)


@pytest.mark.slow
async def test_sessions_that_hammer_the_same_rows_neither_deadlock_nor_wait_in_vain(database: Database) -> None:
    """Each deadlock and each lock timeout would be an error to one of them."""
    database.open(dict.fromkeys(range(1, ROWS + 1), 1_000_000))
    database.execute("ANALYZE users")
    settings = Settings(database_url=database.url, lock_seconds=10, statement_seconds=20)
    give_up = asyncio.get_running_loop().time() + HAMMER_SECONDS

    async def hammer(number: int) -> int:
        chance = random.Random(number)
        session = await connect(settings)
        sent = 0
        try:
            while asyncio.get_running_loop().time() < give_up:
                users = chance.choices(range(1, ROWS + 1), k=chance.choice((10, 50, 200)))
                keys = [f"{number}-{sent + place}" for place in range(len(users))]
                sent += len(users)
                changes = [Change(user_id, chance.choice((-2, -1, 3))) for user_id in users]
                answers = await session.apply(changes, keys, [False] * len(users), 10)
                assert all(result.applied for result in answers.accounts.values())
        finally:
            await session.close()
        return sent

    sent = await asyncio.gather(*(hammer(number) for number in range(HAMMERS)))
    assert verify(database.url) == (ROWS, sum(sent), [])
    assert database.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == [(0,)]
