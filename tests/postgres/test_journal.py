"""The journal: its pages, and the audit that proves every balance by it."""

import asyncio
import sys
from pathlib import Path

import psycopg
import pytest

from atomic_balance.postgres.statements import READ_CHANGE, READ_CHANGES, READ_CHANGES_AFTER, in_schema
from atomic_balance.postgres.verify import Money, Summary, verify
from tests.client import Client, opened, update
from tests.processes import run


async def page(client: Client, path: str) -> tuple[list[tuple[int, int, int]], str | None]:
    async with client.get(path) as answer:
        assert answer.status == 200
        body = await answer.json()
        return [(one["version"], one["amount"], one["balance"]) for one in body["changes"]], body["next"]


async def test_pages_newest_first_stay_the_same_while_changes_arrive(client: Client) -> None:
    await opened(client, 100)
    for amount in (1, 2, 3, 4, 5):
        await update(client, amount)
    first, following = await page(client, "/api/users/1/changes?limit=2")
    assert first == [(5, 5, 115), (4, 4, 110)]
    await update(client, -50)
    assert following
    second, following = await page(client, following)
    assert second == [(3, 3, 106), (2, 2, 103)]
    assert following
    assert await page(client, following) == ([(1, 1, 101), (0, 100, 100)], None)
    assert await page(client, "/api/users/1/changes?before=1") == ([(0, 100, 100)], None)
    assert (await page(client, "/api/users/1/changes"))[0][0] == (6, -50, 65)


async def test_an_entry_shows_all_that_is_known_of_a_change(client: Client) -> None:
    await opened(client, 100)
    headers = {"Idempotency-Key": "k"}
    await client.post("/api/balance/update", json={"userId": 1, "amount": -2, "reference": "r"}, headers=headers)
    await client.post("/api/balance/update", json={"userId": 1, "amount": -200}, headers={"Idempotency-Key": "refused"})
    async with client.get("/api/users/1/changes") as answer:
        entry, opening = (await answer.json())["changes"]
    assert (opening["version"], opening["reference"], opening["idempotencyKey"]) == (0, None, None)
    assert opening.pop("createdAt") < entry["createdAt"]
    assert entry.pop("createdAt").endswith("Z")
    expected = {"version": 1, "amount": -2, "holdAmount": 0, "balance": 98, "reference": "r", "idempotencyKey": "k"}
    assert entry == expected


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("limit=0", "limit: expected an integer from 1 to 1000"),
        ("limit=1001", "limit: expected an integer from 1 to 1000"),
        ("limit=ten", "limit: expected an integer from 1 to 1000"),
        ("limit=1e1", "limit: expected an integer from 1 to 1000"),
        ("before=0", "before: expected a version, an integer from 1"),
        ("before=null", "before: expected a version, an integer from 1"),
        ("after=-1", "after: expected a version, an integer from 0, and no before beside it"),
        ("after=1&before=2", "after: expected a version, an integer from 0, and no before beside it"),
        ("from=1", "from: expected no such member"),
        ("limit=1&limit=2", "query: expected each parameter at most once"),
    ],
)
async def test_a_bad_page(client: Client, query: str, error: str) -> None:
    async with client.get(f"/api/users/1/changes?{query}") as answer:
        assert (answer.status, await answer.json()) == (400, {"error": error})


async def test_an_account_is_followed_from_a_version_on(client: Client) -> None:
    """Oldest first; who has all asks again after the last version that it has seen."""
    await opened(client, 100)
    assert await page(client, "/api/users/1/changes?after=0") == ([], None)
    for amount in (1, 2, 3, 4, 5):
        await update(client, amount)
    first, following = await page(client, "/api/users/1/changes?after=1&limit=2")
    assert first == [(2, 2, 103), (3, 3, 106)]
    await update(client, -50)
    assert following
    second, following = await page(client, following)
    assert second == [(4, 4, 110), (5, 5, 115)]
    assert following
    assert await page(client, following) == ([(6, -50, 65)], None)
    assert await page(client, "/api/users/1/changes?after=6") == ([], None)


@pytest.mark.parametrize("query", ["", "?before=9", "?after=0"])
async def test_the_changes_of_nobody(client: Client, query: str) -> None:
    async with client.get(f"/api/users/1/changes{query}") as answer:
        assert (answer.status, await answer.text()) == (404, '{"error":"User not found"}')


async def test_the_audit_passes_on_a_live_database(client: Client, database_url: str) -> None:
    assert verify(database_url) == Summary(0, 0, Money(0, 0, 0), [])
    for user_id in (1, 2, 3):
        await opened(client, 100, user_id)
    amounts = [number % 7 + 1 for number in range(500)]
    updating = asyncio.gather(*(update(client, amount, number % 2 + 1) for number, amount in enumerate(amounts)))
    while not updating.done():
        assert (await asyncio.to_thread(verify, database_url)).differences == []
    await updating
    told: list[tuple[int, int]] = []
    money = Money(300 + sum(amounts), 300, sum(amounts))
    assert verify(database_url, lambda done, total: told.append((done, total))) == Summary(3, 500, money, [])
    assert told[-1] == (500, 500)


async def a_journal(client: Client) -> None:
    """Three accounts, opened with 100 and changed by 1, 2 and 8; each was refused one withdrawal and one deposit.

    User 3 has then placed holds of 10, 20 and 30; 4 of the first were captured, the second was released, the third is
    open, and one of 500 was refused.
    """
    for user_id in (1, 2, 3):
        await opened(client, 100, user_id)
        for amount in (1, 2, 8):
            await update(client, amount, user_id)
        for key, amount in (("little", -500), ("much", 2**53 - 1)):
            change = {"userId": user_id, "amount": amount}
            answer = await client.post("/api/balance/update", json=change, headers={"Idempotency-Key": key})
            assert answer.status == 400
    for hold_id, amount in (("a", 10), ("b", 20), ("c", 30)):
        assert (await client.put(f"/api/users/3/holds/{hold_id}", json={"amount": amount})).status == 201
    assert (await client.post("/api/users/3/holds/a/capture", json={"amount": 4})).status == 200
    assert (await client.post("/api/users/3/holds/b/release")).status == 200
    assert (await client.put("/api/users/3/holds/refused", json={"amount": 500})).status == 400


@pytest.mark.parametrize(
    ("damage", "difference"),
    [
        (
            "UPDATE users SET balance = balance + 1 WHERE id = 2",
            "user 2: the balance by the journal is 111, the account says 112",
        ),
        (
            "DELETE FROM balance_changes WHERE user_id = 2 AND version = 2",
            "user 2: after version 1 the journal goes on with version 3",
        ),
        (
            "DELETE FROM balance_changes WHERE user_id = 2 AND version = 3",
            "user 2: the journal ends with version 2, the account is at 3",
        ),
        (
            "UPDATE balance_changes SET amount = 5 WHERE user_id = 2 AND version = 2",
            "user 2: version 2: the balance after it is 106, the journal says 103",
        ),
        (
            "ALTER TABLE balance_changes DROP CONSTRAINT balance_changes_version_key;"
            "UPDATE balance_changes SET version = 2 WHERE user_id = 2 AND version = 3",
            "user 2: after version 2 the journal goes on with version 2",
        ),
        (
            "UPDATE users SET opening_balance = 99 WHERE id = 2",
            "user 2: version 1: the balance after it is 100, the journal says 101",
        ),
        ("DELETE FROM users WHERE id = 2", "user 2: has changes in the journal, but no account"),
        (
            "DELETE FROM balance_changes WHERE user_id = 2 AND version IS NOT NULL; DELETE FROM users WHERE id = 2",
            "user 2: has changes in the journal, but no account",
        ),
        (
            "UPDATE balance_changes SET amount = 5 WHERE user_id = 2 AND refusal = 'insufficient_funds'",
            "user 2: a change by 5 at a balance of 111 can't have been refused for insufficient_funds",
        ),
        (
            "UPDATE balance_changes SET amount = 5 WHERE user_id = 2 AND refusal = 'balance_limit_exceeded'",
            "user 2: a change by 5 at a balance of 111 can't have been refused for balance_limit_exceeded",
        ),
        (
            "UPDATE users SET held = 31 WHERE id = 3",
            "user 3: what is held by the journal is 30, the account says 31",
        ),
        (
            "UPDATE balance_changes SET hold_amount = 29 WHERE user_id = 3 AND version = 6",
            "user 3: what is held by the journal is 29, the account says 30",
        ),
        (
            "UPDATE balance_changes SET hold_amount = 29 WHERE user_id = 3 AND version = 6;"
            "UPDATE users SET held = 29 WHERE id = 3",
            "user 3: the journal has 1 open holds, the list of them 1, and they differ",
        ),
        (
            "UPDATE open_holds SET amount = 29",
            "user 3: the journal has 1 open holds, the list of them 1, and they differ",
        ),
        (
            "UPDATE open_holds SET hold_id = 'b'",
            "user 3: the journal has 1 open holds, the list of them 1, and they differ",
        ),
        ("DELETE FROM open_holds", "user 3: the journal has 1 open holds, the list of them 0, and they differ"),
        (
            "UPDATE open_holds SET expires_at = 'infinity'",
            "user 3: the journal has 1 open holds, the list of them 1, and they differ",
        ),
        (
            "UPDATE balance_changes SET expires_at = NULL WHERE user_id = 3 AND version = 6",
            "user 3: version 6: a hold has no end",
        ),
        (
            "INSERT INTO open_holds (user_id, hold_id, amount, expires_at) VALUES (3, 'a', 10, now())",
            "user 3: the journal has 1 open holds, the list of them 2, and they differ",
        ),
        (
            "INSERT INTO open_holds (user_id, hold_id, amount, expires_at) VALUES (2, 'a', 10, now())",
            "user 2: the journal has 0 open holds, the list of them 1, and they differ",
        ),
        (
            "DELETE FROM balance_changes WHERE user_id = 3; DELETE FROM users WHERE id = 3",
            "user 3: has open holds, but no account",
        ),
        (  # a settlement larger than its hold
            "UPDATE balance_changes SET hold_amount = -11 WHERE user_id = 3 AND version = 7;"
            "UPDATE users SET held = 29 WHERE id = 3",
            "user 3: version 7: it settles 11, and there is no such open hold",
        ),
        (
            "UPDATE balance_changes SET amount = -11 WHERE user_id = 3 AND version = 7;"
            "UPDATE balance_changes SET balance = 100 WHERE user_id = 3 AND version >= 7;"
            "UPDATE users SET balance = 100 WHERE id = 3",
            "user 3: version 7: it captures more than was held",
        ),
        (  # a hold that was settled twice
            "ALTER TABLE balance_changes DROP CONSTRAINT balance_changes_pkey;"
            "INSERT INTO balance_changes (user_id, version, amount, balance, idempotency_key, hold_amount)"
            " VALUES (3, 9, 0, 107, ' settlement a', -10);"
            "UPDATE users SET held = 20, version = 9 WHERE id = 3",
            "user 3: version 9: it settles 10, and there is no such open hold",
        ),
        (  # a settlement of another hold
            "UPDATE balance_changes SET idempotency_key = ' settlement c' WHERE user_id = 3 AND version = 8",
            "user 3: version 8: it settles 20, and there is no such open hold",
        ),
        (
            "UPDATE balance_changes SET amount = 1 WHERE user_id = 3 AND version = 4;"
            "UPDATE balance_changes SET balance = balance + 1 WHERE user_id = 3 AND version >= 4;"
            "UPDATE users SET balance = balance + 1 WHERE id = 3",
            "user 3: version 4: a hold moves the balance by 1",
        ),
        (
            "UPDATE balance_changes SET hold_amount = NULL WHERE user_id = 3 AND idempotency_key = 'refused'",
            "user 3: a change by 0 at a balance of 107 can't have been refused for insufficient_funds",
        ),
    ],
)
async def test_the_audit_finds(client: Client, database_url: str, damage: str, difference: str) -> None:
    await a_journal(client)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(damage.encode())
    assert verify(database_url).differences == [difference]


async def test_a_difference_ends_the_command_with_1(client: Client, database_url: str, tmp_path: Path) -> None:
    await a_journal(client)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("DELETE FROM users WHERE id = 2")
    difference = "user 2: has changes in the journal, but no account"
    status, output = await run(
        *(sys.executable, "-m", "atomic_balance", "verify"),
        directory=tmp_path,
        environment={"DATABASE_URL": database_url},
    )
    money = "money: 218 in all accounts; 200 at their openings, +29 from outside since: 11 lost"
    assert (status, output) == (1, f"{difference}\n{money}\nthe journal does not prove the balances: 1 differ\n")


@pytest.mark.parametrize(
    "damage",
    [
        # the newest rows
        "DELETE FROM balance_changes WHERE user_id = 2 AND version > 1;"
        "UPDATE users SET balance = 101, version = 1 WHERE id = 2",
        # an account with all that it had
        "DELETE FROM balance_changes WHERE user_id = 2; DELETE FROM users WHERE id = 2",
        # a refusal, and with it what its key was bound to
        "DELETE FROM balance_changes WHERE user_id = 2 AND refusal IS NOT NULL",
        "UPDATE balance_changes SET amount = -600, balance = 30 WHERE user_id = 2 AND amount = -500",
        # what the sums don't rest on
        "UPDATE balance_changes SET idempotency_key = 'other' || amount WHERE user_id = 2",
        "UPDATE balance_changes SET reference = 'other', created_at = '2020-01-01' WHERE user_id = 2",
        "UPDATE users SET minimum_balance = -7, opening_minimum_balance = -7 WHERE id = 2",
        # a hold's end, wherever it stands
        "UPDATE balance_changes SET expires_at = '2020-01-01' WHERE user_id = 3 AND version = 6;"
        "UPDATE open_holds SET expires_at = '2020-01-01'",
        # an open hold, wherever it stands, set to another amount
        "UPDATE balance_changes SET hold_amount = 29 WHERE user_id = 3 AND version = 6;"
        "UPDATE open_holds SET amount = 29; UPDATE users SET held = 29 WHERE id = 3",
        # sums that were all computed again
        "UPDATE balance_changes SET amount = amount + 5, balance = balance + 5 WHERE user_id = 2 AND version = 1;"
        "UPDATE balance_changes SET amount = amount - 5 WHERE user_id = 2 AND version = 2",
        "UPDATE balance_changes SET balance = balance + 5 WHERE user_id = 2 AND version IS NOT NULL;"
        "UPDATE users SET opening_balance = 105, balance = balance + 5 WHERE id = 2",
    ],
)
async def test_the_audit_can_not_find(client: Client, database_url: str, damage: str) -> None:
    """What the database no longer holds, and what nothing else in it rests on; docs/guarantees.md says so too."""
    await a_journal(client)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(damage.encode())
    assert verify(database_url).differences == []


def test_pages_and_keys_are_read_by_index_from_a_large_journal(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO balance_changes (user_id, version, amount, balance, idempotency_key)"
            " SELECT user_id, version, 1, version, user_id || '-' || version"
            "   FROM generate_series(1, 20) AS user_id, generate_series(1, 10000) AS version"
        )
        connection.execute("ANALYZE balance_changes")
        for statement, arguments, index in (
            (READ_CHANGES, "1, 5000, 51", "Index Scan Backward using balance_changes_version_key"),
            (READ_CHANGES, "1, NULL, 51", "Index Scan Backward using balance_changes_version_key"),
            (READ_CHANGES_AFTER, "1, 5000, 51", "Index Scan using balance_changes_version_key"),
            (READ_CHANGE, "1, '1-77'", "Index Scan using balance_changes_pkey"),
        ):
            connection.execute("DEALLOCATE ALL")
            connection.execute(f"PREPARE reading AS {in_schema(statement, None)}".encode())
            for mode in ("force_custom_plan", "force_generic_plan"):
                connection.execute(f"SET plan_cache_mode = {mode}".encode())
                rows = connection.execute(f"EXPLAIN (ANALYZE, BUFFERS OFF) EXECUTE reading ({arguments})".encode())
                plan = "\n".join(row[0] for row in rows)
                assert index in plan, plan
                assert plan.count("Sort  (") == (statement is READ_CHANGES), plan  # of the page alone
