"""The feed: every applied change of all accounts, once, in whatever order they are committed; waiting for the next."""

import asyncio
import random
import re
import signal
import sys
from pathlib import Path

import psycopg
import pytest
from msgspec.structs import replace
from pytest_aiohttp import AiohttpClient

from atomic_balance.http import feed as feed_module
from atomic_balance.http.app import make_app
from atomic_balance.http.app_keys import DRAINING
from atomic_balance.http.feed import FEED
from atomic_balance.postgres.accounts import Accounts, FeedPlace
from atomic_balance.postgres.migrations import migrate
from atomic_balance.settings import Settings
from tests.client import Client, opened, session, update
from tests.database import Database, until
from tests.feed import CHANGES, Reader
from tests.processes import ROOT, run, running_service

APPLY = (
    "SELECT FROM apply_changes(%(user)s, ARRAY[%(user)s]::bigint[], ARRAY[%(key)s], ARRAY[1]::bigint[],"
    " NULL, NULL, NULL, NULL, NULL, '10s')"
)
JOURNAL = "SELECT user_id, version FROM balance_changes WHERE version IS NOT NULL ORDER BY user_id, version"


def waiting(client: Client) -> int:
    """How many callers wait for the feed of a service in this process."""
    found = client.app[FEED] if client.app else None
    assert found
    return found.waiting_count


async def test_all_changes_of_all_accounts_as_the_journal_has_them(client: Client) -> None:
    for user_id in (1, 2):
        await opened(client, user_id=user_id)
    await update(client, -2, 2, headers={"Idempotency-Key": "k"}, reference="r")
    await update(client, -99_999, 2, headers={"Idempotency-Key": "refused"})
    transfer = {"fromUserId": 2, "to": [{"userId": 1, "amount": 5}]}
    async with client.post("/api/balance/transfer", json=transfer) as answer:
        assert answer.status == 200
    async with client.put("/api/users/1/holds/h", json={"amount": 3}) as answer:
        assert answer.status == 201
    reader = Reader(client)
    await reader.read_all()
    assert reader.read() == [(2, 1), (1, 1), (2, 2), (1, 2)]
    for user_id in (1, 2):
        async with client.get(f"/api/users/{user_id}/changes?after=0") as answer:
            journal = (await answer.json())["changes"]
        assert [change for change in reader.changes if change["userId"] == user_id] == [
            {**entry, "userId": user_id} for entry in journal
        ]


async def test_pages_of_every_size_end_within_transactions(client: Client, database: Database) -> None:
    for user_id in range(1, 6):
        await opened(client, user_id=user_id)
    for _ in range(3):  # one statement each, so five changes have the same position
        updates = [{"userId": user_id, "amount": 1} for user_id in range(1, 6) for _ in range(2)]
        async with client.post("/api/balance/updates", json={"updates": updates}) as answer:
            assert answer.status == 200
    with database.session() as connection:  # whose rows lie in another order than that of their users
        for user_id in (5, 2, 4, 1, 3):
            connection.execute(APPLY.encode(), {"user": user_id, "key": "k"})
        connection.commit()
    wanted = Reader(client)
    await wanted.read_all()
    assert sorted(wanted.read()) == [(user_id, version) for user_id in range(1, 6) for version in range(1, 8)]
    for limit in (1, 2, 3, 7, 10, 31, 34, 35):
        reader = Reader(client, limit=limit)
        await reader.read_all()
        assert reader.changes == wanted.changes


async def test_a_partitioned_journal_is_read_in_order_too(client: Client, database: Database) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    (recipe,) = re.findall(r"```sql\n(BEGIN;\n.*?)```", page, re.DOTALL)
    database.execute(recipe)
    for user_id in (1, 2, 3):
        await opened(client, user_id=user_id)
    for _ in range(3):
        for user_id in (3, 1, 2):
            await update(client, 1, user_id)
    reader = Reader(client, limit=2)
    await reader.read_all()
    assert reader.read() == [(user_id, version) for version in (1, 2, 3) for user_id in (3, 1, 2)]


async def test_where_there_is_nothing_there_is_a_place_to_go_on_from(client: Client) -> None:
    reader = Reader(client)
    assert await reader.page() == []
    assert reader.after is not None
    await opened(client)
    await update(client, -1)
    assert [change["amount"] for change in await reader.page()] == [-1]
    before = reader.after
    assert await reader.page() == []
    assert reader.after == before


@pytest.mark.parametrize(
    ("query", "member"),
    [
        ("after=", "after"),
        ("after=1", "after"),
        ("after=1.2", "after"),
        ("after=1.2.3.4", "after"),
        ("after=-1.2.3", "after"),
        ("after=99999999999999999.1.1", "after"),
        ("after=1.1.9999999999999999999", "after"),
        ("after=1.1.x", "after"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("wait=31", "wait"),
        ("wait=-1", "wait"),
        ("wait=1.5", "wait"),
        ("before=1", "before"),
        ("wait=1&wait=2", "query"),
    ],
)
async def test_bad_parameters_are_named(client: Client, query: str, member: str) -> None:
    async with client.get(f"{CHANGES}?{query}") as answer:
        assert answer.status == 400
        assert member in (await answer.json())["error"]


async def test_the_greatest_place_is_one(client: Client) -> None:
    async with client.get(f"{CHANGES}?after={'9' * 16}.{'9' * 16}.{'9' * 18}") as answer:
        assert (answer.status, (await answer.json())["changes"]) == (200, [])


async def test_nothing_is_skipped_while_transactions_end_in_any_order(client: Client, database: Database) -> None:
    """Each keeps what it wrote to itself for a while, and some take it back; a reader follows all the time."""
    chance = random.Random(4711)
    database.open(dict.fromkeys(range(1, 81), 0))

    async def write(first: int) -> None:
        async with await psycopg.AsyncConnection.connect(database.url) as connection:
            for number in range(60):
                for step in range(chance.randrange(1, 4)):  # of accounts that no other session uses
                    user_id = first + 8 * chance.randrange(10)
                    await connection.execute(APPLY, {"user": user_id, "key": f"{number}-{step}"})
                    await asyncio.sleep(chance.random() / 50)
                await (connection.rollback if chance.random() < 0.2 else connection.commit)()

    reader = Reader(client, limit=17)
    writing = asyncio.gather(*(write(first) for first in range(1, 9)))
    while not writing.done():
        await reader.page(wait=chance.randrange(2))
    await writing
    await reader.read_all()
    assert sorted(reader.read()) == database.execute(JOURNAL)
    assert len(reader.changes) > 500


async def test_changes_from_before_the_feed_come_first_and_are_not_rewritten(
    empty_database_url: str, aiohttp_client: AiohttpClient
) -> None:
    url = empty_database_url
    environment = {"DATABASE_URL": url.replace("postgresql://", "postgresql+psycopg://")}
    yoyo = str(Path(sys.executable).with_name("yoyo"))
    status, output = await run(yoyo, "apply", "--revision", "0005-transfers", directory=ROOT, environment=environment)
    assert status == 0, output
    with Database(url) as database:
        database.open({1: 0, 2: 0, 3: 0})
        for user_id, key in ((3, "a"), (1, "a"), (3, "b"), (2, "a")):
            database.execute(APPLY.replace("%(user)s", str(user_id)).replace("%(key)s", f"'{key}'"))
        where = "SELECT pg_relation_filenode('balance_changes')"
        before = database.execute(where)
        reads = "SELECT pg_stat_force_next_flush(), seq_scan FROM pg_stat_user_tables WHERE relname = 'balance_changes'"
        database.execute(reads)
        read = database.execute(reads)
        await run(yoyo, "apply", "--revision", "0007-feed", directory=ROOT, environment=environment)
        assert database.execute(reads) == read  # nor is it read, while changes wait
        migrate(url)
        assert database.execute(where) == before
        client = await aiohttp_client(make_app(Settings(database_url=url)))
        for user_id in (3, 1):
            await update(client, 1, user_id)
        for limit in (1, 2, 3, 4, 5, 100):
            reader = Reader(client, limit=limit)
            await reader.read_all()
            assert reader.read() == [(1, 1), (2, 1), (3, 1), (3, 2), (3, 3), (1, 2)]


async def test_who_waits_is_answered_when_a_change_comes(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several who wait at the same place, for whom each page is read once, and one who has nothing to wait for."""
    await opened(client)
    await update(client, 1)
    readers = [Reader(client, limit=limit) for limit in (1, 1, 1, 1_000, 1_000)]
    for reader in readers:
        await reader.read_all()
    pages = [asyncio.create_task(reader.page(wait=25)) for reader in readers]
    await until(lambda: waiting(client) == 5)
    assert len(await Reader(client).page(wait=25)) == 1
    read_page, sizes = Accounts.feed, list[int]()

    async def feed(accounts: Accounts, after: FeedPlace, count_max: int) -> feed_module.Rows:
        sizes.append(count_max)
        return await read_page(accounts, after, count_max)

    monkeypatch.setattr(Accounts, "feed", feed)
    await update(client, 7)
    for page in await asyncio.gather(*pages):
        assert [change["amount"] for change in page] == [7]
    assert sorted(sizes) == [1, 1_000]
    assert waiting(client) == 0


async def test_who_waits_in_vain_gets_an_empty_page(client: Client) -> None:
    assert await Reader(client).page(wait=1) == []
    assert waiting(client) == 0


async def test_so_many_may_wait_and_no_more(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "WAITING_MAX", 2)
    await opened(client)
    pages = [asyncio.create_task(Reader(client).page(wait=25)) for _ in range(2)]
    await until(lambda: waiting(client) == 2)
    async with client.get(f"{CHANGES}?wait=20") as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    async with client.get(CHANGES) as answer:
        assert answer.status == 200
    await update(client, 7)
    assert [len(page) for page in await asyncio.gather(*pages)] == [1, 1]
    async with client.get(f"{CHANGES}?wait=20") as answer:
        assert answer.status == 200


async def test_nobody_waits_for_a_process_that_is_about_to_stop(client: Client) -> None:
    reader = Reader(client)
    page = asyncio.create_task(reader.page(wait=30))
    await until(lambda: waiting(client) == 1)
    assert client.app
    client.app[DRAINING].set()
    async with asyncio.timeout(20):
        assert await page == []
        assert await reader.page(wait=30) == []


async def test_a_service_stops_though_callers_wait(database_url: str, tmp_path: Path) -> None:
    async with running_service({"DATABASE_URL": database_url}, tmp_path) as service, session() as caller:
        pages = [asyncio.create_task(Reader(caller, service.url).page(wait=30)) for _ in range(20)]
        with Database(database_url) as database:
            asked = "SELECT pid FROM pg_stat_activity WHERE query ~ 'FROM read_feed\\(' AND pid <> pg_backend_pid()"
            await until(lambda: database.execute(asked))
        service.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            assert await asyncio.gather(*pages) == [[]] * 20
        assert await service.process.wait() == 0


async def test_when_the_database_goes_those_who_wait_are_told(client: Client, database: Database) -> None:
    pages = [asyncio.create_task(client.get(f"{CHANGES}?wait=30").__aenter__()) for _ in range(3)]
    await until(lambda: waiting(client) == 3)
    with psycopg.connect(database.url.replace(f"/{database.name}?", "/postgres?"), autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS false".encode())
        for pid in database.connected():
            admin.execute("SELECT pg_terminate_backend(%s)", (pid,))
        assert [answer.status for answer in await asyncio.gather(*pages)] == [503] * 3
        admin.execute(f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS true".encode())


async def test_the_lag_is_that_of_what_a_running_transaction_holds_back(client: Client, database: Database) -> None:
    async def lag() -> float:
        async with client.get("/metrics") as answer:
            (found,) = re.findall(r"^atomic_balance_feed_lag_seconds (.*)$", await answer.text(), re.MULTILINE)
        return float(found)

    await opened(client)
    reader = Reader(client)
    await reader.read_all()
    with database.session("SELECT pg_current_xact_id()") as holder:
        await update(client, 7)
        page = asyncio.create_task(reader.page(wait=30))
        async with asyncio.timeout(15):
            while await lag() == 0:  # noqa: ASYNC110 - it is asked of a service
                await asyncio.sleep(0.05)
        assert not page.done()
        holder.rollback()
        assert [change["amount"] for change in await page] == [7]
    again = asyncio.create_task(reader.page(wait=1))
    await again
    assert await lag() == 0


async def test_with_citus_there_is_no_feed(settings: Settings, aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(make_app(replace(settings, citus=True)))
    async with client.get(f"{CHANGES}?wait=20") as answer:
        assert (answer.status, "logical replication" in await answer.text()) == (501, True)
