"""A process of version 0.1.0 beside the new ones, as during an upgrade: it can't spend what is held."""

import psycopg
import pytest
from psycopg import sql

from atomic_balance.postgres.verify import verify
from tests.client import Client, opened
from tests.database import Database

# The statements of version 0.1.0, as they were.
APPLY_CHANGES = """
WITH sent AS MATERIALIZED (
    SELECT *
      FROM unnest($1::bigint[], $2::text[], $3::bigint[], $4::text[], $5::boolean[])
           WITH ORDINALITY AS sent (user_id, idempotency_key, amount, reference, repeatable, position)
     WHERE (SELECT set_config('lock_timeout', $6, true)) IS NOT NULL   -- for this statement alone
), replayed AS MATERIALIZED (
    SELECT sent.position, done.*
      FROM sent
      JOIN balance_changes AS done USING (user_id, idempotency_key)
     WHERE sent.repeatable
), change AS (
    SELECT *, (sum(amount) OVER (PARTITION BY user_id ORDER BY position))::bigint AS moved
      FROM sent
     WHERE position NOT IN (SELECT position FROM replayed)
     ORDER BY user_id, position
), demand AS MATERIALIZED (
    SELECT user_id, min(moved) AS lowest, max(moved) AS highest, array_agg(idempotency_key) AS keys,
           array_agg(amount) AS amounts, array_agg(moved) AS moves, array_agg(reference) AS texts
      FROM change
     GROUP BY user_id
     ORDER BY user_id
), applied AS (
    UPDATE users
       SET balance = users.balance + moves[cardinality(moves)],
           version = users.version + cardinality(moves)
      FROM demand
     -- Not a plain "=": that may be hashed, and rows taken in another order than demand's deadlock.
     WHERE users.id = ANY (ARRAY[demand.user_id])
       AND users.balance + demand.lowest >= users.minimum_balance
       AND users.balance + demand.highest <= 9007199254740991
    RETURNING demand.*, users.minimum_balance, users.balance - moves[cardinality(moves)] AS balance,
              users.version - cardinality(moves) AS version
), journal AS (
    INSERT INTO balance_changes (user_id, idempotency_key, amount, balance, version, reference)
    SELECT user_id, change.idempotency_key, change.amount, balance + change.moved, version + change.step,
           change.reference
      FROM applied,
           unnest(keys, amounts, moves, texts)
           WITH ORDINALITY AS change (idempotency_key, amount, moved, reference, step)
)
SELECT position, user_id, refusal IS NULL AS applied, balance, NULL::bigint AS minimum_balance, amount, reference,
       refusal
  FROM replayed
UNION ALL
SELECT NULL, user_id, true, balance, minimum_balance, NULL, NULL, NULL
  FROM applied
UNION ALL
SELECT NULL, demand.user_id, false, users.balance, users.minimum_balance, NULL, NULL, NULL
  FROM demand
  JOIN users ON users.id = demand.user_id
 WHERE demand.user_id NOT IN (SELECT user_id FROM applied)
"""
SET_MINIMUM_BALANCE = """
WITH changed AS (
    UPDATE users
       SET minimum_balance = $2
     WHERE id = $1
       AND balance >= $2
    RETURNING balance, minimum_balance, version
)
SELECT balance, minimum_balance, version, true AS changed
  FROM changed
UNION ALL
SELECT balance, minimum_balance, version, false
  FROM users
 WHERE id = $1
   AND NOT EXISTS (SELECT FROM changed)
"""


def apply(database: Database, amounts: dict[int, int], key: str) -> list[tuple[int, bool, int]]:
    """Have version 0.1.0 send a batch with one change for each account: user id, whether it was applied, balance."""
    keys, references, repeatable = ([value] * len(amounts) for value in (key, None, True))
    of_each = (list(amounts), keys, list(amounts.values()), references, repeatable)
    arrays = ", ".join(sql.Literal(values).as_string() for values in of_each)
    rows = database.execute(f"EXECUTE apply_changes ({arrays}, '1s')")
    return sorted((user_id, applied, balance) for _, user_id, applied, balance, *_ in rows)


def prepare(database: Database) -> None:
    """Prepare what version 0.1.0 sends."""
    types = "bigint[], text[], bigint[], text[], boolean[], text"
    database.execute(f"PREPARE apply_changes ({types}) AS {APPLY_CHANGES}")
    database.execute(f"PREPARE set_minimum_balance (bigint, bigint) AS {SET_MINIMUM_BALANCE}")


@pytest.fixture
def old(database: Database) -> Database:
    """The database, with what version 0.1.0 sends prepared."""
    prepare(database)
    return database


async def test_it_can_not_spend_what_is_held(old: Database, client: Client) -> None:
    await opened(client, 100)
    await opened(client, 100, user_id=2)
    assert (await client.put("/api/users/1/holds/order-1", json={"amount": 60})).status == 201
    assert apply(old, {1: -40, 2: -1}, "what is left") == [(1, True, 100), (2, True, 100)]
    with pytest.raises(psycopg.errors.CheckViolation) as error:
        apply(old, {1: -1, 2: -1}, "what is held")
    assert error.value.diag.constraint_name == "users_available_not_negative"
    with pytest.raises(psycopg.errors.CheckViolation):
        old.execute("EXECUTE set_minimum_balance (1, 1)")
    assert [row.key for user_id in (1, 2) for row in old.journal(user_id)] == [
        "order-1",
        "what is left",
        "what is left",
    ]
    assert apply(old, {1: -61}, "more than there is") == [(1, False, 60)]
    async with client.post("/api/users/1/holds/order-1/capture") as answer:
        assert (answer.status, (await answer.json())["newBalance"]) == (200, 0)
    assert verify(old.url).differences == []


async def test_it_goes_on_with_changes_that_need_nothing_held(old: Database, client: Client) -> None:
    await opened(client, 100)
    assert (await client.put("/api/users/1/holds/order-1", json={"amount": 60})).status == 201
    assert apply(old, {1: 20}, "a deposit") == [(1, True, 100)]
    assert apply(old, {1: -60}, "what is available") == [(1, True, 120)]
    ((*_, amount, _, _),) = old.execute(
        "EXECUTE apply_changes (ARRAY[1], ARRAY['order-1'], ARRAY[-60], ARRAY[NULL], ARRAY[true], '1s')"
    )
    assert amount == 0  # another change has this key, it finds: 422
    async with client.get("/api/users/1") as answer:
        account = await answer.json()
    assert (account["balance"], account["held"], account["available"]) == (60, 60, 0)
    assert verify(old.url).differences == []
