"""Beside an application's own table `users`: the service's tables in a schema of their own."""

import asyncio
import sys
from pathlib import Path

import psycopg
import pytest
from pytest_aiohttp import AiohttpClient

from atomic_balance.http.app import make_app
from atomic_balance.postgres.migrations import migrate, missing_migrations
from atomic_balance.postgres.verify import verify
from atomic_balance.settings import Settings, WrongSettingError
from tests.client import hold, opened, settle, transfer, update
from tests.database import Database
from tests.processes import ROOT, run
from tests.schema import STAND_IN

SCHEMA = "balances"
COMMAND = (sys.executable, "-m", "atomic_balance")
OF_ANOTHER = [("Ada", "12.50")]


@pytest.fixture
def neighbour(empty_database_url: str) -> str:
    """The URL of a database whose `users`, where the search path looks, are somebody else's."""
    with psycopg.connect(empty_database_url) as connection:
        connection.execute("CREATE TABLE users (name text PRIMARY KEY, balance numeric(12, 2) NOT NULL)")
        connection.execute("INSERT INTO users VALUES ('Ada', 12.50)")
    return empty_database_url


def tables(url: str) -> list[str]:
    with Database(url) as database:
        return [name for (name,) in database.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]


def theirs(url: str) -> list[tuple[str, str]]:
    with Database(url) as database:
        return [(name, str(balance)) for name, balance in database.execute("SELECT name, balance FROM public.users")]


def test_a_table_of_another_is_left_alone_and_the_setting_named(neighbour: str) -> None:
    with pytest.raises(WrongSettingError, match=r"^DATABASE_SCHEMA: expected a schema without a table users; public "):
        migrate(neighbour)
    assert (tables(neighbour), theirs(neighbour)) == (["users"], OF_ANOTHER)


async def test_the_command_line_says_so_in_one_line(neighbour: str, tmp_path: Path) -> None:
    environment = {"DATABASE_URL": neighbour}
    status, output = await run(*COMMAND, "migrate", directory=tmp_path, environment=environment)
    assert (status, output) == (
        2,
        "atomic-balance: DATABASE_SCHEMA: expected a schema without a table users; "
        "public has one that is not this service's\n",
    )
    environment["DATABASE_SCHEMA"] = SCHEMA
    for command, said in (
        (("migrate",), "applied 0001-users"),
        (("open", "1", "5"), "user 1 opened, balance 5"),
        (("verify",), "1 accounts, 0 changes: every balance is what the journal says"),
    ):
        status, output = await run(*COMMAND, *command, directory=tmp_path, environment=environment)
        assert (status, said in output) == (0, True), output
    assert theirs(neighbour) == OF_ANOTHER


@pytest.mark.parametrize("citus", [False, True])
async def test_the_service_and_the_audit_keep_to_it(neighbour: str, aiohttp_client: AiohttpClient, citus: bool) -> None:
    """Every statement and function: one that named no schema would meet the other's table."""
    if citus:
        with psycopg.connect(neighbour) as connection:
            connection.execute(STAND_IN)
    migrate(neighbour, citus, SCHEMA)
    before = tables(neighbour)
    client = await aiohttp_client(make_app(Settings(database_url=neighbour, database_schema=SCHEMA, citus=citus)))
    await opened(client, 100)
    await opened(client, 0, user_id=2)
    assert (await update(client, -10, headers={"Idempotency-Key": "k"}))[0] == 200
    assert (await update(client, -1_000, headers={"Idempotency-Key": "refused"}))[0] == 400
    together = await asyncio.gather(*(update(client, 1, user_id=user_id) for user_id in (1, 2) * 20))
    assert {status for status, _ in together} == {200}
    assert (await hold(client, "captured", 5)).status == 201
    assert (await settle(client, "capture", "captured")).status == 200
    assert (await hold(client, "open", 5, expiresInSeconds=3600)).status == 201
    assert (await transfer(client, 1, {2: 50})).status == 200
    async with client.patch("/api/users/1", json={"minimumBalance": -5}) as answer:
        assert answer.status == 200
    for path in (
        "/api/users/1",
        "/api/users/1/changes",
        "/api/users/1/changes/k",
        "/api/users/1/holds",
        "/api/users/1/holds/captured",
        "/readyz",
    ):
        async with client.get(path) as answer:
            assert answer.status == 200, await answer.text()
    async with client.get("/api/changes") as answer:  # what there is no feed for on Citus
        assert (answer.status, len((await answer.json()).get("changes", ()))) == ((501, 0) if citus else (200, 46))
    found = verify(neighbour, schema=SCHEMA)
    assert (found.accounts, found.changes, found.differences) == (2, 46, [])
    assert (tables(neighbour), theirs(neighbour)) == (before, OF_ANOTHER)


async def test_expired_holds_are_settled_there(neighbour: str, aiohttp_client: AiohttpClient) -> None:
    migrate(neighbour, schema=SCHEMA)
    client = await aiohttp_client(make_app(Settings(database_url=neighbour, database_schema=SCHEMA)))
    await opened(client, 100)
    assert (await hold(client, "h", 5, expiresInSeconds=1)).status == 201
    async with asyncio.timeout(20):
        while True:
            async with client.get("/api/users/1/holds/h") as answer:
                if (await answer.json())["status"] == "expired":
                    break
            await asyncio.sleep(0.1)


async def test_yoyo_takes_the_schema_in_its_url(empty_database_url: str) -> None:
    """As README says it; two schemas in one database are two services."""
    migrate(empty_database_url)
    with Database(empty_database_url) as database:
        database.execute(f"CREATE SCHEMA {SCHEMA}")
    url = empty_database_url.replace("postgresql://", "postgresql+psycopg://") + f"&schema={SCHEMA}"
    yoyo = str(Path(sys.executable).with_name("yoyo"))
    status, output = await run(yoyo, "apply", directory=ROOT, environment={"DATABASE_URL": url})
    assert status == 0, output
    assert migrate(empty_database_url, schema=SCHEMA) == []
    with Database(empty_database_url) as database:
        (paths,) = database.execute(
            "SELECT array_agg(proconfig::text ORDER BY proname) FROM pg_proc"
            f" WHERE pronamespace = '{SCHEMA}'::regnamespace AND proname ~ '^(apply|read)_'"
        )[0]
    assert [path.rpartition("search_path=")[2] for path in paths] == ["balances}"] * 4
    status, output = await run(yoyo, "rollback", "--all", directory=ROOT, environment={"DATABASE_URL": url})
    assert status == 0, output
    assert migrate(empty_database_url) == []
    assert migrate(empty_database_url, schema=SCHEMA) == missing_migrations([])
