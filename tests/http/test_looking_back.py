"""What an account had at a time, and all accounts; and that a parameter nobody knows is never passed over."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from atomic_balance.http.endpoints import ENDPOINTS
from atomic_balance.postgres.statements import LIST_ACCOUNTS, READ_PAST_BALANCE, in_schema
from tests.client import Client, opened, update
from tests.database import Database

OPENED = datetime(2026, 1, 31, 12, tzinfo=UTC)
AT = "at: expected a time with an offset, such as 2026-01-31T23:59:59Z (in a URL, + is %2B)"


async def ask(client: Client, path: str, **query: str) -> tuple[int, Any]:
    async with client.get(path, params=query) as answer:
        return answer.status, await answer.json()


async def an_account(client: Client, database: Database, amounts: list[int]) -> None:
    """User 1, opened with 100 at OPENED, and changed by these amounts, one in each second after that."""
    await opened(client, 100)
    for amount in amounts:
        assert (await update(client, amount))[0] == 200
    await update(client, -(10**6))  # refused: it is no part of what was
    database.execute("UPDATE users SET opened_at = %s", OPENED)
    database.execute("UPDATE balance_changes SET created_at = %s + version * interval '1 second'", OPENED)


async def at(client: Client, time: datetime) -> tuple[int, int]:
    """The balance and the version at a time."""
    status, body = await ask(client, "/api/users/1", at=time.isoformat())
    assert (status, datetime.fromisoformat(body.pop("at")), body.pop("userId")) == (200, time, 1)
    assert set(body) == {"balance", "version"}
    return body["balance"], body["version"]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8])
async def test_what_an_account_had_at_each_moment(client: Client, database: Database, count: int) -> None:
    await an_account(client, database, [10] * count)
    moment = timedelta(microseconds=1)
    assert (await ask(client, "/api/users/1", at=(OPENED - moment).isoformat()))[0] == 404
    for version in range(count + 1):
        time = OPENED + timedelta(seconds=version)
        here, before = (100 + 10 * version, version), (90 + 10 * version, version - 1)
        assert await at(client, time) == here
        assert await at(client, time + moment) == here
        if version:
            assert await at(client, time - moment) == before


async def test_an_offset_is_reckoned_in(client: Client, database: Database) -> None:
    await an_account(client, database, [10])
    answers = [
        await ask(client, "/api/users/1", at=time)
        for time in ("2026-01-31T12:00:00.999999Z", "2026-01-31T14:00:00.5+02:00", "2026-01-31T06:30:01-05:30")
    ]
    assert [(body["version"], body["at"]) for _, body in answers] == [
        (0, "2026-01-31T12:00:00.999999Z"),
        (0, "2026-01-31T12:00:00.500000Z"),
        (1, "2026-01-31T12:00:01Z"),
    ]


async def test_an_account_from_before_openings_were_noted_was_always_there(client: Client, database: Database) -> None:
    await opened(client, 100)
    database.execute("UPDATE users SET opened_at = NULL")
    assert await at(client, datetime(1, 1, 1, tzinfo=UTC)) == (100, 0)
    _, page = await ask(client, "/api/users/1/changes")
    assert [(entry["version"], entry["amount"], entry["createdAt"]) for entry in page["changes"]] == [(0, 100, None)]


async def test_the_future_is_not_known(client: Client) -> None:
    await opened(client)
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    told = (400, {"error": "at: expected a time that is over"})
    assert await ask(client, "/api/users/1", at=tomorrow.isoformat()) == told
    assert (await ask(client, "/api/users/2", at=tomorrow.isoformat()))[0] == 404


@pytest.mark.parametrize(
    "time",
    [
        "",
        "now",
        "1769860800",
        "2026-01-31",
        "2026-01-31T23:59:59",
        "2026-01-31T23:59:59 01:00",
        "2026-02-30T00:00:00Z",
        "2026-01-31T25:00:00Z",
        "0001-01-01T00:00:00+14:00",
    ],
)
async def test_a_time_that_is_none(client: Client, time: str) -> None:
    await opened(client)
    assert await ask(client, "/api/users/1", at=time) == (400, {"error": AT})


def test_what_was_long_ago_is_found_by_few_reads(database: Database) -> None:
    """Whatever the plan was made for: a search by halves of 100,000 changes takes 17 steps."""
    database.open(dict.fromkeys(range(1, 6), 0))
    database.execute("PREPARE reading AS " + in_schema(READ_PAST_BALANCE, None))
    database.execute("SET plan_cache_mode = force_generic_plan")
    database.execute("EXECUTE reading (1, now())")
    database.execute(
        "INSERT INTO balance_changes (user_id, version, amount, balance, idempotency_key, created_at)"
        " SELECT 1 + number %% 5, 1 + number / 5, 1, 1 + number / 5, number, %s + number * interval '1 second'"
        "   FROM generate_series(0, 99999) AS number",
        OPENED,
    )
    database.execute("UPDATE users SET version = 20000, balance = 20000")
    explained = database.execute("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE reading (1, '2026-01-31T20:00:00Z')")
    plan = explained[0][0][0]["Plan"]
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 200
    ((balance, version, *_),) = database.execute("EXECUTE reading (1, '2026-01-31T20:00:00Z')")
    assert (balance, version) == (8 * 3600 // 5 + 1, 8 * 3600 // 5 + 1)


async def test_all_accounts_page_by_page(client: Client, database: Database) -> None:
    assert await ask(client, "/api/users") == (200, {"users": [], "next": None})
    database.open({user_id: user_id for user_id in (1, 2, 5, 2**53 - 1)})
    path, seen = "/api/users?limit=2", []
    while path:
        status, page = await ask(client, path)
        assert status == 200
        seen += page["users"]
        assert len(page["users"]) == 2
        path = page["next"]
    assert [(account["userId"], account["balance"]) for account in seen] == [
        (user_id, user_id) for user_id in (1, 2, 5, 2**53 - 1)
    ]
    assert seen[0] == (await ask(client, "/api/users/1"))[1]
    assert await ask(client, "/api/users", after="5", limit="1") == (200, {"users": seen[3:], "next": None})


def test_all_accounts_are_read_by_index(database: Database) -> None:
    database.execute(
        "INSERT INTO users (id, balance, opening_balance) SELECT id, 1, 1 FROM generate_series(1, 9999) AS id"
    )
    database.execute("PREPARE reading AS " + in_schema(LIST_ACCOUNTS, None))
    for mode in ("force_custom_plan", "force_generic_plan"):
        database.execute(f"SET plan_cache_mode = {mode}")
        plan = "\n".join(line for (line,) in database.execute("EXPLAIN EXECUTE reading (5000, 51)"))
        assert "Index Scan using users_pkey" in plan, plan


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ({"after": "0"}, "after: expected an integer from 1 to 9007199254740991"),
        ({"limit": "0"}, "limit: expected an integer from 1 to 1000"),
        ({"before": "3"}, "before: expected no such member"),
    ],
)
async def test_a_bad_page_of_accounts(client: Client, query: dict[str, str], error: str) -> None:
    assert await ask(client, "/api/users", **query) == (400, {"error": error})


@pytest.mark.parametrize(
    "endpoint", [each for each in ENDPOINTS if each.path.startswith("/api/")], ids=lambda e: e.handler.__name__
)
async def test_a_parameter_that_nobody_knows_is_an_error(client: Client, database: Database, endpoint: Any) -> None:
    """Passed over, it would seem to have been heeded."""
    database.open({1: 100, 2: 100})
    path = endpoint.path.format(userId=1, key="k", holdId="h")
    body = None if endpoint.body is None else next(iter(endpoint.examples.values()))
    async with client.request(endpoint.method, path, params={"dryRun": "true"}, json=body) as answer:
        assert (answer.status, await answer.json()) == (400, {"error": "dryRun: expected no such member"})
    assert database.accounts() == {1: (0, 100), 2: (0, 100)}
    if not endpoint.query:
        async with client.request(endpoint.method, path + "?&", json=body) as answer:
            assert (answer.status, await answer.json()) == (400, {"error": "query: expected none"})
